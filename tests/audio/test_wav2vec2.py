"""The encoder against transformers in fp32: clips alone, and in a batch of very different lengths."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from autoglm.audio.checkpoint import SpeechCheckpoint
from autoglm.audio.wav2vec2 import Wav2Vec2
from autoglm.checkpoint import CheckpointError
from tests.audio.speech_checkpoints import tone, write_encoder

CPU = torch.device("cpu")
SECONDS = (3.1, 0.025, 0.4, 1.7, 0.4)


def load_reference(kind: str, directory: Path) -> tuple[Any, Any]:
    """transformers' model and processor."""
    import transformers

    processor: Any = transformers.AutoProcessor
    return getattr(transformers, kind).from_pretrained(directory).eval(), processor.from_pretrained(directory)


@pytest.mark.parametrize(("norm", "adapters"), [("group", None), ("layer", None), ("layer", 8)])
def test_features_and_text_equal_transformers_alone_and_in_a_batch(
    tmp_path: Path, norm: Literal["group", "layer"], adapters: int | None
) -> None:
    reference, processor = load_reference("Wav2Vec2ForCTC", write_encoder(tmp_path, norm, adapters=adapters))
    encoder = Wav2Vec2.load(SpeechCheckpoint.open(tmp_path), CPU, torch.float32)
    clips = [tone(seconds, pitch=200 + 40 * i, seed=i) for i, seconds in enumerate(SECONDS)]

    batch = encoder.encode([encoder.prepare(clip) for clip in clips])
    texts = encoder.transcribe(batch)

    for clip, features, text in zip(clips, batch, texts, strict=True):
        inputs = processor(clip, sampling_rate=16000, return_tensors="pt")
        with torch.no_grad():
            expected = reference(inputs.input_values, output_hidden_states=True)
            alone = reference.wav2vec2(inputs.input_values).last_hidden_state[0]
        (ours,) = encoder.encode([encoder.prepare(clip)])
        torch.testing.assert_close(ours, alone, atol=1e-4, rtol=0)
        torch.testing.assert_close(features, alone, atol=1e-4, rtol=0)
        assert len(features) == encoder.checkpoint.frames(len(clip))
        assert text == processor.batch_decode(expected.logits.argmax(-1))[0] == encoder.transcribe([ours])[0]
    assert len(set(texts)) > 2


def test_a_batch_equals_a_masked_batch_of_transformers(tmp_path: Path) -> None:
    reference, processor = load_reference("Wav2Vec2Model", write_encoder(tmp_path, "layer"))
    encoder = Wav2Vec2.load(SpeechCheckpoint.open(tmp_path), CPU, torch.float32)
    clips = [tone(seconds, seed=i) for i, seconds in enumerate(SECONDS)]
    inputs = processor(clips, sampling_rate=16000, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = reference(inputs.input_values, attention_mask=inputs.attention_mask).last_hidden_state
    for features, row in zip(encoder.encode([encoder.prepare(clip) for clip in clips]), expected, strict=True):
        torch.testing.assert_close(features, row[: len(features)], atol=1e-4, rtol=0)


def test_the_shortest_clip_has_one_frame(tmp_path: Path) -> None:
    checkpoint = SpeechCheckpoint.open(write_encoder(tmp_path, "group"))
    assert checkpoint.least_samples == 400
    assert [checkpoint.frames(samples) for samples in (0, 1, 399, 400, 16000, 160000)] == [0, 0, 0, 1, 49, 499]


def test_an_encoder_without_a_head_has_no_transcripts(tmp_path: Path) -> None:
    encoder = Wav2Vec2.load(SpeechCheckpoint.open(write_encoder(tmp_path, "group", head=False)), CPU, torch.float32)
    features = encoder.encode([encoder.prepare(tone(0.5))])
    with pytest.raises(ValueError, match="has no CTC head"):
        encoder.transcribe(features)


def test_a_directory_of_another_model_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        SpeechCheckpoint.open(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    with pytest.raises(CheckpointError, match=r"model_type must be wav2vec2 \(got 'whisper'\)"):
        SpeechCheckpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "vocab.json"])
@pytest.mark.parametrize("content", [b"", None])
def test_files_that_cannot_be_loaded_are_rejected(tmp_path: Path, name: str, content: bytes | None) -> None:
    file = write_encoder(tmp_path, "group") / name
    file.unlink() if content is None else file.write_bytes(content)
    message = r"must contain a valid checkpoint of Wav2Vec2ForCTC with its tokenizer \(got config.json, "
    with pytest.raises(CheckpointError, match=message):
        Wav2Vec2.load(SpeechCheckpoint.open(tmp_path), CPU, torch.float32)
