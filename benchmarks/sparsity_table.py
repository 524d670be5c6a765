"""Speed, memory and accuracy of sparse attention as the documentation's table.

    python -m benchmarks.sparsity_table [--machine h200]

Reads benchmarks/results/<machine>-sparsity.json, cpu-attention.json, and the demo checkpoint's accuracy as measured by
`demo.quality`, demo/training/quality.json.
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
SETTINGS = ("off", *(f"{mode} {ratio}" for mode in ("topk", "pages", "prune") for ratio in RATIOS))
COLUMNS = {  # the rows of each cell
    "visual keys read": ("sparse-keys",),
    "attention kept": ("sparse-attention",),
    "KV cache, MiB": ("sparse-memory",),
    "prefill, batch 1 / 16 / 64, ms": ("sparse-prefill-1", "sparse-prefill-16", "sparse-prefill-64"),
    "time per output token, batch 1 / 16 / 64, ms": ("sparse-decode-1", "sparse-decode-16", "sparse-decode-64"),
}
WEIGHTS = {"sparse-attention": "bf16"}  # the demo checkpoint's; other rows are INT8
PERCENT = ("sparse-keys", "sparse-attention")
DENSE = "unquantised"  # the name of `off` in quality.json


def table(rows: Rows, quality: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Lines of Markdown, without empty columns and rows."""
    lines = {setting: list(cells(rows, quality, setting)) for setting in SETTINGS}
    heads = [*COLUMNS, "demo: correct taps", "mean tap shift, 1/1000"]
    shown = [column for column in range(len(heads)) if any(line[column] for line in lines.values())]
    yield "| mode, ratio | " + " | ".join(heads[column] for column in shown) + " |"
    yield "|---" * (len(shown) + 1) + "|"
    for setting, line in lines.items():
        if any(line):
            yield f"| {setting} | " + " | ".join(line[column] for column in shown) + " |"


def cells(rows: Rows, quality: Mapping[str, Mapping[str, Any]], setting: str) -> Iterator[str]:
    for names in COLUMNS.values():
        yield cell(rows, setting, names)
    measured = quality.get(DENSE if setting == "off" else setting)
    yield f"{measured['taps_right']:.1%}" if measured else ""
    yield f"{measured['moved']:.2f}" if measured else ""


def cell(rows: Rows, setting: str, names: tuple[str, ...]) -> str:
    """The figures of a cell; empty if one of them was not measured."""
    found = [row for name in names if (row := rows.get((name, f"{WEIGHTS.get(name, 'int8')} {setting}")))]
    if len(found) < len(names):
        return ""
    return " / ".join(f"{row.value:.0f}%" if row.name in PERCENT else number(row.value) for row in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--machine", default="h200", help="machine of the results (%(default)s)")
    options = parser.parse_args()
    quality = json.loads(QUALITY.read_text(encoding="utf-8"))
    rows = read_rows(RESULTS, "cpu") | read_rows(RESULTS, options.machine)
    print("\n".join(table(rows, quality)))


if __name__ == "__main__":
    main()
