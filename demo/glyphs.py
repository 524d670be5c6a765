"""Icons, drawn as a few strokes in a square."""

import math
from collections.abc import Callable

from PIL import ImageDraw

Color = tuple[int, int, int]


class Pen:
    """Draws with one colour and line width in the unit coordinates of a square."""

    def __init__(
        self, draw: ImageDraw.ImageDraw, left: float, top: float, side: float, color: Color, weight: float
    ) -> None:
        self.draw, self.left, self.top, self.side, self.color = draw, left, top, side, color
        self.width = max(1, round(side * weight))

    def _at(self, points: tuple[float, ...]) -> list[float]:
        return [(self.left if i % 2 == 0 else self.top) + p * self.side for i, p in enumerate(points)]

    def line(self, *points: float) -> None:
        self.draw.line(self._at(points), self.color, self.width, joint="curve")

    def ring(self, *box: float) -> None:
        self.draw.ellipse(self._at(box), outline=self.color, width=self.width)

    def disc(self, *box: float) -> None:
        self.draw.ellipse(self._at(box), fill=self.color)

    def polygon(self, *points: float) -> None:
        self.draw.polygon(self._at(points), fill=self.color)

    def frame(self, *box: float) -> None:
        self.draw.rounded_rectangle(self._at(box), self.side * 0.1, outline=self.color, width=self.width)

    def arc(self, box: tuple[float, ...], start: float, end: float) -> None:
        self.draw.arc(self._at(box), start, end, self.color, self.width)


def _gear(pen: Pen) -> None:
    for k in range(8):
        c, s = math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)
        pen.line(0.5 + 0.3 * c, 0.5 + 0.3 * s, 0.5 + 0.48 * c, 0.5 + 0.48 * s)
    pen.ring(0.18, 0.18, 0.82, 0.82)
    pen.disc(0.38, 0.38, 0.62, 0.62)


def _star(pen: Pen) -> None:
    points: list[float] = []
    for k in range(10):
        r = 0.5 if k % 2 == 0 else 0.21
        points += [0.5 + r * math.sin(k * math.pi / 5), 0.53 - r * math.cos(k * math.pi / 5)]
    pen.polygon(*points)


def _search(pen: Pen) -> None:
    pen.ring(0.08, 0.08, 0.68, 0.68)
    pen.line(0.6, 0.6, 0.94, 0.94)


def _back(pen: Pen) -> None:
    pen.line(0.95, 0.5, 0.08, 0.5)
    pen.line(0.45, 0.12, 0.08, 0.5, 0.45, 0.88)


def _plus(pen: Pen) -> None:
    pen.line(0.5, 0.08, 0.5, 0.92)
    pen.line(0.08, 0.5, 0.92, 0.5)


def _heart(pen: Pen) -> None:
    pen.disc(0.04, 0.12, 0.54, 0.6)
    pen.disc(0.46, 0.12, 0.96, 0.6)
    pen.polygon(0.09, 0.48, 0.91, 0.48, 0.5, 0.95)


def _menu(pen: Pen) -> None:
    for y in (0.2, 0.5, 0.8):
        pen.line(0.06, y, 0.94, y)


def _close(pen: Pen) -> None:
    pen.line(0.12, 0.12, 0.88, 0.88)
    pen.line(0.88, 0.12, 0.12, 0.88)


def _home(pen: Pen) -> None:
    pen.line(0.03, 0.52, 0.5, 0.08, 0.97, 0.52)
    pen.line(0.18, 0.45, 0.18, 0.92, 0.82, 0.92, 0.82, 0.45)
    pen.line(0.5, 0.92, 0.5, 0.62)


def _person(pen: Pen) -> None:
    pen.disc(0.3, 0.04, 0.7, 0.44)
    pen.draw.pieslice(pen._at((0.1, 0.52, 0.9, 1.4)), 180, 360, fill=pen.color)


def _bell(pen: Pen) -> None:
    pen.draw.pieslice(pen._at((0.2, 0.06, 0.8, 0.7)), 180, 360, fill=pen.color)
    pen.polygon(0.2, 0.36, 0.8, 0.36, 0.92, 0.76, 0.08, 0.76)
    pen.disc(0.4, 0.78, 0.6, 0.98)


def _camera(pen: Pen) -> None:
    pen.frame(0.02, 0.22, 0.98, 0.9)
    pen.ring(0.3, 0.36, 0.7, 0.76)
    pen.line(0.32, 0.16, 0.68, 0.16)


def _dots(pen: Pen) -> None:
    for y in (0.16, 0.5, 0.84):
        pen.disc(0.4, y - 0.11, 0.62, y + 0.11)


def _play(pen: Pen) -> None:
    pen.polygon(0.18, 0.06, 0.95, 0.5, 0.18, 0.94)


GLYPHS: dict[str, Callable[[Pen], None]] = {
    "search": _search,
    "back": _back,
    "plus": _plus,
    "heart": _heart,
    "gear": _gear,
    "menu": _menu,
    "close": _close,
    "home": _home,
    "person": _person,
    "bell": _bell,
    "star": _star,
    "camera": _camera,
    "dots": _dots,
    "play": _play,
}
