"""What stands on a screen, and which combinations training never sees."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

from demo.canvas import Box

Role = Literal["target", "title", "field", "focused"]
Split = Literal["train", "test"]


@dataclass(frozen=True)
class Element:
    """Something on a screen. Boxes are fractions of its width and height."""

    label: str  # one of vocabulary.labels()
    box: Box  # where a tap counts
    mark: Box  # where its text or icon is drawn
    role: Role

    @property
    def center(self) -> tuple[int, int]:
        """In thousandths, 0..999."""
        x, y = (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2
        return min(999, int(x * 1000)), min(999, int(y * 1000))


def held_out(label: str, kind: str) -> bool:
    """Whether training never shows `label` on screens of `kind` (one pair in ten of apps, settings and buttons)."""
    return zlib.crc32(f"{label}/{kind}".encode()) % 10 == 0
