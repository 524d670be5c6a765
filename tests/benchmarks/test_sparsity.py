"""The benchmark of sparse attention end to end on the CPU with small sizes."""

import argparse
import json
from typing import Any

import pytest
import torch

from autoglm.config import SparseAttentionConfig, SparseMode
from benchmarks import sparsity, sparsity_table
from benchmarks.attention_kept import MODES, attention_kept
from benchmarks.engines import image_prompt, open_engine
from benchmarks.plot import read_rows
from benchmarks.report import RESULTS, Row, report
from tests.conftest import Pair

GRID, LENGTH = (1, 16, 12), 120  # 48 image tokens


@pytest.mark.parametrize("mode", [None, "prune", "pages"])
def test_rows_of_a_mode(plain: Pair, options: argparse.Namespace, mode: SparseMode | None) -> None:
    config = SparseAttentionConfig("pages" if mode == "pages" else "off", min_batch=1)
    engine = open_engine(plain.checkpoint, "bf16", 16, sparse_attention=config, max_context=1024)
    options.setting = "bf16"
    sparse = None if mode is None else SparseAttentionConfig(mode, 0.25, dense_layers=1)
    try:
        measure = sparsity.Measure(engine, options, length=LENGTH, grid=GRID, tokens=24, repeats=1)
        rows = {row.name: row for row in measure.rows(sparse, (1, 2))}
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
    assert rows["sparse-keys"].value == {None: 100, "pages": 62.5, "prune": 25}[mode]
    num_blocks = 7 if mode == "prune" else 9  # of 16 tokens: the prompt's 120, or 84, and 12 to 24 of the answer
    block = 16 * 2 * 2 * 2 * 32 * 4 + (2 * 2 * 2 * 32 * 4 if mode == "pages" else 0)
    expected = [pytest.approx((num_blocks - i) * block, rel=0.01) for i in range(2)]
    assert rows["sparse-memory"].value * 2**20 in expected
    report(options, "sparsity", list(rows.values()))
    path = report(options, "sparsity", [Row("sparse-keys", "bf16 prune 0.5", 1.0, "%")])
    assert len(json.loads(path.read_text())["rows"]) == len(names) + 1


def test_kept_attention_grows_with_the_ratio(plain: Pair) -> None:
    torch.manual_seed(0)
    engine = open_engine(plain.checkpoint, "bf16", 16, max_context=1024)
    try:
        configs = {
            mode: [SparseAttentionConfig(mode, ratio, dense_layers=0) for ratio in (0.25, 0.5, 1.0)] for mode in MODES
        }
        every = [config for each in configs.values() for config in each]
        shares = attention_kept(engine, image_prompt(engine, LENGTH, GRID), every)
    finally:
        engine.close()
    assert len(shares) == 6
    for each in configs.values():
        low, half, whole = (shares[config] for config in each)
        assert 0 < low <= half < whole == pytest.approx(1)


def test_table() -> None:
    names = [name for names in sparsity_table.COLUMNS.values() for name in names]
    weights = {name: "bf16" if name == "sparse-attention" else "int8" for name in names}
    rows = {(name, f"{weights[name]} off"): Row(name, "", 12.3, "") for name in names}
    rows |= {(name, f"{weights[name]} prune 0.3"): Row(name, "", 45.6, "") for name in names[:-1]}
    quality: dict[str, dict[str, Any]] = {
        "unquantised": {"taps_right": 1, "moved": 0},
        "topk 0.2": {"taps_right": 0.9987, "moved": 0.456},
    }
    head, _, *lines = sparsity_table.table(rows, quality)
    assert lines == [
        "| off | 12% | 12% | 12.3 | 12.3 / 12.3 / 12.3 | 12.3 / 12.3 / 12.3 | 100.0% | 0.00 |",
        "| topk 0.2 |  |  |  |  |  | 99.9% | 0.46 |",
        "| prune 0.3 | 46% | 46% | 45.6 | 45.6 / 45.6 / 45.6 |  |  |  |",
    ]
    assert head.count("|") == lines[0].count("|")
    assert next(sparsity_table.table({}, quality)) == "| mode, ratio | demo: correct taps | mean tap shift, 1/1000 |"


def test_documentation_has_the_table(documentation: str) -> None:
    quality = json.loads(sparsity_table.QUALITY.read_text(encoding="utf-8"))
    rows = read_rows(RESULTS, "cpu") | read_rows(RESULTS, "h200")
    assert "\n".join(sparsity_table.table(rows, quality)) in documentation
