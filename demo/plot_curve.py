"""Draws training's log: `python -m demo.plot_curve` reads demo/training/log.jsonl and writes curve.png beside it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 1200, 640
LEFT, TOP, RIGHT, BOTTOM = 70, 50, 960, 580
GREY = (120, 120, 120)

# name of a measure in the log -> (its name in the legend, colour)
CURVES = {
    "labels": ("label of a visual token (training)", (170, 200, 235)),
    "held_out_labels": ("label of a visual token", (25, 118, 210)),
    "taps_right": ("whole answer of a tap (training)", (245, 190, 160)),
    "held_out_Tap": ("whole answer of a Tap", (216, 67, 21)),
    "held_out_Launch": ("whole answer of a Launch", (0, 137, 123)),
    "held_out_Type": ("whole answer of a Type", (123, 31, 162)),
    "held_out_finish": ("whole answer of a finish", (90, 90, 90)),
}


def draw(lines: list[dict[str, Any]]) -> Image.Image:
    """Shares of right answers over steps, and where the language model joins."""
    image = Image.new("RGB", (WIDTH, HEIGHT), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    small, large = ImageFont.load_default(15), ImageFont.load_default(20)
    last = max(line["step"] for line in lines)

    def place(step: float, share: float) -> tuple[float, float]:
        return LEFT + (RIGHT - LEFT) * step / last, BOTTOM - (BOTTOM - TOP) * share

    pen.text((LEFT, 14), "Share that is right, over training steps (held-out screens unless said)", (0, 0, 0), large)
    for tenth in range(0, 11, 2):
        _, y = place(0, tenth / 10)
        pen.line((LEFT, y, RIGHT, y), (228, 228, 228))
        pen.text((LEFT - 10, y), f"{tenth * 10} %", GREY, small, "rm")
    for step in range(0, last + 1, 1000):
        x, _ = place(step, 0)
        pen.line((x, BOTTOM, x, BOTTOM + 5), GREY)
        pen.text((x, BOTTOM + 10), str(step), GREY, small, "ma")
    joins = next((line["step"] for line in lines if "taps_right" in line), None)
    if joins is not None:
        x, _ = place(joins, 0)
        pen.line((x, TOP, x, BOTTOM), GREY, 2)
        pen.text((x + 6, BOTTOM - 24), "the language model joins", GREY, small)
    for row, (key, (name, color)) in enumerate(CURVES.items()):
        points = [
            place(line["step"], line[key]) for line in lines if line.get(key) is not None and line[key] == line[key]
        ]
        if len(points) > 1:
            pen.line(points, color, 3 if key.startswith("held_out") else 1, joint="curve")
        y = TOP + 16 + 26 * row
        pen.line((RIGHT + 14, y, RIGHT + 34, y), color, 4)
        pen.text((RIGHT + 40, y), name, (0, 0, 0), ImageFont.load_default(13), "lm")
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, default=Path("demo/training/log.jsonl"))
    log: Path = parser.parse_args().log
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    draw(lines).save(log.with_name("curve.png"), optimize=True)


if __name__ == "__main__":
    main()
