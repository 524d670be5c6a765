"""Drawing in density-independent units: every screen is 360 units wide."""

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from demo import vocabulary
from demo.fonts import CHINESE, LATIN, font
from demo.glyphs import GLYPHS, Color, Pen

Box = tuple[float, float, float, float]  # left, top, right, bottom

WIDTH = 360.0

ACCENTS: tuple[Color, ...] = (
    (25, 118, 210), (0, 137, 123), (216, 67, 21), (123, 31, 162), (194, 24, 91), (46, 125, 50), (69, 90, 100),
    (230, 81, 0), (48, 63, 159), (7, 160, 90), (200, 40, 40), (0, 131, 143),
)  # fmt: skip


def ink_on(color: Color) -> Color:
    """White or nearly black, whichever contrasts with `color`."""
    return (255, 255, 255) if 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2] < 150 else (20, 20, 24)


@dataclass(frozen=True, kw_only=True)
class Theme:
    """The colours of a screen."""

    background: Color
    surface: Color
    text: Color
    faint: Color
    line: Color
    accent: Color
    bar: Color
    bar_text: Color

    @staticmethod
    def pick(rng: random.Random) -> "Theme":
        accent = rng.choice(ACCENTS)
        style = rng.random()
        if style < 0.3:  # dark
            base = rng.randint(0, 40)
            background = (base, base, base + rng.randint(0, 12))
            surface = (base + 22, base + 22, base + 26)
            text, faint, line = (238, 238, 238), (140, 140, 146), (base + 48, base + 48, base + 50)
            accent = (min(255, accent[0] + 80), min(255, accent[1] + 80), min(255, accent[2] + 80))
        elif style < 0.85:  # light
            base = rng.randint(236, 255)
            background = (base, base, min(255, base + rng.randint(-6, 4)))
            surface = (255, 255, 255) if base < 250 else (245, 245, 248)
            text = (rng.randint(0, 40),) * 3
            faint, line = (150, 150, 150), (218, 218, 218)
        else:  # coloured
            tint = tuple(rng.randint(205, 245) for _ in range(3))
            background = (tint[0], tint[1], tint[2])
            surface = (min(255, tint[0] + 10), min(255, tint[1] + 10), min(255, tint[2] + 10))
            text, faint, line = (20, 20, 30), (110, 110, 120), (180, 180, 185)
        bar, bar_text = (accent, ink_on(accent)) if rng.random() < 0.3 else (background, text)
        return Theme(
            background=background, surface=surface, text=text, faint=faint, line=line, accent=accent, bar=bar,
            bar_text=bar_text,
        )  # fmt: skip


class Canvas:
    """The image of a screen while it is drawn, with its theme and fonts."""

    def __init__(self, width: int, height: int, rng: random.Random) -> None:
        self.rng = rng
        self.theme = Theme.pick(rng)
        self.scale = width / WIDTH
        self.height = height / self.scale
        self.image = Image.new("RGB", (width, height), self.theme.background)
        self.draw = ImageDraw.Draw(self.image)
        self.chinese = rng.choice(list(CHINESE))
        self.latin = rng.choice(list(LATIN))
        self.body = rng.uniform(17.0, 22.0)

    def _pixels(self, box: Box) -> tuple[float, float, float, float]:
        s = self.scale
        return (box[0] * s, box[1] * s, max(box[2] * s - 1, box[0] * s), max(box[3] * s - 1, box[1] * s))

    def rectangle(self, box: Box, fill: Color | None = None, outline: Color | None = None, line: float = 1.0) -> None:
        self.draw.rectangle(self._pixels(box), fill, outline, max(1, round(line * self.scale)))

    def rounded(
        self, box: Box, radius: float, fill: Color | None = None, outline: Color | None = None, line: float = 1.0
    ) -> None:
        radius = min(radius, (box[2] - box[0]) / 2, (box[3] - box[1]) / 2)
        self.draw.rounded_rectangle(
            self._pixels(box), radius * self.scale, fill, outline, max(1, round(line * self.scale))
        )

    def ellipse(self, box: Box, fill: Color) -> None:
        self.draw.ellipse(self._pixels(box), fill)

    def line(self, x1: float, y1: float, x2: float, y2: float, color: Color, width: float = 1.0) -> None:
        s = self.scale
        self.draw.line((x1 * s, y1 * s, x2 * s, y2 * s), color, max(1, round(width * s)))

    def _font(self, text: str, size: float) -> tuple[str, int]:
        name = self.latin if text.isascii() else self.chinese
        return name, max(6, round(size * self.scale))

    def text_width(self, text: str, size: float) -> float:
        return font(*self._font(text, size)).getlength(text) / self.scale

    def fit(self, text: str, size: float, width: float, smallest: float = 14.0) -> float | None:
        """The largest font size up to `size` at which `text` fits `width`; None if below `smallest`."""
        wide = self.text_width(text, size)
        if wide > width:
            size *= width / wide * 0.99
        return size if size >= smallest else None

    def text(self, x: float, y: float, text: str, size: float, color: Color, anchor: str = "lm") -> Box:
        """Draw `text` with its `anchor` (see Pillow) at (x, y); returns the box of its ink."""
        s = self.scale
        face = font(*self._font(text, size))
        self.draw.text((x * s, y * s), text, color, face, anchor)
        left, top, right, bottom = face.getbbox(text, anchor=anchor)
        return (x + left / s, y + top / s, x + right / s, y + bottom / s)

    def glyph(self, name: str, x: float, y: float, side: float, color: Color) -> Box:
        """Draw an icon centred at (x, y); returns its box."""
        s = self.scale
        weight = self.rng.uniform(0.09, 0.14)
        GLYPHS[name](Pen(self.draw, (x - side / 2) * s, (y - side / 2) * s, side * s, color, weight))
        return (x - side / 2, y - side / 2, x + side / 2, y + side / 2)

    def clutter(self, language: str, low: int, high: int) -> str:
        """A filler text, none of whose words is a label."""
        if language == "zh":
            return "".join(self.rng.choices(vocabulary.CLUTTER_ZH, k=self.rng.randint(low, high)))
        return " ".join(self.rng.choices(vocabulary.CLUTTER_EN, k=max(1, self.rng.randint(low, high) // 3)))

    def art(self, box: Box, round_shape: bool) -> None:
        """Draw a meaningless picture: the icon of an application or a photo."""
        rng = self.rng
        color = rng.choice(ACCENTS)
        if rng.random() < 0.3:
            color = (rng.randint(90, 255), rng.randint(90, 255), rng.randint(90, 255))
        self.rounded(box, 99 if round_shape else (box[2] - box[0]) * 0.24, color)
        ink = ink_on(color)
        x, y, side = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, min(box[2] - box[0], box[3] - box[1])
        kind = rng.randrange(5)
        if kind == 0:
            self.text(x, y, rng.choice("ABDEFGKMNPQRSTZ"), side * 0.6, ink, "mm")
        elif kind == 1:
            self.ellipse((x - side * 0.28, y - side * 0.28, x + side * 0.28, y + side * 0.28), ink)
            self.ellipse((x - side * 0.14, y - side * 0.14, x + side * 0.14, y + side * 0.14), color)
        elif kind == 2:
            for k in (-1, 0, 1):
                tall = rng.uniform(0.1, 0.3) * side
                self.rectangle((x + k * side * 0.18 - 2, y - tall, x + k * side * 0.18 + 3, y + side * 0.3), ink)
        elif kind == 3:
            self.ellipse((x - side * 0.3, y - side * 0.2, x + side * 0.08, y + side * 0.18), ink)
            self.ellipse((x - side * 0.05, y - side * 0.12, x + side * 0.3, y + side * 0.22), rng.choice(ACCENTS))
        else:
            self.rounded((x - side * 0.28, y - side * 0.2, x + side * 0.28, y + side * 0.22), side * 0.08, ink)
