"""Phone screens drawn from a seed, with the place and name of everything on them that a task can refer to."""

from __future__ import annotations

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
    """An image with its elements; no label occurs twice."""

    image: Image.Image
    elements: tuple[Element, ...]
    kind: str
    language: str


def draw_size(rng: random.Random, training: bool, among: tuple[tuple[int, int], ...] = SIZES) -> tuple[int, int]:
    """A phone's width and height in pixels; training also draws small ones, which cost less."""
    width, height = rng.choice(among)
    if training:
        small = rng.choices((360, 432, 540, 720, width), (30, 25, 30, 10, 5))[0]
        height, width = round(height * small / width), small
    return width, height


def render(seed: int, split: Split = "test", size: tuple[int, int] | None = None) -> Screen:
    """Draw the screen of `seed`; `size` is (width, height) in pixels, drawn from the seed when None.

    Training and test seeds never meet: the split is part of the seed.
    """
    rng = random.Random(f"{split}/{seed}")
    width, height = size or draw_size(rng, split == "train")
    kind = rng.choices(list(LAYOUTS), [weight for weight, _ in LAYOUTS.values()])[0]
    builder = Builder(Canvas(width, height, rng), rng, kind, split)
    LAYOUTS[kind][1](builder)
    return Screen(builder.canvas.image, tuple(builder.elements), kind, builder.language)
