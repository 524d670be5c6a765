"""Plots the training log: `python -m demo.plot_curve` reads demo/training/log.jsonl and writes curve.png next to it.

Needs matplotlib, from the extra `benchmark`.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

CURVES = {  # key in the log: label and colour
    "labels": ("label of a visual token (training)", "#aac8eb"),
    "held_out_labels": ("label of a visual token", "#1976d2"),
    "taps_right": ("whole answer of a tap (training)", "#f5bea0"),
    "held_out_Tap": ("whole answer of a Tap", "#d84315"),
    "held_out_Launch": ("whole answer of a Launch", "#00897b"),
    "held_out_Type": ("whole answer of a Type", "#7b1fa2"),
    "held_out_finish": ("whole answer of a finish", "#5a5a5a"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--log", type=Path, default=Path("demo/training/log.jsonl"))
    log: Path = parser.parse_args().log
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    axes = figure.add_subplot(title="Accuracy over training steps, on held-out screens unless marked (training)")
    for key, (label, color) in CURVES.items():
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, label=label, linewidth=2 if "held_out" in key else 1)
    joins = next((line["step"] for line in lines if "taps_right" in line), None)
    if joins is not None:
        axes.axvline(joins, color="#787878")
        axes.annotate(" language model training begins", (joins, 0), color="#787878")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(log.with_name("curve.png"), dpi=100)


if __name__ == "__main__":
    main()
