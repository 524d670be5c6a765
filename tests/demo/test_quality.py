"""The summary of quality measurements, and the documentation and presets that rely on them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from autoglm.config import load_config
from demo.evaluate import Question, Verdict
from demo.quality import BASELINE, QUANTIZED, SETTINGS, summarize, table

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class FakeQuestion:
    task: Any


@dataclass(frozen=True)
class FakeTask:
    target: object | None


def test_summary_counts_taps_and_others_separately() -> None:
    asked = cast(list[Question], [FakeQuestion(FakeTask(target)) for target in ("box", "box", "box", None)])
    right, wrong = Verdict(True, True), Verdict(False, True)
    baseline = [Verdict(True, True, (10, 20)), Verdict(True, True, (5, 5)), wrong, right]
    other = [Verdict(True, True, (14, 20)), wrong, Verdict(True, True, (1, 1)), wrong]
    expected = {"taps": 3, "taps_right": 0.6667, "others": 1, "others_right": 0.0, "moved": 2.0}
    assert summarize(other, baseline, asked) == expected


def test_the_documentation_shows_the_measurements() -> None:
    results = json.loads((ROOT / "demo" / "training" / "quality.json").read_text(encoding="utf-8"))
    assert list(results) == list(SETTINGS)
    assert all(row["taps"] + row["others"] == 1000 for row in results.values())
    quantized = {name: results[name] for name in QUANTIZED}
    assert table(quantized) in (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    baseline = results[BASELINE]
    for row in quantized.values():
        assert row["taps_right"] >= baseline["taps_right"] - 0.01 and row["moved"] <= 2
    for name in ("topk 0.3", "pages 0.3"):
        assert results[name]["taps_right"] >= baseline["taps_right"] - 0.005


@pytest.mark.parametrize("path", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_lose_less_than_one_point(path: Path) -> None:
    results = json.loads((ROOT / "demo" / "training" / "quality.json").read_text(encoding="utf-8"))
    sparse = load_config(preset=path).sparse_attention
    assert sparse.mode != "off"
    row = results[f"{sparse.mode} {sparse.ratio}"]
    for share in ("taps_right", "others_right"):
        assert row[share] > results[BASELINE][share] - 0.01
