"""The audio adapter with a fake pb_utils: batches, requests without clips, errors, a server without an encoder."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.dlpack import from_dlpack

from autoglm.audio.speech import Speech
from autoglm.config import AudioSection
from autoglm.media.audio_file import AudioPart
from autoglm.serving.metrics import UPDATE_INTERVAL_S
from tests.audio.speech_checkpoints import sound_file, tone, write_encoder, write_projector
from tests.conftest import Pair
from tests.model_repository import fake_pb_utils as pb

HIDDEN = 128
CLIPS = [sound_file(tone(seconds, seed=i)) for i, seconds in enumerate((1.2, 0.3))]


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Speech:
    root = tmp_path_factory.mktemp("speech")
    opened = Speech.open(write_encoder(root / "encoder", "group"), write_projector(root / "bridge", HIDDEN), HIDDEN)
    assert opened is not None
    return opened


def start(name: str, plain: Pair, speech: Speech | None, patch: pytest.MonkeyPatch) -> Any:
    """An initialised adapter."""
    patch.setenv("AUTOGLM_CHECKPOINT", str(plain.checkpoint.path))
    patch.delenv("AUTOGLM_CONFIG", raising=False)
    for variable, path in (("SPEECH", speech and speech.encoder.path), ("BRIDGE", speech and speech.bridge)):
        patch.setenv(f"AUTOGLM_{variable}", str(path or ""))
    model = pb.load_adapter(name).TritonPythonModel()
    model.initialize({"model_name": name, "model_instance_name": f"{name}_0_0", "model_instance_device_id": "0"})
    return model


@pytest.fixture(scope="module")
def model(plain: Pair, speech: Speech) -> Iterator[Any]:
    pb.MetricFamily.families.clear()
    with pytest.MonkeyPatch.context() as patch:
        adapter = start("audio_encoder", plain, speech, patch)
        yield adapter
        adapter.finalize()


def make_request(
    speech: Speech, embedded: list[bytes], transcribed: list[bytes], **options: Any
) -> pb.InferenceRequest:
    parts = [(data, "bridge") for data in embedded] + [(data, "transcript") for data in transcribed]
    limits = AudioSection()
    clips = [speech.clip(AudioPart(data, f"AUDIO[{i}]"), mode, limits) for i, (data, mode) in enumerate(parts)]  # type: ignore[arg-type]
    shape = (1, len(clips))
    return pb.InferenceRequest(
        [
            pb.bytes_tensor("AUDIO_FILES", [clip.data for clip in clips], shape),
            pb.Tensor("AUDIO_TOKENS", np.array([[clip.num_tokens for clip in clips]], np.int32)),
            pb.bytes_tensor("AUDIO_HASHES", [clip.media_hash for clip in clips], shape),
            pb.bytes_tensor("AUDIO_NAMES", [clip.name for clip in clips], shape),
        ],
        **options,
    )


def embeddings(response: Any) -> torch.Tensor:
    assert not response.has_error()
    return from_dlpack(response["AUDIO_EMBEDDINGS"].to_dlpack())


def test_requests_of_a_batch_get_their_own_clips(model: Any, speech: Speech) -> None:
    """Requests with two, no and three clips in one call."""
    clips: tuple[tuple[list[bytes], list[bytes]], ...] = ((CLIPS, []), ([], []), (CLIPS[1:], CLIPS))
    requests = [make_request(speech, embedded, transcribed) for embedded, transcribed in clips]
    both, none, mixed = model.execute(requests)
    assert embeddings(both).shape == (1, 12 + 3, HIDDEN) and embeddings(both).dtype == torch.bfloat16
    assert both["AUDIO_TEXTS"].as_numpy().tolist() == [[b"", b""]]
    assert embeddings(none).shape == (1, 0, HIDDEN) and none["AUDIO_TEXTS"].shape() == [1, 0]
    assert torch.equal(embeddings(mixed), embeddings(both)[:, 12:])
    empty, *texts = mixed["AUDIO_TEXTS"].as_numpy()[0].tolist()
    assert empty == b"" and all(texts)
    assert mixed["AUDIO_MS"].shape() == [1, 1]
    time.sleep(2 * UPDATE_INTERVAL_S)
    (misses,) = pb.MetricFamily.families["autoglm_audio_cache_misses_total"].metrics
    assert misses.value() == model.encoder.cache.stats.misses == 4 and misses.labels == {"device": "cpu"}


def test_errors_do_not_affect_other_requests(model: Any, speech: Speech) -> None:
    broken = sound_file(tone(2), format="FLAC")[:-20000]
    requests = [make_request(speech, [broken], []), make_request(speech, CLIPS, [])]
    rejected, encoded, cancelled = model.execute([*requests, make_request(speech, [], [], cancelled=True)])
    message = "INVALID_ARGUMENT: AUDIO[0] is a damaged FLAC file: its samples cannot be decoded"
    assert rejected.error().message() == message
    assert len(embeddings(encoded)[0]) == 15
    assert "CANCELLED" in cancelled.error().message()


def test_without_an_encoder_only_requests_without_audio_are_accepted(
    plain: Pair, speech: Speech, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = start("audio_encoder", plain, None, monkeypatch)
    without, with_clips = model.execute([make_request(speech, [], []), make_request(speech, [], CLIPS)])
    assert embeddings(without).shape == (1, 0, HIDDEN)
    assert "AUDIO must not contain clips: this server has no speech encoder" in with_clips.error().message()
    model.finalize()


def test_a_prompt_with_audio_passes_through_all_adapters(
    plain: Pair, speech: Speech, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("preprocess", "audio_encoder", "autoglm_llm")
    preprocess, encoder, language_model = (start(name, plain, speech, monkeypatch) for name in names)
    prompt = [pb.bytes_tensor("PROMPT", ["do"]), pb.bytes_tensor("AUDIO", CLIPS)]
    for mode, num_transcripts in (("bridge", 0), ("transcript", 2)):
        options = {"audio_mode": mode, "max_tokens": 3, "ignore_eos": True}
        (prepared,) = preprocess.execute([pb.InferenceRequest(prompt, options)])
        assert not prepared.has_error()
        ids, counts = prepared["PROMPT_IDS"].as_numpy().tolist(), prepared["AUDIO_TOKENS"].as_numpy().tolist()
        assert ids.count(plain.checkpoint.audio_token_id) == (2 if num_transcripts else 15)
        assert counts == [[0, 0] if num_transcripts else [12, 3]]
        (encoded,) = encoder.execute([pb.InferenceRequest(prepared.output_tensors())])
        request = pb.InferenceRequest([*prepared.output_tensors(), *encoded.output_tensors()], options)
        language_model.execute([request])
        assert request.sender.finished.wait(20)
        first, *others = request.sender.responses
        assert not first.has_error()
        texts = encoded["AUDIO_TEXTS"].as_numpy()[0].tolist()
        assert first["TRANSCRIPTS"].as_numpy().tolist() == texts[:num_transcripts]
        assert all(response["TRANSCRIPTS"].shape() == [0] for response in others)
    encoder.finalize()
    language_model.finalize()
