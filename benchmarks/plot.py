"""The results as a chart and as a Markdown table for the documentation.

    python -m benchmarks.plot [--machine h200] [--table]

Reads benchmarks/results/<machine>-*.json. Writes docs/benchmarks.svg (needs matplotlib, from the extra `benchmark`), or
prints the table with --table.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import RATES, RESULTS, Result, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHART = Path(__file__).parents[1] / "docs" / "benchmarks.svg"
TITLES = {
    "decode-1": "time per output token, batch 1",
    "decode-16": "time per output token, batch 16",
    "decode-64": "time per output token, batch 64",
    "prefill-128": "prefill, 128 tokens",
    "prefill-3422": "prefill, 3,422 tokens with image embeddings",
    "vit-13416": "ViT, screenshot of 13,416 patches",
    "png-to-embeddings": "PNG screenshot to embeddings",
    "png-to-embeddings-known": "PNG screenshot to embeddings, cached",
    "screenshot-first-token": "screenshot, time to first token",
    "screenshot-65": "screenshot, 65 output tokens",
    "screenshot-16": "16 concurrent screenshots",
    "screenshot-first-token-grpc": "screenshot, time to first token, over gRPC",
    "screenshot-65-grpc": "screenshot, 65 output tokens, over gRPC",
    "screenshot-16-grpc": "16 concurrent screenshots, over gRPC",
    "speech-1": "wav2vec2-base, 10 s clip to embeddings",
    "speech-16": "wav2vec2-base, batch of 16 clips",
    "stream-gap-ms": "longest inter-token latency during a prefill",
    "gpu-idle-share": "GPU idle time, batch 1",
    "weights-gib": "GPU memory of weights, ViT included",
    "warm-start-s": "start, warm caches",
    "cold-start-s": "start, cold caches",
}
NOT_DRAWN = ("png-to-embeddings-known", "stream-gap-ms", "gpu-idle-share", "cold-start-s")
DRAWN = [name for name in TITLES if name not in NOT_DRAWN]
TEXT, OURS, OTHERS = "#848d97", "#1f9d6b", "#a5adb8"  # readable on white and on black
COLUMNS, PANEL = 2, (5.2, 1.15)  # inches
MIN_BARS = 4  # height of a panel

Rows = Mapping[tuple[str, str], Row]


def read_rows(folder: Path, machine: str) -> dict[tuple[str, str], Row]:
    """All rows of a machine by name and setting."""
    results = [Result.read(path) for path in sorted(folder.glob(f"{machine}-*.json"))]
    return {(row.name, row.setting): row for result in results for row in result.rows}


def table(rows: Rows) -> Iterator[str]:
    """Lines of Markdown, for int8 and then bf16."""
    yield "| | weights | this engine | others | roofline | of roofline |"
    yield "|---|---|---|---|---|---|"
    for name, title in TITLES.items():
        for setting in ("int8", "bf16"):
            row = rows.get((name, setting))
            if row is not None:
                others = ", ".join(f"{peer} {number(value)}" for peer, value in (row.peer or {}).items())
                limit = "" if row.limit is None else number(row.limit)
                share = "" if row.share is None else f"{row.share:.0%}"
                value = f"**{number(row.value)} {row.unit}**".replace(" %", "%")
                yield f"| {title} | {setting} | {value} | {others} | {limit} | {share} |"


def number(value: float) -> str:
    """At least three significant digits, without decimals from 100."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def drawn_rows(rows: Rows) -> list[Row]:
    """The int8 rows of the chart."""
    return [row for name in DRAWN if (row := rows.get((name, "int8"))) is not None]


def draw(rows: Rows) -> Any:
    """A matplotlib figure with a panel for each row: this engine, its peers and the roofline."""
    from matplotlib.figure import Figure

    shown = drawn_rows(rows)
    lines = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * PANEL[0], lines * PANEL[1]), layout="constrained")
    panels = list(figure.subplots(lines, COLUMNS, squeeze=False).flat)
    for row, panel in zip(shown, panels, strict=False):
        draw_panel(panel, row)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    return figure


def draw_panel(panel: "Axes", row: Row) -> None:
    bars = [
        ("this engine", row.value, OURS, OURS),
        *((name, value, OTHERS, OTHERS) for name, value in (row.peer or {}).items()),
    ]
    if row.limit is not None:
        bars.append(("roofline", row.limit, "none", TEXT))
    for index, (_, value, fill, edge) in enumerate(bars):
        panel.barh(index, value, height=0.7, color=fill, edgecolor=edge, linewidth=1)
        panel.text(value, index, f" {number(value)}", va="center", fontsize=8, color=TEXT)
    panel.set_yticks(range(len(bars)), [name for name, *_ in bars])
    panel.set_ylim(max(MIN_BARS, len(bars)) - 0.5, -0.5)
    better = ", higher is better" if row.unit in RATES else ""
    panel.set_title(f"{TITLES[row.name]}: {row.unit}{better}", fontsize=9, color=TEXT, loc="left")
    panel.margins(x=0.12)
    panel.tick_params(colors=TEXT, labelsize=8, length=0, labelbottom=False)
    for side in panel.spines.values():
        side.set_visible(False)


def save(rows: Rows, machine: str, path: Path) -> None:
    """Write the chart as SVG, reproducibly, with a title and a description for screen readers."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "benchmarks", "font.family": "sans-serif"}):
        draw(rows).savefig(path, transparent=True, metadata={"Date": None})
    values = "; ".join(f"{TITLES[row.name]}: {number(row.value)} {row.unit}" for row in drawn_rows(rows))
    head = f"<title>Benchmarks on {machine}</title><desc>{values}</desc>"
    text = path.read_text(encoding="utf-8")
    start = text.index("<svg")
    end = text.index(">", start) + 1
    opening = text[start : end - 1] + ' role="img">'
    path.write_text(text[:start] + opening + head + text[end:], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--machine", default="h200", help="machine of the results (%(default)s)")
    parser.add_argument("--table", action="store_true", help="print the table")
    options = parser.parse_args()
    rows = read_rows(RESULTS, options.machine)
    if options.table:
        print("\n".join(table(rows)))
    else:
        save(rows, options.machine, CHART)
        print(f"wrote {CHART}")


if __name__ == "__main__":
    main()
