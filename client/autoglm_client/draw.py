"""Draws actions on screenshots."""

import math
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from autoglm_client.actions import Action, DoubleTap, Finish, LongPress, Swipe, Tap

INK = (230, 0, 70)
# Every shape is drawn in three layers (dark, light, ink), each thinner, to be visible on any background.
DARK, LIGHT = (0, 0, 0), (255, 255, 255)

# Fonts with Chinese glyphs on Linux, Windows and macOS.
_FONTS = (
    "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf", "msyh.ttc", "PingFang.ttc", "DejaVuSans.ttf",
)  # fmt: skip

Pixel = tuple[float, float]


def draw(image: Image.Image, action: Action) -> Image.Image:
    """Draw `action` on an RGB copy of `image`.

    A tap is a ring (a double tap two, a long press a filled one), a swipe an arrow. A caption at the bottom has a tap's
    message, or the name and words of another action.
    """
    screen = image.convert("RGB")
    pen = ImageDraw.Draw(screen)
    unit = max(2.0, min(screen.size) / 150)  # shapes scale with the screen
    if isinstance(action, (Tap, DoubleTap, LongPress)):
        _ring(pen, action.element.to_pixels(screen.size), unit, action)
        caption = (action.message or "") if isinstance(action, Tap) else action.NAME
    elif isinstance(action, Swipe):
        _arrow(pen, action.start.to_pixels(screen.size), action.end.to_pixels(screen.size), unit)
        caption = ""
    else:
        words = [str(value) for value in action.arguments().values()]
        caption = ": ".join(["Finish" if isinstance(action, Finish) else action.NAME, *filter(None, words)])
    if caption:
        _caption(pen, screen.size, caption, unit)
    return screen


def _ring(pen: ImageDraw.ImageDraw, center: Pixel, unit: float, action: Action) -> None:
    radii = [5 * unit, 8 * unit] if isinstance(action, DoubleTap) else [6 * unit]
    for color, width in _layers(unit):
        for radius in radii:
            outer = radius + width / 2
            pen.ellipse(_square(center, outer), outline=color, width=max(1, round(width)))
    dot = 4 * unit if isinstance(action, LongPress) else unit
    for color, extra in ((DARK, unit), (LIGHT, unit / 2), (INK, 0.0)):
        pen.ellipse(_square(center, dot + extra), fill=color)


def _arrow(pen: ImageDraw.ImageDraw, start: Pixel, end: Pixel, unit: float) -> None:
    angle = math.atan2(end[1] - start[1], end[0] - start[0])
    head = 7 * unit
    barbs = [
        (end[0] - head * math.cos(angle + turn), end[1] - head * math.sin(angle + turn))
        for turn in (-math.pi / 6, math.pi / 6)
    ]
    for color, width in _layers(unit):
        for line in ((start, end), (barbs[0], end), (barbs[1], end)):
            pen.line(line, fill=color, width=max(1, round(width)))
            for tip in line:  # round ends
                pen.ellipse(_square(tip, width / 2), fill=color)
        pen.ellipse(_square(start, unit + width / 2), fill=color)


def _caption(pen: ImageDraw.ImageDraw, size: tuple[int, int], text: str, unit: float) -> None:
    width, height = size
    font = _font(max(12, round(6 * unit)))
    margin = 2 * unit
    lines = _wrapped(pen, text, font, width - 4 * margin)
    block = "\n".join(lines)
    left, top, right, bottom = pen.multiline_textbbox((0, 0), block, font=font)
    x, y = (width - (right - left)) / 2, height - (bottom - top) - 3 * margin
    box = (x - margin, y - margin, x + right - left + margin, y + bottom - top + margin)
    pen.rounded_rectangle(box, radius=margin, fill=INK, outline=LIGHT, width=max(1, round(unit / 2)))
    pen.multiline_text((x - left, y - top), block, font=font, fill=LIGHT)


def _layers(unit: float) -> tuple[tuple[tuple[int, int, int], float], ...]:
    """Colours and line widths, widest first."""
    return (DARK, 3 * unit), (LIGHT, 2 * unit), (INK, unit)


def _square(center: Pixel, radius: float) -> tuple[float, float, float, float]:
    return center[0] - radius, center[1] - radius, center[0] + radius, center[1] + radius


def _wrapped(pen: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """`text` in at most four lines of at most `width` pixels, broken anywhere (Chinese has no spaces)."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for character in paragraph:
            if line and pen.textlength(line + character, font=font) > width:
                lines.append(line)
                line = ""
            line += character
        lines.append(line)
    return lines if len(lines) <= 4 else [*lines[:3], lines[3][:-1] + "…"]


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)  # type: ignore[return-value]
