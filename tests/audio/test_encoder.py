"""The encoder around Wav2Vec2: modes, batches, caching, and isolation of errors."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autoglm.audio import encoder as encoder_module
from autoglm.audio.encoder import AudioEncoder, EncodedClips
from autoglm.audio.speech import Speech
from autoglm.audio.wav2vec2 import Wav2Vec2
from autoglm.checkpoint import CheckpointError
from autoglm.config import AudioMode, AudioSection, ConfigError
from autoglm.errors import RequestError
from autoglm.media.audio_file import AudioFile, AudioPart, decode_audio
from tests.audio.speech_checkpoints import sound_file, tone, write_encoder, write_projector

CPU = torch.device("cpu")
HIDDEN = 24
CLIPS = [sound_file(tone(seconds, pitch=200 + 60 * i, seed=i)) for i, seconds in enumerate((1.2, 0.3, 2.5))]


@pytest.fixture(scope="module", params=["group", "layer"])
def speech(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Speech:
    root = tmp_path_factory.mktemp("speech")
    opened = Speech.open(
        write_encoder(root / "encoder", request.param), write_projector(root / "bridge", HIDDEN, norm=True), HIDDEN
    )
    assert opened is not None
    return opened


@pytest.fixture
def make(speech: Speech) -> Iterator[Callable[..., AudioEncoder]]:
    made: list[AudioEncoder] = []

    def make_encoder(**options: Any) -> AudioEncoder:
        made.append(AudioEncoder(speech, AudioSection(**options), HIDDEN, CPU, torch.float32))
        return made[-1]

    yield make_encoder
    for encoder in made:
        encoder.close()


def clip(speech: Speech, data: bytes, mode: AudioMode = "bridge", index: int = 0) -> AudioFile:
    return speech.clip(AudioPart(data, f"AUDIO[{index}]"), mode, AudioSection())


def encoded(result: EncodedClips | RequestError) -> EncodedClips:
    assert isinstance(result, EncodedClips), result
    return result


def test_clips_of_many_requests_are_encoded_as_if_alone(make: Any, speech: Speech) -> None:
    bridged, written = ([clip(speech, data, mode) for data in CLIPS] for mode in ("bridge", "transcript"))
    encoder = make(feature_cache_mb=0)
    alone = [encoded(encoder.encode([[one]])[0]) for one in (*bridged, *written)]
    mixed = encoder.encode([[bridged[0], written[2], bridged[2]], [], [written[1], written[0]], [bridged[1]]])
    first, nothing, second, third = map(encoded, mixed)
    assert first.embeddings.dtype == torch.bfloat16
    expected = torch.cat((alone[0].embeddings, alone[2].embeddings))
    torch.testing.assert_close(first.embeddings, expected, atol=1e-2, rtol=1e-2)
    assert len(first.embeddings) == bridged[0].num_tokens + bridged[2].num_tokens
    assert first.transcripts == ["", alone[5].transcripts[0], ""] and alone[5].transcripts != [""]
    assert nothing.embeddings.shape == (0, HIDDEN) and nothing.transcripts == []
    assert second.transcripts == [alone[4].transcripts[0], alone[3].transcripts[0]] and not len(second.embeddings)
    torch.testing.assert_close(third.embeddings, alone[1].embeddings, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("seconds, passes", [(1, 3), (4, 2), (160, 1)])
def test_the_size_of_a_pass_includes_padding(
    make: Any, speech: Speech, seconds: int, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make(max_seconds_per_pass=seconds)
    sizes: list[int] = []
    original = encoder._features

    def counting(group: Any) -> Any:
        sizes.append(len(group))
        return original(group)

    monkeypatch.setattr(encoder, "_features", counting)
    encoded(encoder.encode([[clip(speech, data) for data in CLIPS]])[0])
    assert len(sizes) == passes and sum(sizes) == 3


def test_a_cached_clip_is_not_decoded(make: Any, speech: Speech, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counting(data: bytes, *more: Any) -> Any:
        calls.append(len(data))
        return decode_audio(data, *more)

    monkeypatch.setattr(encoder_module, "decode_audio", counting)
    encoder = make()
    for mode in ("bridge", "transcript"):
        one = clip(speech, CLIPS[0], mode)
        first, again = (encoded(encoder.encode([[one, one]])[0]) for _ in range(2))
        assert torch.equal(first.embeddings, again.embeddings) and first.transcripts == again.transcripts
    assert len(calls) == 2
    assert (encoder.cache.stats.hits, encoder.cache.stats.misses) == (6, 2)


def test_an_invalid_clip_does_not_affect_other_requests(make: Any, speech: Speech) -> None:
    encoder, good = make(), clip(speech, CLIPS[0])
    flac = sound_file(tone(2), format="FLAC")
    for bad, message in (
        (clip(speech, flac[:-20000], index=3), "AUDIO[3] is a damaged FLAC file: its samples cannot be decoded"),
        (
            replace(good, num_tokens=9),
            "AUDIO[0] must be sent with the number of embeddings of its 59 frames (got 9 tokens)",
        ),
        (replace(good, media_hash="0"), "AUDIO[0] must be sent with the hash that preprocess computes for it"),
    ):
        rejected, accepted = encoder.encode([[bad], [clip(speech, CLIPS[1])]])
        assert isinstance(rejected, RequestError) and rejected.message.startswith(message)
        encoded(accepted)


def test_the_sizes_of_encoder_projector_and_language_model_must_match(tmp_path: Path) -> None:
    encoder, bridge = write_encoder(tmp_path / "a", "group"), write_projector(tmp_path / "b", HIDDEN)
    with pytest.raises(CheckpointError, match=r"input_size and output_size must be \(32, 25\), .* \(got \(32, 24\)\)"):
        Speech.open(encoder, bridge, HIDDEN + 1)
    with pytest.raises(ConfigError, match="AUTOGLM_BRIDGE needs AUTOGLM_SPEECH"):
        Speech.open(None, bridge, HIDDEN)
    assert Speech.open(None, None, HIDDEN) is None


def test_unsupported_modes_are_rejected_with_the_reason(tmp_path: Path) -> None:
    plain = Speech.open(write_encoder(tmp_path / "plain", "group", head=False), None, HIDDEN)
    assert plain is not None
    for mode, reason in (("bridge", "this server has no projector"), ("transcript", "no CTC head")):
        with pytest.raises(RequestError, match=rf"^AUDIO\[0\] cannot be used in audio_mode {mode}: .*{reason}"):
            plain.clip(AudioPart(CLIPS[0], "AUDIO[0]"), mode, AudioSection())  # type: ignore[arg-type]


def test_the_hash_depends_on_the_encoder(tmp_path: Path) -> None:
    hashes = set()
    for seed in (0, 1):
        speech = Speech.open(write_encoder(tmp_path / str(seed), "group", seed), None, HIDDEN)
        assert speech is not None
        hashes.add(clip(speech, CLIPS[0], "transcript").media_hash)
    assert len(hashes) == 2


@pytest.mark.parametrize("loading", ["lazy", "preload"])
def test_when_weights_are_read(make: Any, speech: Speech, loading: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Any] = []
    original = Wav2Vec2.load

    def counting(*given: Any) -> Wav2Vec2:
        loads.append(given)
        return original(*given)

    monkeypatch.setattr(Wav2Vec2, "load", counting)
    encoder = make(loading=loading)
    assert len(loads) == (loading == "preload")
    for _ in range(2):
        encoded(encoder.encode([[clip(speech, CLIPS[0])]])[0])
    assert len(loads) == 1
