"""The encoder around Wav2Vec2: modes, batches, what is decoded how often, whose a fault is."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autoglm.audio import encoder as encoder_module
from autoglm.audio.encoder import Heard, SpeechEncoder
from autoglm.audio.speech import Mode, Speech
from autoglm.audio.wav2vec2 import Wav2Vec2
from autoglm.checkpoint import CheckpointError
from autoglm.config import AudioSection, ConfigError
from autoglm.errors import RequestError
from autoglm.media.audio_file import AudioFile, AudioPart, decode_audio
from tests.audio.speech_checkpoints import sound_file, tone, write_encoder, write_projector

CPU = torch.device("cpu")
HIDDEN = 24
SOUNDS = [sound_file(tone(seconds, pitch=200 + 60 * i, seed=i)) for i, seconds in enumerate((1.2, 0.3, 2.5))]


@pytest.fixture(scope="module", params=["group", "layer"])
def speech(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Speech:
    root = tmp_path_factory.mktemp("speech")
    made = Speech.open(
        write_encoder(root / "encoder", request.param), write_projector(root / "bridge", HIDDEN, norm=True), HIDDEN
    )
    assert made is not None
    return made


@pytest.fixture
def make(speech: Speech) -> Iterator[Callable[..., SpeechEncoder]]:
    made: list[SpeechEncoder] = []

    def make_encoder(**options: Any) -> SpeechEncoder:
        made.append(SpeechEncoder(speech, AudioSection(**options), HIDDEN, CPU, torch.float32))
        return made[-1]

    yield make_encoder
    for encoder in made:
        encoder.close()


def clip(speech: Speech, data: bytes, mode: Mode = "bridge", index: int = 0) -> AudioFile:
    return speech.clip(AudioPart(data, f"AUDIO[{index}]"), mode, AudioSection())


def heard(result: Heard | RequestError) -> Heard:
    assert isinstance(result, Heard), result
    return result


def test_clips_of_many_requests_are_what_they_are_alone(make: Any, speech: Speech) -> None:
    bridged, written = ([clip(speech, sound, mode) for sound in SOUNDS] for mode in ("bridge", "transcript"))
    encoder = make(feature_cache_mb=0)
    alone = [heard(encoder.encode([[one]])[0]) for one in (*bridged, *written)]
    mixed = encoder.encode([[bridged[0], written[2], bridged[2]], [], [written[1], written[0]], [bridged[1]]])
    first, nothing, second, third = map(heard, mixed)
    assert first.embeddings.dtype == torch.bfloat16
    expected = torch.cat((alone[0].embeddings, alone[2].embeddings))
    torch.testing.assert_close(first.embeddings, expected, atol=1e-2, rtol=1e-2)
    assert len(first.embeddings) == bridged[0].tokens + bridged[2].tokens
    assert first.transcripts == ["", alone[5].transcripts[0], ""] and alone[5].transcripts != [""]
    assert nothing.embeddings.shape == (0, HIDDEN) and nothing.transcripts == []
    assert second.transcripts == [alone[4].transcripts[0], alone[3].transcripts[0]] and not len(second.embeddings)
    torch.testing.assert_close(third.embeddings, alone[1].embeddings, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("seconds, passes", [(1, 3), (4, 2), (160, 1)])
def test_passes_are_bounded_with_their_padding(
    make: Any, speech: Speech, seconds: int, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make(max_seconds_per_pass=seconds)
    sizes: list[int] = []
    original = encoder._features

    def counting(group: Any) -> Any:
        sizes.append(len(group))
        return original(group)

    monkeypatch.setattr(encoder, "_features", counting)
    heard(encoder.encode([[clip(speech, sound) for sound in SOUNDS]])[0])
    assert len(sizes) == passes and sum(sizes) == 3


def test_a_known_clip_is_not_decoded(make: Any, speech: Speech, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counting(data: bytes, *more: Any) -> Any:
        calls.append(len(data))
        return decode_audio(data, *more)

    monkeypatch.setattr(encoder_module, "decode_audio", counting)
    encoder = make()
    for mode in ("bridge", "transcript"):
        one = clip(speech, SOUNDS[0], mode)
        first, again = (heard(encoder.encode([[one, one]])[0]) for _ in range(2))
        assert torch.equal(first.embeddings, again.embeddings) and first.transcripts == again.transcripts
    assert len(calls) == 2
    assert (encoder.cache.stats.hits, encoder.cache.stats.misses) == (6, 2)


def test_a_fault_is_its_requests_own(make: Any, speech: Speech) -> None:
    encoder, good = make(), clip(speech, SOUNDS[0])
    flac = sound_file(tone(2), format="FLAC")
    for bad, says in (
        (clip(speech, flac[:-20000], index=3), "AUDIO[3]: the samples of this FLAC cannot be decoded"),
        (replace(good, tokens=9), "AUDIO[0]: got 9 tokens; allowed: what the clip's 59 frames are projected to"),
        (replace(good, hash="0"), "AUDIO[0]: got a hash that is not this file's"),
    ):
        refused, fine = encoder.encode([[bad], [clip(speech, SOUNDS[1])]])
        assert isinstance(refused, RequestError) and refused.message.startswith(says)
        heard(fine)


def test_the_language_models_size_and_the_encoders_must_fit(tmp_path: Path) -> None:
    encoder, bridge = write_encoder(tmp_path / "a", "group"), write_projector(tmp_path / "b", HIDDEN)
    with pytest.raises(CheckpointError, match=r"the encoder gives 32 and the language model takes 25"):
        Speech.open(encoder, bridge, HIDDEN + 1)
    with pytest.raises(ConfigError, match="AUTOGLM_BRIDGE is set without AUTOGLM_SPEECH"):
        Speech.open(None, bridge, HIDDEN)
    assert Speech.open(None, None, HIDDEN) is None


def test_what_a_server_lacks_is_named(tmp_path: Path) -> None:
    plain = Speech.open(write_encoder(tmp_path / "plain", "group", head=False), None, HIDDEN)
    assert plain is not None
    for mode, says in (("bridge", "AUDIO: audio_mode bridge needs a projector"), ("transcript", "CTC head")):
        with pytest.raises(RequestError, match=says):
            plain.clip(AudioPart(SOUNDS[0], "AUDIO[0]"), mode, AudioSection())  # type: ignore[arg-type]


def test_another_encoder_makes_another_hash(tmp_path: Path) -> None:
    hashes = set()
    for seed in (0, 1):
        speech = Speech.open(write_encoder(tmp_path / str(seed), "group", seed), None, HIDDEN)
        assert speech is not None
        hashes.add(clip(speech, SOUNDS[0], "transcript").hash)
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
        heard(encoder.encode([[clip(speech, SOUNDS[0])]])[0])
    assert len(loads) == 1
