"""The encoder and the bridge: what training computes is what the server reads; and the committed ones work."""

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
from demo.evaluate import POINTED
from demo.speech.backends import SpeechLibrary
from demo.speech.graphs import Graphs
from demo.speech.measures import distance
from demo.speech.model import SpeechModel, band_filters, export, resume
from demo.speech.rooms import Heard, normalize
from demo.speech.voices import RATE

SPEECH = Path(__file__).parents[2] / "demo" / "speech"
LIMIT = 15_000_000


@pytest.fixture(scope="module")
def model() -> SpeechModel:
    torch.manual_seed(0)
    return SpeechModel(256).eval()


@pytest.fixture(scope="module")
def heard() -> Heard:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([9000, 20_000])
    sound = torch.randn(2, 20_000, generator=generator) * (torch.arange(20_000)[None] < lengths[:, None])
    return normalize(sound, lengths)


def test_filters_answer_to_their_own_band() -> None:
    filters = band_filters(192, 256)
    time = torch.arange(256) / RATE
    loudness = [
        (filters @ torch.sin(2 * math.pi * hertz * time)).view(48, 4).square().sum(1).argmax()
        for hertz in (200, 1000, 4000)
    ]
    assert loudness == sorted(loudness) and len({int(band) for band in loudness}) == 3
    assert filters.shape == (192, 256)


def test_the_server_reads_what_training_computes(model: SpeechModel, heard: Heard, tmp_path: Path) -> None:
    export(model, tmp_path, torch.float32)
    with torch.no_grad():
        said = model.listen(heard)
    encoder = Wav2Vec2.load(SpeechCheckpoint.open(tmp_path / "encoder"), torch.device("cpu"), torch.float32)
    bridge = Projector.load(tmp_path / "bridge", torch.device("cpu"), torch.float32)
    rows = [row[:length] for row, length in zip(heard.clips, heard.lengths.tolist(), strict=True)]
    features = encoder.encode(rows)
    assert [len(f) for f in features] == said.frames.tolist()
    for row, slots, expected in zip(bridge(features), said.slots.tolist(), said.embeddings, strict=True):
        assert len(row) == slots
        torch.testing.assert_close(row, expected[:slots], rtol=1e-3, atol=1e-4)
    assert len(encoder.transcribe(features)) == 2


def test_training_goes_on_from_what_was_written(model: SpeechModel, heard: Heard, tmp_path: Path) -> None:
    export(model, tmp_path, torch.float32)
    torch.manual_seed(1)
    other = SpeechModel(256).eval()
    resume(other, tmp_path)
    with torch.no_grad():
        assert torch.equal(other.listen(heard).labels, model.listen(heard).labels)
        assert torch.equal(other.listen(heard).embeddings, model.listen(heard).embeddings)


def test_gradients_reach_the_first_filters(model: SpeechModel, heard: Heard) -> None:
    said = model.listen(heard)
    (said.labels.square().mean() + said.embeddings.square().mean()).backward()  # type: ignore[no-untyped-call]
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
    for samples in (16_000, 24_000, 16_000):
        clips, lengths = torch.randn(2, samples, device="cuda"), torch.tensor([9000, samples])
        found = []
        for network in (graphs, torch.autocast("cuda", torch.bfloat16)(model)):
            model.zero_grad(set_to_none=True)
            said = model.listen(normalize(clips, lengths), network)
            (said.labels.float().square().mean() + said.embeddings.float().square().mean()).backward()  # type: ignore[no-untyped-call]
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            found.append([said.labels.clone(), said.embeddings.clone(), *gradients])
        assert len(found[0]) == len(found[1])
        for ours, expected in zip(*found, strict=True):
            scale = float(expected.float().abs().max())
            torch.testing.assert_close(ours.float(), expected.float(), rtol=0, atol=0.02 * scale + 1e-6)


def test_it_is_small_enough_to_be_committed(model: SpeechModel) -> None:
    assert 2 * sum(p.numel() for p in model.parameters()) < LIMIT


def test_the_committed_files_are_small() -> None:
    assert sum(file.stat().st_size for part in ("encoder", "bridge") for file in (SPEECH / part).iterdir()) < LIMIT


def test_what_was_measured_is_enough_and_is_what_the_readmes_say() -> None:
    measured = json.loads((SPEECH.parent / "training" / "speech_evaluation.json").read_text(encoding="utf-8"))
    assert measured["in process"] == measured["served through the ensemble over gRPC"]
    found = measured["in process"]
    taps, errors = found["bridge"]["taps"], found["transcript"]["error rate, all voices"]
    assert taps["right"] >= 0.9 and errors["en"] < 0.1 and errors["zh"] < 0.1
    shown = (SPEECH.parent / "README.md").read_text(encoding="utf-8")
    groups = {"taps: inside the target": "taps", "of these, in English": "taps en", "of these, in Chinese": "taps zh"}
    for title, group in groups.items():
        rates = (100 * found[mode][group]["right"] for mode in ("bridge", "transcript"))
        line = " | ".join(f"{rate:.1f} %" if rate < 100 else "100 %" for rate in rates)
        assert f"| {title} | {found['bridge'][group]['count']} | {line} |" in shown
    assert f"{100 * errors['en']:.1f} % of the English words and {100 * errors['zh']:.2f} %" in shown
    root = (SPEECH.parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"of {taps['count']} taps" in root and f"{100 * taps['right']:.1f}% inside the target" in root


@pytest.fixture(scope="module")
def backend(checkpoint_directory: Path) -> Iterator[SpeechLibrary]:
    backend = SpeechLibrary(checkpoint_directory, SPEECH)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def entries() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((SPEECH / "samples" / "samples.json").read_text(encoding="utf-8"))
    return found


def _files(entries: list[dict[str, Any]], screens: Path) -> list[tuple[bytes, bytes]]:
    sounds = SPEECH / "samples"
    return [((screens / entry["image"]).read_bytes(), (sounds / entry["sound"]).read_bytes()) for entry in entries]


def test_spoken_samples_are_done_through_the_bridge(
    backend: SpeechLibrary, entries: list[dict[str, Any]], samples_directory: Path
) -> None:
    for entry, reply in zip(entries, backend.hear(_files(entries, samples_directory), "bridge"), strict=True):
        action = reply.answer.partition("</think><answer>")[2]
        assert reply.transcript == ""
        if "box" not in entry:
            assert action == entry["action"], entry
            continue
        found = POINTED.fullmatch(action)
        assert found, (entry, reply)
        left, top, right, bottom = entry["box"]
        assert left <= int(found[2]) < right and top <= int(found[3]) < bottom, (entry, reply)


def test_spoken_samples_are_written_down(
    backend: SpeechLibrary, entries: list[dict[str, Any]], samples_directory: Path
) -> None:
    for entry, reply in zip(entries, backend.hear(_files(entries, samples_directory), "transcript"), strict=True):
        assert distance(entry["text"], reply.transcript) <= 0.1 * len(entry["text"]), (entry, reply)
