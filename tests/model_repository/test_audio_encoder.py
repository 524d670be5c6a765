"""The speech adapter through a stand-in for pb_utils: batches of requests, no clips, faults, no encoder at all."""

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
from autoglm.serving.metrics import INTERVAL
from tests.audio.speech_checkpoints import sound_file, tone, write_encoder, write_projector
from tests.conftest import Pair
from tests.model_repository import fake_pb_utils as pb

HIDDEN = 128
SOUNDS = [sound_file(tone(seconds, seed=i)) for i, seconds in enumerate((1.2, 0.3))]


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Speech:
    root = tmp_path_factory.mktemp("speech")
    made = Speech.open(write_encoder(root / "encoder", "group"), write_projector(root / "bridge", HIDDEN), HIDDEN)
    assert made is not None
    return made


def start(name: str, plain: Pair, speech: Speech | None, patch: pytest.MonkeyPatch) -> Any:
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


def make_request(speech: Speech, bridged: list[bytes], written: list[bytes], **options: Any) -> pb.InferenceRequest:
    parts = [(data, "bridge") for data in bridged] + [(data, "transcript") for data in written]
    limits = AudioSection()
    clips = [speech.clip(AudioPart(data, f"AUDIO[{i}]"), mode, limits) for i, (data, mode) in enumerate(parts)]  # type: ignore[arg-type]
    shape = (1, len(clips))
    return pb.InferenceRequest(
        [
            pb.bytes_tensor("AUDIO_FILES", [clip.data for clip in clips], shape),
            pb.Tensor("AUDIO_TOKENS", np.array([[clip.tokens for clip in clips]], np.int32)),
            pb.bytes_tensor("AUDIO_HASHES", [clip.hash for clip in clips], shape),
            pb.bytes_tensor("AUDIO_NAMES", [clip.name for clip in clips], shape),
        ],
        **options,
    )


def embeddings(response: Any) -> torch.Tensor:
    assert not response.has_error()
    return from_dlpack(response["AUDIO_EMBEDDINGS"].to_dlpack())


def test_batch(model: Any, speech: Speech) -> None:
    """Requests with two clips, none and two more in one call: each gets its own."""
    asked: tuple[tuple[list[bytes], list[bytes]], ...] = ((SOUNDS, []), ([], []), (SOUNDS[1:], SOUNDS))
    requests = [make_request(speech, bridged, written) for bridged, written in asked]
    both, none, mixed = model.execute(requests)
    assert embeddings(both).shape == (1, 12 + 3, HIDDEN) and embeddings(both).dtype == torch.bfloat16
    assert both["AUDIO_TEXTS"].as_numpy().tolist() == [[b"", b""]]
    assert embeddings(none).shape == (1, 0, HIDDEN) and none["AUDIO_TEXTS"].shape() == [1, 0]
    assert torch.equal(embeddings(mixed), embeddings(both)[:, 12:])
    nothing, *texts = mixed["AUDIO_TEXTS"].as_numpy()[0].tolist()
    assert nothing == b"" and all(texts)
    assert mixed["AUDIO_MS"].shape() == [1, 1]
    time.sleep(2 * INTERVAL)
    (misses,) = pb.MetricFamily.families["autoglm_audio_cache_misses_total"].metrics
    assert misses.value() == model.encoder.cache.stats.misses == 4 and misses.labels == {"device": "cpu"}


def test_a_fault_is_one_requests(model: Any, speech: Speech) -> None:
    broken = sound_file(tone(2), format="FLAC")[:-20000]
    requests = [make_request(speech, [broken], []), make_request(speech, SOUNDS, [])]
    refused, fine, gone = model.execute([*requests, make_request(speech, [], [], cancelled=True)])
    assert "INVALID_ARGUMENT: AUDIO[0]: the samples of this FLAC" in refused.error().message()
    assert len(embeddings(fine)[0]) == 15
    assert "CANCELLED" in gone.error().message()


def test_without_an_encoder_requests_without_sound_are_answered(
    plain: Pair, speech: Speech, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = start("audio_encoder", plain, None, monkeypatch)
    silent, loud = model.execute([make_request(speech, [], []), make_request(speech, [], SOUNDS)])
    assert embeddings(silent).shape == (1, 0, HIDDEN)
    assert "AUDIO: this server has no speech encoder" in loud.error().message()
    model.finalize()


def test_preprocess_and_the_language_model(plain: Pair, speech: Speech, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt with sound through all three adapters."""
    chain = [start(name, plain, speech, monkeypatch) for name in ("preprocess", "audio_encoder", "autoglm_llm")]
    prompt = [pb.bytes_tensor("PROMPT", ["do"]), pb.bytes_tensor("AUDIO", SOUNDS)]
    for mode, transcribed in (("bridge", 0), ("transcript", 2)):
        options = {"audio_mode": mode, "max_tokens": 3, "ignore_eos": True}
        (read,) = chain[0].execute([pb.InferenceRequest(prompt, options)])
        assert not read.has_error()
        ids, tokens = read["PROMPT_IDS"].as_numpy().tolist(), read["AUDIO_TOKENS"].as_numpy().tolist()
        assert ids.count(plain.checkpoint.audio_token_id) == (2 if transcribed else 15)
        assert tokens == [[0, 0] if transcribed else [12, 3]]
        (heard,) = chain[1].execute([pb.InferenceRequest(read.output_tensors())])
        request = pb.InferenceRequest([*read.output_tensors(), *heard.output_tensors()], options)
        chain[2].execute([request])
        assert request.sender.finished.wait(20)
        first, *others = request.sender.responses
        assert not first.has_error()
        assert first["TRANSCRIPTS"].as_numpy().tolist() == heard["AUDIO_TEXTS"].as_numpy()[0].tolist()[:transcribed]
        assert all(response["TRANSCRIPTS"].shape() == [0] for response in others)
    for model in chain[1:]:
        model.finalize()
