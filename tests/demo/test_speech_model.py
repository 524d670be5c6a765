"""The speech encoder and the bridge: the server computes what training computes, and the committed ones work."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from autoglm.audio.checkpoint import SpeechCheckpoint
from autoglm.audio.projector import Projector
from autoglm.audio.wav2vec2 import Wav2Vec2
from demo.evaluate import TAP_ACTION
from demo.speech.backends import SpeechLibraryBackend
from demo.speech.graphs import Graphs
from demo.speech.measures import edit_distance
from demo.speech.model import SpeechModel, band_filters, export, resume
from demo.speech.rooms import ClipBatch, normalize
from demo.speech.voices import RATE

SPEECH = Path(__file__).parents[2] / "demo" / "speech"
LIMIT = 15_000_000


@pytest.fixture(scope="module")
def model() -> SpeechModel:
    torch.manual_seed(0)
    return SpeechModel(256).eval()


@pytest.fixture(scope="module")
def batch() -> ClipBatch:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([9000, 20_000])
    samples = torch.randn(2, 20_000, generator=generator) * (torch.arange(20_000)[None] < lengths[:, None])
    return normalize(samples, lengths)


def test_filters_respond_to_their_own_band() -> None:
    filters = band_filters(192, 256)
    time = torch.arange(256) / RATE
    loudness = [
        (filters @ torch.sin(2 * math.pi * hertz * time)).view(48, 4).square().sum(1).argmax()
        for hertz in (200, 1000, 4000)
    ]
    assert loudness == sorted(loudness) and len({int(band) for band in loudness}) == 3
    assert filters.shape == (192, 256)


def test_the_server_computes_what_training_computes(model: SpeechModel, batch: ClipBatch, tmp_path: Path) -> None:
    export(model, tmp_path, torch.float32)
    with torch.no_grad():
        output = model.encode(batch)
    encoder = Wav2Vec2.load(SpeechCheckpoint.open(tmp_path / "encoder"), torch.device("cpu"), torch.float32)
    bridge = Projector.load(tmp_path / "bridge", torch.device("cpu"), torch.float32)
    rows = [row[:length] for row, length in zip(batch.samples, batch.lengths.tolist(), strict=True)]
    features = encoder.encode(rows)
    assert [len(f) for f in features] == output.num_frames.tolist()
    for row, count, expected in zip(bridge(features), output.num_embeddings.tolist(), output.embeddings, strict=True):
        assert len(row) == count
        torch.testing.assert_close(row, expected[:count], rtol=1e-3, atol=1e-4)
    assert len(encoder.transcribe(features)) == 2


def test_training_resumes_from_an_export(model: SpeechModel, batch: ClipBatch, tmp_path: Path) -> None:
    export(model, tmp_path, torch.float32)
    torch.manual_seed(1)
    other = SpeechModel(256).eval()
    resume(other, tmp_path)
    with torch.no_grad():
        assert torch.equal(other.encode(batch).logits, model.encode(batch).logits)
        assert torch.equal(other.encode(batch).embeddings, model.encode(batch).embeddings)


def test_gradients_reach_the_first_filters(model: SpeechModel, batch: ClipBatch) -> None:
    output = model.encode(batch)
    (output.logits.square().mean() + output.embeddings.square().mean()).backward()  # type: ignore[no-untyped-call]
    gradient = model.encoder.wav2vec2.feature_extractor.conv_layers[0].conv.weight.grad
    assert gradient is not None and gradient.isfinite().all() and gradient.any()
    model.zero_grad(set_to_none=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_compute_what_the_model_computes() -> None:
    torch.manual_seed(0)
    model = SpeechModel(256).cuda()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    graphs = Graphs(model.train())
    for length in (16_000, 24_000, 16_000):
        samples, lengths = torch.randn(2, length, device="cuda"), torch.tensor([9000, length])
        results = []
        for network in (graphs, torch.autocast("cuda", torch.bfloat16)(model)):
            model.zero_grad(set_to_none=True)
            output = model.encode(normalize(samples, lengths), network)
            (output.logits.float().square().mean() + output.embeddings.float().square().mean()).backward()  # type: ignore[no-untyped-call]
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            results.append([output.logits.clone(), output.embeddings.clone(), *gradients])
        assert len(results[0]) == len(results[1])
        for ours, expected in zip(*results, strict=True):
            scale = float(expected.float().abs().max())
            torch.testing.assert_close(ours.float(), expected.float(), rtol=0, atol=0.02 * scale + 1e-6)


def test_the_model_is_small_enough_to_be_committed(model: SpeechModel) -> None:
    assert 2 * sum(p.numel() for p in model.parameters()) < LIMIT


def test_the_committed_files_are_small() -> None:
    assert sum(file.stat().st_size for part in ("encoder", "bridge") for file in (SPEECH / part).iterdir()) < LIMIT


def test_the_documentation_shows_the_measurements() -> None:
    measured = json.loads((SPEECH.parent / "training" / "speech_evaluation.json").read_text(encoding="utf-8"))
    assert measured["in process"] == measured["served through the ensemble over gRPC"]
    results = measured["in process"]
    taps, errors = results["bridge"]["taps"], results["transcript"]["error rate, all voices"]
    assert taps["right"] >= 0.9 and errors["en"] < 0.1 and errors["zh"] < 0.1
    readme = (SPEECH.parent / "README.md").read_text(encoding="utf-8")
    groups = {"taps: inside the target": "taps", "of these, in English": "taps en", "of these, in Chinese": "taps zh"}
    for title, group in groups.items():
        rates = (100 * results[mode][group]["right"] for mode in ("bridge", "transcript"))
        line = " | ".join(f"{rate:.1f}%" for rate in rates)
        assert f"| {title} | {results['bridge'][group]['count']} | {line} |" in readme
    assert f"{100 * errors['en']:.1f}% of the English words and {100 * errors['zh']:.2f}%" in readme
    docs = (SPEECH.parents[1] / "docs" / "speech.md").read_text(encoding="utf-8")
    assert f"{100 * taps['right']:.1f}% of {taps['count']} taps are inside the target" in docs


@pytest.fixture(scope="module")
def backend(checkpoint_directory: Path) -> Iterator[SpeechLibraryBackend]:
    backend = SpeechLibraryBackend(checkpoint_directory, SPEECH)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def entries() -> list[dict[str, Any]]:
    samples: list[dict[str, Any]] = json.loads((SPEECH / "samples" / "samples.json").read_text(encoding="utf-8"))
    return samples


def _files(entries: list[dict[str, Any]], screens: Path) -> list[tuple[bytes, bytes]]:
    clips = SPEECH / "samples"
    return [((screens / entry["image"]).read_bytes(), (clips / entry["audio"]).read_bytes()) for entry in entries]


def test_sample_clips_are_answered_correctly_through_the_bridge(
    backend: SpeechLibraryBackend, entries: list[dict[str, Any]], samples_directory: Path
) -> None:
    replies = backend.answer_clips(_files(entries, samples_directory), "bridge")
    for entry, reply in zip(entries, replies, strict=True):
        action = reply.answer.partition("</think><answer>")[2]
        assert reply.transcript == ""
        if "box" not in entry:
            assert action == entry["action"], entry
            continue
        tap = TAP_ACTION.fullmatch(action)
        assert tap, (entry, reply)
        left, top, right, bottom = entry["box"]
        assert left <= int(tap[2]) < right and top <= int(tap[3]) < bottom, (entry, reply)


def test_sample_clips_are_transcribed(
    backend: SpeechLibraryBackend, entries: list[dict[str, Any]], samples_directory: Path
) -> None:
    replies = backend.answer_clips(_files(entries, samples_directory), "transcript")
    for entry, reply in zip(entries, replies, strict=True):
        assert edit_distance(entry["text"], reply.transcript) <= 0.1 * len(entry["text"]), (entry, reply)
