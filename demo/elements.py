"""Elements of screens, and the (label, kind of screen) pairs held out from training."""

import zlib
from dataclasses import dataclass
from typing import Literal

from demo.canvas import Box

Role = Literal["target", "title", "field", "focused"]
Split = Literal["train", "test"]


@dataclass(frozen=True)
class Element:
    """An element that tasks can refer to. Boxes are fractions of the screen's width and height."""

    label: str  # one of vocabulary.labels()
    box: Box  # the area in which a tap is right
    mark: Box  # the area of its text or icon
    role: Role

    @property
    def center(self) -> tuple[int, int]:
        """(x, y) in thousandths of the screen, 0..999."""
        x, y = (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2
        return min(999, int(x * 1000)), min(999, int(y * 1000))


def held_out(label: str, kind: str) -> bool:
    """Whether a pair is held out from training: one in ten of those of apps, settings and buttons."""
    return zlib.crc32(f"{label}/{kind}".encode()) % 10 == 0
