"""Draws the parts of screens and records their elements."""

import random

from demo import vocabulary
from demo.canvas import WIDTH, Box, Canvas, ink_on
from demo.elements import Element, Role, Split, held_out
from demo.glyphs import Color

# Groups for labels that are not typical of their place; applications are twice as likely.
GROUPS = (vocabulary.APPS, vocabulary.SETTINGS, vocabulary.BUTTONS, vocabulary.APPS, vocabulary.TABS)
Words = dict[str, list[str]]  # by language


class Builder:
    """A screen while it is built: its canvas, its elements so far, and the parts that layouts share."""

    # Style of the screen's lists and fields.
    pictures = False
    round_pictures = False
    field_radius = 8.0

    def __init__(self, canvas: Canvas, rng: random.Random, kind: str, split: Split) -> None:
        self.canvas, self.rng, self.kind, self.split = canvas, rng, kind, split
        self.language = rng.choice(vocabulary.LANGUAGES)
        self.elements: list[Element] = []
        self.used: set[str] = set()
        self.bottom = canvas.height
        self._system_bars()

    # --- labels

    def pick(self, group: Words, width: float, size: float, mixed: float = 0.3) -> tuple[str, float] | None:
        """An unused label that fits `width`, and its font size; sometimes of another group or language."""
        rng = self.rng
        for _ in range(12):
            language = self.language if rng.random() < 0.9 else rng.choice(vocabulary.LANGUAGES)
            pool = rng.choice(GROUPS) if rng.random() < mixed else group
            label = rng.choice(pool[language])
            if label in self.used or self._never_trained(label, pool):
                continue
            fitted = self.canvas.fit(label, size, width)
            if fitted is not None:
                self.used.add(label)
                return label, fitted
        return None

    def _never_trained(self, label: str, pool: Words) -> bool:
        narrow = pool is vocabulary.FIELDS or pool is vocabulary.TABS
        return self.split == "train" and not narrow and held_out(label, self.kind)

    def pick_icon(self, among: tuple[str, ...] = ()) -> str | None:
        """The name of an unused icon."""
        names = [name for name in among or vocabulary.ICONS if f"icon:{name}" not in self.used]
        if not names:
            return None
        name = self.rng.choice(names)
        self.used.add(f"icon:{name}")
        return name

    def add(self, label: str, box: Box, mark: Box, role: Role = "target") -> None:
        height = self.canvas.height

        def relative(b: Box) -> Box:
            return (
                min(max(b[0] / WIDTH, 0.0), 1.0),
                min(max(b[1] / height, 0.0), 1.0),
                min(max(b[2] / WIDTH, 0.0), 1.0),
                min(max(b[3] / height, 0.0), 1.0),
            )

        self.elements.append(Element(label, relative(box), relative(mark), role))

    # --- parts

    def _system_bars(self) -> None:
        canvas, rng = self.canvas, self.rng
        ink = canvas.theme.text
        canvas.text(14, 12, f"{rng.randrange(24)}:{rng.randrange(60):02}", 11, ink)
        canvas.rounded((326, 7, 346, 17), 2, outline=ink)
        canvas.rectangle((327, 8, 327 + rng.uniform(3, 18), 16), ink)
        if rng.random() < 0.7:
            canvas.text(318, 12, rng.choice(("5G", "4G", "LTE", "100%", "87%", "42%")), 10, ink, "rm")
        if rng.random() < 0.6:
            self.bottom -= 16
            canvas.rounded((125, canvas.height - 9, 235, canvas.height - 5), 2, ink)
        else:
            self.bottom -= 38
            y = canvas.height - 18
            canvas.line(92, y, 106, y - 8, ink, 1.5)
            canvas.line(92, y, 106, y + 8, ink, 1.5)
            canvas.rounded((172, y - 7, 187, y + 8), 8, outline=ink, line=1.5)
            canvas.rectangle((256, y - 6, 268, y + 6), outline=ink, line=1.5)

    def title_bar(self, titled: bool = True, icons: int | None = None) -> float:
        """Draw a bar with an optional back arrow, title and icons; returns its lower edge."""
        canvas, rng = self.canvas, self.rng
        top, bottom = 26.0, 26 + rng.uniform(46, 62)
        canvas.rectangle((0, top, WIDTH, bottom), canvas.theme.bar)
        middle, left, right = (top + bottom) / 2, 16.0, WIDTH - 10
        if rng.random() < 0.65 and (name := self.pick_icon(("back", "menu", "close", "back", "back"))):
            self.icon_button(name, 26, middle, canvas.theme.bar_text, rng.uniform(20, 26), 24)
            left = 54
        for _ in range(rng.choice((0, 0, 1, 1, 2, 3)) if icons is None else icons):
            if name := self.pick_icon():
                self.icon_button(name, right - 18, middle, canvas.theme.bar_text, rng.uniform(20, 26), 22)
                right -= 46
        if titled and (found := self.pick(vocabulary.SETTINGS, right - left - 16, rng.uniform(20, 25), 0.5)):
            label, size = found
            if rng.random() < 0.3:
                middle_x = (left + right) / 2
                mark = canvas.text(middle_x, middle, label, size, canvas.theme.bar_text, "mm")
            else:
                mark = canvas.text(left + 4, middle, label, size, canvas.theme.bar_text)
            self.add(label, mark, mark, "title")
        if rng.random() < 0.4:
            canvas.line(0, bottom, WIDTH, bottom, canvas.theme.line)
        return bottom

    def icon_button(self, name: str, x: float, y: float, color: Color, side: float, reach: float) -> None:
        """Draw an icon centred at (x, y); its box extends `reach` in each direction."""
        mark = self.canvas.glyph(name, x, y, side, color)
        self.add(f"icon:{name}", (x - reach, y - reach, x + reach, y + reach), mark)

    def button(self, box: Box, group: Words, filled: bool) -> None:
        canvas = self.canvas
        found = self.pick(group, box[2] - box[0] - 14, self.rng.uniform(17, 21))
        if not found:
            return
        radius = self.rng.choice((4.0, 8.0, 99.0))
        color = ink_on(canvas.theme.accent) if filled else canvas.theme.accent
        canvas.rounded(box, radius, canvas.theme.accent if filled else None, None if filled else canvas.theme.line)
        mark = canvas.text((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, found[0], found[1], color, "mm")
        self.add(found[0], box, mark)

    def row(self, top: float, bottom: float) -> None:
        """Draw a row of a list: a label, and optionally a picture, small print, and a switch, arrow or value."""
        canvas, rng, theme = self.canvas, self.rng, self.canvas.theme
        left, right, middle = 18.0, WIDTH - 18.0, (top + bottom) / 2
        if self.pictures:
            side = min(36.0, bottom - top - 14)
            canvas.art((left, middle - side / 2, left + side, middle + side / 2), self.round_pictures)
            left += side + 12
        ending = rng.random()
        if ending < 0.3:
            on = rng.random() < 0.5
            canvas.rounded((right - 40, middle - 11, right, middle + 11), 99, theme.accent if on else theme.line)
            knob = right - 20 if on else right - 38
            canvas.ellipse((knob, middle - 9, knob + 18, middle + 9), (255, 255, 255))
            right -= 48
        elif ending < 0.7:
            canvas.line(right - 8, middle - 7, right - 1, middle, theme.faint, 2)
            canvas.line(right - 8, middle + 7, right - 1, middle, theme.faint, 2)
            right -= 18
            if ending > 0.55:
                canvas.text(right, middle, canvas.clutter(self.language, 2, 3), 12, theme.faint, "rm")
                right -= 60
        found = self.pick(vocabulary.SETTINGS, right - left - 8, canvas.body, 0.5)
        if not found:
            return
        small_print = bottom - top > 58 and rng.random() < 0.5
        y = middle - 9 if small_print else middle
        mark = canvas.text(left, y, found[0], found[1], theme.text)
        if small_print:
            canvas.text(left, middle + 14, canvas.clutter(self.language, 4, 14), 11.5, theme.faint)
        self.add(found[0], (0, top, WIDTH, bottom), mark)

    def rows(self, top: float, bottom: float) -> None:
        """Fill the space with the rows of a list."""
        canvas, rng = self.canvas, self.rng
        self.pictures, self.round_pictures = rng.random() < 0.5, rng.random() < 0.5
        height = rng.uniform(48, 78)
        lines = rng.random() < 0.6
        if rng.random() < 0.4:
            canvas.rounded((6, top + 2, WIDTH - 6, bottom), 12, canvas.theme.surface)
        while top + height <= bottom:
            if rng.random() < 0.92:
                self.row(top, top + height)
            if lines:
                canvas.line(18, top + height, WIDTH - 18, top + height, canvas.theme.line)
            top += height
            if rng.random() < 0.12:
                canvas.text(18, top + 13, canvas.clutter(self.language, 2, 6), 12, canvas.theme.faint)
                top += 26

    def tab_bar(self) -> float:
        """Draw tabs at the lower edge; returns their upper edge."""
        canvas, rng, theme = self.canvas, self.rng, self.canvas.theme
        bottom = self.bottom
        top = bottom - rng.uniform(54, 66)
        canvas.rectangle((0, top, WIDTH, bottom), theme.surface)
        canvas.line(0, top, WIDTH, top, theme.line)
        count = rng.choice((3, 4, 4, 5))
        active = rng.randrange(count)
        for k in range(count):
            left, right = k * WIDTH / count, (k + 1) * WIDTH / count
            color = theme.accent if k == active else theme.text
            if found := self.pick(vocabulary.TABS, right - left - 4, rng.uniform(16, 18), 0.25):
                x = (left + right) / 2
                canvas.rounded((x - 10, top + 6, x + 10, top + 24), rng.choice((3, 9)), None, color, 2)
                mark = canvas.text(x, bottom - 15, found[0], found[1], color, "mm")
                self.add(found[0], (left, top, right, bottom), mark)
        return top

    def keyboard(self) -> None:
        """Draw the keyboard; its upper edge becomes the bottom of the screen."""
        canvas, theme = self.canvas, self.canvas.theme
        top = self.bottom - self.rng.uniform(205, 250)
        dark = sum(theme.background) < 300
        canvas.rectangle((0, top, WIDTH, canvas.height), (45, 45, 50) if dark else (208, 211, 218))
        key, ink = ((75, 75, 80), (240, 240, 240)) if dark else ((250, 250, 250), (30, 30, 30))
        row = (self.bottom - top - 10) / 4
        for k, letters in enumerate(("qwertyuiop", "asdfghjkl", "zxcvbnm", "")):
            y = top + 6 + k * row
            pitch = 35.4
            left = (WIDTH - pitch * len(letters)) / 2
            for i, letter in enumerate(letters):
                canvas.rounded((left + i * pitch + 2, y + 2, left + (i + 1) * pitch - 2, y + row - 3), 4, key)
                canvas.text(left + (i + 0.5) * pitch, y + row / 2, letter, 16, ink, "mm")
        y = top + 6 + 3 * row
        canvas.rounded((90, y + 2, 270, y + row - 3), 4, key)
        self.bottom = top

    def field(self, box: Box, label: str, focused: bool, inside: bool) -> None:
        """Draw an input field with its name inside or above it."""
        canvas, rng, theme = self.canvas, self.rng, self.canvas.theme
        outline = theme.accent if focused else theme.line
        canvas.rounded(box, self.field_radius, theme.surface, outline, 2.5 if focused else 1.2)
        middle, left = (box[1] + box[3]) / 2, box[0] + 14
        name = vocabulary.name_of(label, self.language)
        if label == "field:search":
            mark = canvas.glyph("search", left + 8, middle, 18, theme.faint)
            left += 28
            mark = (mark[0], mark[1], left + 60, mark[3])
            if not focused:
                canvas.text(left, middle, canvas.clutter(self.language, 2, 6), 14, theme.faint)
        elif inside:
            mark = canvas.text(left, middle, name, canvas.body, theme.text if focused else theme.faint)
            left = mark[2] + 10
        else:
            mark = canvas.text(box[0] + 2, box[1] - 14, name, canvas.body, theme.text)
            if not focused and rng.random() < 0.4:
                canvas.text(left, middle, canvas.clutter(self.language, 3, 9), 14, theme.faint)
        if focused:
            canvas.line(left + 2, middle - 10, left + 2, middle + 10, theme.accent, 2)
        top = box[1] if inside or label == "field:search" else box[1] - 26
        self.add(label, (box[0], top, box[2], box[3]), mark, "focused" if focused else "field")
