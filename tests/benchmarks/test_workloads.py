"""The benchmarks end to end on the CPU with small sizes: only the form of their results is checked."""

import argparse
import json
import math
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from autoglm.kernels.reference import dispatch as reference
from autoglm.llm.engine import Engine
from benchmarks import constrained, decode, kernels, live, prefill, screenshot, speech, start, vision
from benchmarks.cases import Case, Cases
from benchmarks.engines import open_engine
from benchmarks.report import Row, report
from tests.audio.speech_checkpoints import write_encoder
from tests.conftest import Pair

GRID = (1, 8, 6)  # 12 image tokens


@pytest.fixture
def engine(plain: Pair) -> Iterator[Engine]:
    engine = open_engine(plain.checkpoint, "int8", kv_cache_mb=16, max_context=1024)
    yield engine
    engine.close()


def check(rows: list[Row], names: list[str], options: argparse.Namespace) -> None:
    """Rows have these names and plausible values, and the result file has the documented form."""
    assert [row.name for row in rows] == names
    for row in rows:
        assert row.setting == options.setting
        assert row.value > 0 and math.isfinite(row.value)
        assert row.share is None or row.share > 0
    content = json.loads(report(options, "some", rows).read_text())
    assert content.keys() == {"machine", "software", "commit", "date", "rows"}
    assert {"python", "torch"} <= content["software"].keys()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", content["date"])
    for row in content["rows"]:
        assert {"name", "setting", "value", "unit", "limit", "peer"} <= row.keys()


def test_decode(engine: Engine, options: argparse.Namespace) -> None:
    rows = [decode.decode(engine, options, batch, prompt=9, tokens=8) for batch in (1, 4)]
    check(rows, ["decode-1", "decode-4"], options)
    assert rows[0].limit is not None
    assert rows[0].peer == {"vLLM 0.26 INT8": 4.81, "vLLM 0.26 FP8": 4.34}
    assert rows[0].also["tokens/s"] == pytest.approx(1e3 / rows[0].value, rel=0.01)


def test_constrained(engine: Engine, options: argparse.Namespace) -> None:
    row = constrained.constrained(engine, options, prompt=9, tokens=6)
    check([row], ["constrained-16"], options)
    assert row.also["% over unconstrained"] > -100 and row.also["us computing masks"] > 0


def test_stream_gap(engine: Engine, options: argparse.Namespace) -> None:
    row = decode.stream_gap(engine, options, length=60, grid=GRID)
    check([row], ["stream-gap-ms"], options)
    assert row.value >= row.also["ms median gap"]


def test_prefill(engine: Engine, options: argparse.Namespace) -> None:
    rows = [
        prefill.screenshot(engine, options, length=40, grid=GRID),
        prefill.text(engine, options, 20),
        prefill.text(engine, options, 16, 3),
    ]
    check(rows, ["prefill-40", "prefill-20", "prefill-3x16"], options)


def test_vision(plain: Pair, options: argparse.Namespace) -> None:
    rows = vision.measure(plain.checkpoint, options, size=(84, 112), repeats=1)
    check(rows, ["vit-48", "png-to-embeddings", "png-to-embeddings-known"], options)
    assert rows[2].value < rows[1].value


def test_speech(options: argparse.Namespace, tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "encoder", "group")
    options.setting = "bf16"
    rows = speech.measure(encoder, options, num_samples=4000, repeats=1)
    check(rows, ["speech-1", "speech-16"], options)
    assert rows[1].limit and rows[0].limit and rows[1].limit > rows[0].limit


def test_screenshot(plain: Pair, options: argparse.Namespace) -> None:
    with closing(screenshot.Agent(plain.checkpoint, "int8", kv_cache_mb=16)) as agent:
        rows = screenshot.measure(agent, options, size=(84, 112), tokens=3, concurrency=2, repeats=1)
    check(rows, ["screenshot-first-token", "screenshot-3", "screenshot-2"], options)
    assert rows[2].unit == "requests/s"


def test_start(options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOGLM_OVERRIDES", "engine: {kv_cache_mb: 8}")
    rows = start.measure(options, warm_starts=1)
    check(rows, ["cold-start-s", "warm-start-s", "weights-gib"], options)
    assert rows[0].value == pytest.approx(sum(rows[0].also.values()), rel=0.01)


def test_transformers_runs_the_same_workload(engine: Engine, options: argparse.Namespace) -> None:
    options.setting = "bf16"
    row = prefill.text(engine, options, 12)

    def values(generate: live.Generate) -> dict[str, float]:
        prompts = prefill.text_prompts(engine.checkpoint, 12, 2)
        assert generate(prompts, 4) > 0
        return {row.name: generate(prompts, 1)}

    (with_peer,) = live.with_peers([row], engine.checkpoint, "bf16", values)
    assert with_peer.peer is not None
    assert [name.split()[0] for name in with_peer.peer] == ["transformers"]


@pytest.mark.parametrize("setting", ["int8", "bf16"])
def test_every_kernel_has_a_case_that_runs(plain: Pair, options: argparse.Namespace, setting: str) -> None:
    options.setting = setting
    text, device = plain.checkpoint.text, torch.device("cpu")
    cases = list(Cases(reference, text, device, torch.bfloat16, setting, spread=1).all((1, 3), 20, (1, 2), (5, 33)))
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        launches = case.make()
        assert len(launches) >= 3
        for launch in launches:
            launch()
        row = kernels.kernel_row(case, 1e-3, options)
        assert row.value == 1000 and row.limit is not None
        assert row.also["MB"] == pytest.approx(case.work.bytes / 1e6, rel=1e-3)
    assert {"qkv-1", "head-1", "decode-attention-2x33-fp8", "sample-2"} <= {case.name for case in cases}


def test_launches_spread_over_memory(plain: Pair) -> None:
    cases = Cases(reference, plain.checkpoint.text, torch.device("cpu"), torch.bfloat16, "int8", spread=10_000_000)
    case: Case = cases.product("qkv", 1)
    assert len(case.make()) == pytest.approx(10_000_000 / case.work.bytes, rel=0.1)


def test_kernels_need_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["kernels", "--checkpoint", "nowhere"])
    with pytest.raises(SystemExit) as end:
        kernels.main()
    assert end.value.code == 2
    assert "needs a CUDA device" in capsys.readouterr().err
