"""What sparse attention saves and costs, as the README's table.

    python -m benchmarks.sparsity_table [--machine h200]

Times, memory and keys from benchmarks/results/<machine>-sparsity.json, the attention that is kept from
cpu-attention.json; the demo checkpoint's accuracy, which `demo.quality` has measured, from demo/training/quality.json.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.plot import Rows, number, read_rows
from benchmarks.report import RESULTS

QUALITY = Path(__file__).parents[1] / "demo" / "training" / "quality.json"
RATIOS = (0.5, 0.4, 0.3, 0.2)
SETTINGS = ("off", *(f"{mode} {ratio}" for mode in ("topk", "pages", "snap", "prune") for ratio in RATIOS))
COLUMNS = {  # rows whose figures share a cell
    "keys read": ("sparse-keys",),
    "attention kept": ("sparse-attention",),
    "KV memory, MiB": ("sparse-memory",),
    "prefill of 1 / 16 / 64, ms": ("sparse-prefill-1", "sparse-prefill-16", "sparse-prefill-64"),
    "a token of 1 / 16 / 64, ms": ("sparse-decode-1", "sparse-decode-16", "sparse-decode-64"),
}
WEIGHTS = {"sparse-attention": "bf16"}  # of the demo checkpoint; the others are INT8
PERCENT = ("sparse-keys", "sparse-attention")
DENSE = "unquantised"  # what `off` is called there


def table(rows: Rows, quality: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Lines of Markdown; without columns in which nothing was measured."""
    lines = {setting: list(cells(rows, quality, setting)) for setting in SETTINGS}
    heads = [*COLUMNS, "demo: taps right", "moved by, of 1000"]
    shown = [place for place in range(len(heads)) if any(line[place] for line in lines.values())]
    yield "| mode, ratio | " + " | ".join(heads[place] for place in shown) + " |"
    yield "|---" * (len(shown) + 1) + "|"
    for setting, line in lines.items():
        if any(line):
            yield f"| {setting} | " + " | ".join(line[place] for place in shown) + " |"


def cells(rows: Rows, quality: Mapping[str, Mapping[str, Any]], setting: str) -> Iterator[str]:
    for names in COLUMNS.values():
        yield cell(rows, setting, names)
    measured = quality.get(DENSE if setting == "off" else setting)
    yield f"{measured['taps_right']:.1%}" if measured else ""
    yield f"{measured['moved']:.2f}" if measured else ""


def cell(rows: Rows, setting: str, names: tuple[str, ...]) -> str:
    """The figures of a cell, nothing where one of them was not measured."""
    found = [row for name in names if (row := rows.get((name, f"{WEIGHTS.get(name, 'int8')} {setting}")))]
    if len(found) < len(names):
        return ""
    return " / ".join(f"{row.value:.0f}%" if row.name in PERCENT else number(row.value) for row in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--machine", default="h200", help="whose results (%(default)s)")
    options = parser.parse_args()
    quality = json.loads(QUALITY.read_text(encoding="utf-8"))
    rows = read_rows(RESULTS, "cpu") | read_rows(RESULTS, options.machine)
    print("\n".join(table(rows, quality)))


if __name__ == "__main__":
    main()
