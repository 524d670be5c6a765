"""What 8 bits cost: how it is counted, and that the README says what was found."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from autoglm.config import load_config
from demo.evaluate import Question, Verdict
from demo.quality import FIRST, SETTINGS, SMALLER, summarise, table

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Asked:
    """As much of a question as counts here."""

    task: Any


@dataclass(frozen=True)
class Task:
    target: object | None


def test_counting() -> None:
    asked = cast(list[Question], [Asked(Task("box")), Asked(Task("box")), Asked(Task("box")), Asked(Task(None))])
    right, wrong = Verdict(True, True), Verdict(False, True)
    plain = [Verdict(True, True, (10, 20)), Verdict(True, True, (5, 5)), wrong, right]
    other = [Verdict(True, True, (14, 20)), wrong, Verdict(True, True, (1, 1)), wrong]
    found = summarise(other, plain, asked)
    assert found == {"taps": 3, "taps_right": 0.6667, "others": 1, "others_right": 0.0, "moved": 2.0}


def test_the_readme_shows_what_was_measured() -> None:
    results = json.loads((ROOT / "demo" / "training" / "quality.json").read_text(encoding="utf-8"))
    assert list(results) == list(SETTINGS)
    assert all(row["taps"] + row["others"] == 1000 for row in results.values())
    smaller = {name: results[name] for name in SMALLER}
    assert table(smaller) in (ROOT / "README.md").read_text(encoding="utf-8")
    plain = results[FIRST]
    for row in smaller.values():
        assert row["taps_right"] >= plain["taps_right"] - 0.01 and row["moved"] <= 2
    for name in ("topk 0.3", "pages 0.3"):
        assert results[name]["taps_right"] >= plain["taps_right"] - 0.005


@pytest.mark.parametrize("path", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_choose_what_costs_less_than_a_point(path: Path) -> None:
    results = json.loads((ROOT / "demo" / "training" / "quality.json").read_text(encoding="utf-8"))
    sparse = load_config(preset=path).sparse_attention
    assert sparse.mode != "off"
    found = results[f"{sparse.mode} {sparse.ratio}"]
    for share in ("taps_right", "others_right"):
        assert found[share] > results[FIRST][share] - 0.01
