"""The benchmark of sparse attention from end to end on the CPU, with small numbers."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from autoglm.config import SparseAttentionConfig
from autoglm.llm.sparse.policy import Mode, Sparsity
from benchmarks import sparsity, sparsity_table
from benchmarks.attention_kept import MODES, attention_kept
from benchmarks.engines import image_prompt, open_engine
from benchmarks.plot import read_rows
from benchmarks.report import RESULTS, Row, report
from tests.conftest import Pair

GRID, LENGTH = (1, 16, 12), 120  # 48 visual tokens


@pytest.fixture(autouse=True)
def weight_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOGLM_CACHE", str(tmp_path / "weights"))


@pytest.mark.parametrize("mode", [None, "snap", "prune", "pages"])
def test_rows_of_a_mode(plain: Pair, options: argparse.Namespace, mode: Mode | None) -> None:
    config = SparseAttentionConfig("pages" if mode == "pages" else "off", min_batch=1)
    engine = open_engine(plain.checkpoint, "bf16", 16, sparse_attention=config, max_context=1024)
    options.setting = "bf16"
    choice = None if mode is None else Sparsity(mode, 0.25, 1)
    try:
        measure = sparsity.Measure(engine, options, LENGTH, GRID, tokens=24, repeats=1)
        rows = {row.name: row for row in measure.rows(choice, (1, 2))}
    finally:
        engine.close()
    names = [
        "sparse-prefill-1",
        "sparse-decode-1",
        "sparse-prefill-2",
        "sparse-decode-2",
        "sparse-memory",
        "sparse-keys",
    ]
    assert list(rows) == names
    assert {row.setting for row in rows.values()} == {"bf16 off" if mode is None else f"bf16 {mode} 0.25"}
    assert rows["sparse-keys"].value == {None: 100, "pages": 62.5}.get(mode, 25)
    dense = 9 if mode in (None, "pages") else 7  # blocks of 16: 120 tokens, or 36 fewer, and 12 to 24 of the answer
    block = 16 * 2 * 2 * 2 * 32 * 4 + (2 * 2 * 2 * 32 * 4 if mode == "pages" else 0)
    assert rows["sparse-memory"].value * 2**20 in [pytest.approx((dense - i) * block, rel=0.01) for i in range(2)]
    report(options, "sparsity", list(rows.values()))
    report(options, "sparsity", [Row("sparse-keys", "bf16 snap 0.5", 1.0, "%")])  # which the others stay beside


def test_attention_that_is_kept(plain: Pair) -> None:
    torch.manual_seed(0)
    engine = open_engine(plain.checkpoint, "bf16", 16, max_context=1024)
    try:
        ratios = (0.25, 0.5, 1.0)
        choices = [Sparsity(mode, ratio, 0) for mode in MODES for ratio in ratios]
        kept = attention_kept(engine, image_prompt(engine, LENGTH, GRID), choices)
    finally:
        engine.close()
    assert set(kept) == set(choices)
    for mode in MODES:
        low, half, whole = (kept[Sparsity(mode, ratio, 0)] for ratio in ratios)
        assert 0 < low <= half < whole == pytest.approx(1)
    assert kept[Sparsity("topk", 0.25, 0)] > kept[Sparsity("snap", 0.25, 0)]  # another text chooses


def test_the_table() -> None:
    names = [name for names in sparsity_table.COLUMNS.values() for name in names]
    weights = {name: "bf16" if name == "sparse-attention" else "int8" for name in names}
    rows = {(name, f"{weights[name]} off"): Row(name, "", 12.3, "") for name in names}
    rows |= {(name, f"{weights[name]} snap 0.3"): Row(name, "", 45.6, "") for name in names[:-1]}
    quality: dict[str, dict[str, Any]] = {
        "unquantised": {"taps_right": 1, "moved": 0},
        "topk 0.2": {"taps_right": 0.9987, "moved": 0.456},
    }
    head, _, *lines = sparsity_table.table(rows, quality)
    assert lines == [
        "| off | 12% | 12% | 12.3 | 12.3 / 12.3 / 12.3 | 12.3 / 12.3 / 12.3 | 100.0% | 0.00 |",
        "| topk 0.2 |  |  |  |  |  | 99.9% | 0.46 |",
        "| snap 0.3 | 46% | 46% | 45.6 | 45.6 / 45.6 / 45.6 |  |  |  |",
    ]
    assert head.count("|") == lines[0].count("|")
    assert next(sparsity_table.table({}, quality)) == "| mode, ratio | demo: taps right | moved by, of 1000 |"


def test_the_readme_has_the_table() -> None:
    quality = json.loads(sparsity_table.QUALITY.read_text(encoding="utf-8"))
    rows = read_rows(RESULTS, "cpu") | read_rows(RESULTS, "h200")
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert "\n".join(sparsity_table.table(rows, quality)) in readme
