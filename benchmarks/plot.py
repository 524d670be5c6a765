"""The results as a picture and as a table, both for the README.

    python -m benchmarks.plot [--machine h200] [--table]

Reads benchmarks/results/<machine>-*.json. Without --table it writes docs/benchmarks.svg (needs matplotlib, from the
extra `benchmark`); with it, it prints the README's table.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import RATES, RESULTS, Result, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = Path(__file__).parents[1] / "docs" / "benchmarks.svg"
TITLES = {
    "decode-1": "a token, 1 sequence",
    "decode-16": "a token, 16 sequences",
    "decode-64": "a token, 64 sequences",
    "prefill-128": "prompt of 128 tokens",
    "prefill-3422": "prompt of 3 422 tokens, image embedded",
    "vit-13416": "ViT of a screenshot, 13 416 patches",
    "png-to-embeddings": "PNG of a screenshot to embeddings",
    "png-to-embeddings-known": "the same, seen before",
    "screenshot-first-token": "screenshot, first token",
    "screenshot-65": "screenshot, 65 tokens",
    "screenshot-16": "16 screenshots at once",
    "screenshot-first-token-grpc": "screenshot, first token, served over gRPC",
    "screenshot-65-grpc": "screenshot, 65 tokens, served over gRPC",
    "screenshot-16-grpc": "16 screenshots at once, served over gRPC",
    "speech-1": "speech of 10 s to embeddings, wav2vec2-base",
    "speech-16": "the same, 16 clips at once",
    "stream-gap-ms": "longest gap in a stream beside a screenshot",
    "gpu-idle-share": "GPU idle, 1 sequence",
    "weights-gib": "weights on the GPU, ViT included",
    "warm-start-s": "start, weights cached",
    "cold-start-s": "start, nothing cached",
}
NOT_DRAWN = ("png-to-embeddings-known", "stream-gap-ms", "gpu-idle-share", "cold-start-s")
DRAWN = [name for name in TITLES if name not in NOT_DRAWN]
# To be read on white and on black.
TEXT, OURS, OTHERS = "#848d97", "#1f9d6b", "#a5adb8"
COLUMNS, PANEL = 2, (5.2, 1.15)  # inches
MOST_BARS = 4  # a panel has room for as many at least

Rows = Mapping[tuple[str, str], Row]


def read_rows(folder: Path, machine: str) -> dict[tuple[str, str], Row]:
    """All rows of a machine, by name and setting."""
    results = [Result.read(path) for path in sorted(folder.glob(f"{machine}-*.json"))]
    return {(row.name, row.setting): row for result in results for row in result.rows}


def table(rows: Rows) -> Iterator[str]:
    """Lines of Markdown: what, value, peers, limit and share of it, for int8 and then bf16."""
    yield "| | weights | here | others | limit | share of it |"
    yield "|---|---|---|---|---|---|"
    for name, title in TITLES.items():
        for setting in ("int8", "bf16"):
            row = rows.get((name, setting))
            if row is not None:
                others = ", ".join(f"{peer} {number(value)}" for peer, value in (row.peer or {}).items())
                limit = "" if row.limit is None else number(row.limit)
                share = "" if row.share is None else f"{row.share:.0%}"
                value = f"**{number(row.value)} {row.unit}**"
                yield f"| {title} | {setting} | {value} | {others} | {limit} | {share} |"


def number(value: float) -> str:
    """Three digits, or all that stand before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def drawn_rows(rows: Rows) -> list[Row]:
    """Those of int8 that are in the picture."""
    return [row for name in DRAWN if (row := rows.get((name, "int8"))) is not None]


def draw(rows: Rows) -> Any:
    """A figure with a panel for each of the main rows: ours, the peers', the limit."""
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
        ("here", row.value, OURS, OURS),
        *((name, value, OTHERS, OTHERS) for name, value in (row.peer or {}).items()),
    ]
    if row.limit is not None:
        bars.append(("limit", row.limit, "none", TEXT))
    for place, (_, value, fill, edge) in enumerate(bars):
        panel.barh(place, value, height=0.7, color=fill, edgecolor=edge, linewidth=1)
        panel.text(value, place, f" {number(value)}", va="center", fontsize=8, color=TEXT)
    panel.set_yticks(range(len(bars)), [name for name, *_ in bars])
    panel.set_ylim(max(MOST_BARS, len(bars)) - 0.5, -0.5)
    better = ", more is better" if row.unit in RATES else ""
    panel.set_title(f"{TITLES[row.name]}: {row.unit}{better}", fontsize=9, color=TEXT, loc="left")
    panel.margins(x=0.12)
    panel.tick_params(colors=TEXT, labelsize=8, length=0, labelbottom=False)
    for side in panel.spines.values():
        side.set_visible(False)


def save(rows: Rows, machine: str, path: Path) -> None:
    """Write the picture as SVG, the same file for the same rows, with a title and a description for screen readers."""
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
    parser.add_argument("--machine", default="h200", help="whose results (%(default)s)")
    parser.add_argument("--table", action="store_true", help="print the README's table")
    options = parser.parse_args()
    rows = read_rows(RESULTS, options.machine)
    if options.table:
        print("\n".join(table(rows)))
    else:
        save(rows, options.machine, PICTURE)
        print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
