"""Draws phone screens from seeds, with the labels and boxes of their elements."""

import random
from dataclasses import dataclass

from PIL import Image

from demo.builder import Builder
from demo.canvas import Canvas
from demo.elements import Element, Split
from demo.layouts import LAYOUTS

SIZES = ((1080, 2400), (1080, 1920), (720, 1600), (1080, 2340), (1440, 3200), (1220, 2712), (720, 1280))


@dataclass(frozen=True)
class Screen:
    """An image with its elements, whose labels are distinct. `kind` is a key of LAYOUTS."""

    image: Image.Image
    elements: tuple[Element, ...]
    kind: str
    language: str


def draw_size(rng: random.Random, training: bool, among: tuple[tuple[int, int], ...] = SIZES) -> tuple[int, int]:
    """Draw the width and height of a screen in pixels. Training mostly uses smaller, cheaper ones."""
    width, height = rng.choice(among)
    if training:
        small = rng.choices((360, 432, 540, 720, width), (30, 25, 30, 10, 5))[0]
        height, width = round(height * small / width), small
    return width, height


def render(seed: int, split: Split = "test", size: tuple[int, int] | None = None) -> Screen:
    """Draw the screen of a seed; the splits have different screens for the same seed.

    Args:
        size: (width, height) in pixels; None draws it from the seed.
    """
    rng = random.Random(f"{split}/{seed}")
    width, height = size or draw_size(rng, split == "train")
    kind = rng.choices(list(LAYOUTS), [weight for weight, _ in LAYOUTS.values()])[0]
    builder = Builder(Canvas(width, height, rng), rng, kind, split)
    LAYOUTS[kind][1](builder)
    return Screen(builder.canvas.image, tuple(builder.elements), kind, builder.language)
