"""The kinds of screens, each a function that draws one with a Builder."""

from collections.abc import Callable

from demo import vocabulary
from demo.builder import Builder
from demo.canvas import ACCENTS, WIDTH, ink_on


def launcher(b: Builder) -> None:
    """A grid of applications on a wallpaper."""
    canvas, rng = b.canvas, b.rng
    if rng.random() < 0.6:
        wallpaper = [rng.randint(20, 235) for _ in range(3)]
        canvas.rectangle((0, 0, WIDTH, canvas.height), (wallpaper[0], wallpaper[1], wallpaper[2]))
        for _ in range(rng.randint(0, 4)):
            x, y, r = rng.uniform(0, WIDTH), rng.uniform(0, canvas.height), rng.uniform(40, 160)
            blob = [min(255, max(0, c + rng.randint(-25, 25))) for c in wallpaper]
            canvas.ellipse((x - r, y - r, x + r, y + r), (blob[0], blob[1], blob[2]))
        ink = ink_on((wallpaper[0], wallpaper[1], wallpaper[2]))
    else:
        ink = canvas.theme.text
    top = 40.0
    if rng.random() < 0.3:
        b.field_radius = rng.choice((8.0, 99.0))
        b.used.add("field:search")
        b.field((18, top + 4, WIDTH - 18, top + 52), "field:search", False, True)
        top += 66
    elif rng.random() < 0.4:
        canvas.text(WIDTH / 2, top + 34, f"{rng.randrange(24)}:{rng.randrange(60):02}", 46, ink, "mm")
        top += 80
    columns = rng.choice((3, 3, 4, 4))
    bottom = b.bottom - (rng.choice((0, 84)))
    cell_width, cell_height = WIDTH / columns, rng.uniform(98, 132)
    if bottom < b.bottom:
        for k in range(4):
            canvas.art((k * 90 + 18, b.bottom - 72, k * 90 + 72, b.bottom - 18), False)
    side, round_shape = rng.uniform(46, 58), rng.random() < 0.4
    size = rng.uniform(16, 19)
    while top + cell_height <= bottom:
        for k in range(columns):
            if rng.random() < 0.1:
                continue
            found = b.pick(vocabulary.APPS, cell_width - 4, size, 0.25)
            if not found:
                continue
            x = (k + 0.5) * cell_width
            canvas.art((x - side / 2, top + 8, x + side / 2, top + 8 + side), round_shape)
            mark = canvas.text(x, top + 8 + side + 15, found[0], found[1], ink, "mm")
            b.add(found[0], (k * cell_width + 2, top + 2, (k + 1) * cell_width - 2, top + side + 34), mark)
        top += cell_height


def settings(b: Builder) -> None:
    """A list with a title."""
    top = b.title_bar()
    bottom = b.tab_bar() if b.rng.random() < 0.25 else b.bottom
    b.rows(top, bottom)


def dialog(b: Builder) -> None:
    """A question over a dimmed screen."""
    canvas, rng = b.canvas, b.rng
    y = 60.0
    while y < b.bottom - 30:
        canvas.text(20, y, canvas.clutter(b.language, 6, 18), 14, canvas.theme.faint)
        y += rng.uniform(30, 60)
    veil = canvas.theme.line
    if rng.random() < 0.7:
        dim = rng.uniform(0.35, 0.8)
        red, green, blue = canvas.theme.background
        veil = (int(red * dim), int(green * dim), int(blue * dim))
        canvas.rectangle((0, 0, WIDTH, canvas.height), veil)
    count = rng.choice((1, 2, 2, 2, 3, 3, 4))
    stacked = count > 2 or rng.random() < 0.35
    tall = 90 + (count * 58 if stacked else 62) + rng.uniform(0, 90)
    top = rng.uniform(60, max(61, b.bottom - tall - 20))
    left = rng.uniform(16, 44)
    right = WIDTH - left
    canvas.rounded((left, top, right, top + tall), rng.choice((4, 14, 24)), canvas.theme.surface, veil)
    canvas.text(left + 18, top + 28, canvas.clutter(b.language, 3, 7), 18, canvas.theme.text)
    for k in range(rng.randint(1, 2)):
        canvas.text(left + 18, top + 56 + 20 * k, canvas.clutter(b.language, 8, 14), 13, canvas.theme.faint)
    bottom = top + tall
    filled = rng.random() < 0.5
    if stacked:
        for k in range(count):
            y = bottom - (count - k) * 58
            b.button((left + 16, y, right - 16, y + 48), vocabulary.BUTTONS, filled and k == 0)
    else:
        width = (right - left - 20) / count
        for k in range(count):
            x = left + 12 + k * width
            b.button((x, bottom - 60, x + width - 6, bottom - 12), vocabulary.BUTTONS, filled and k == count - 1)


def form(b: Builder) -> None:
    """Input fields, one of which may have the focus, with buttons below."""
    canvas, rng = b.canvas, b.rng
    top = b.title_bar(rng.random() < 0.7) + rng.uniform(8, 30)
    focused = rng.random() < 0.5
    if focused:
        b.keyboard()
    inside = rng.random() < 0.5
    b.field_radius = rng.choice((2.0, 8.0, 99.0))
    pitch = rng.uniform(60, 76) if inside else rng.uniform(88, 104)
    count = min(rng.randint(1, 4), int((b.bottom - top - 6) // pitch))
    names = rng.sample(vocabulary.FIELDS[b.language], max(1, count))
    chosen = rng.randrange(max(1, count)) if focused else -1
    for k, name in enumerate(names):
        b.used.add(name)
        y = top + k * pitch + (0 if inside else 28)
        b.field((20, y, WIDTH - 20, y + 50), name, k == chosen, inside)
    top += len(names) * pitch + 8
    while top + 54 <= b.bottom and rng.random() < 0.8:
        if rng.random() < 0.4:
            b.button((20, top, WIDTH / 2 - 6, top + 48), vocabulary.BUTTONS, rng.random() < 0.5)
            b.button((WIDTH / 2 + 6, top, WIDTH - 20, top + 48), vocabulary.BUTTONS, rng.random() < 0.5)
        else:
            b.button((20, top, WIDTH - 20, top + 48), vocabulary.BUTTONS, rng.random() < 0.7)
        top += rng.uniform(58, 80)
    if top + 30 < b.bottom and rng.random() < 0.5:
        canvas.text(24, top + 16, canvas.clutter(b.language, 6, 16), 12, canvas.theme.faint)


def search(b: Builder) -> None:
    """A search box above suggestions."""
    rng = b.rng
    b.field_radius = rng.choice((6.0, 99.0))
    left = 12.0
    if rng.random() < 0.5 and (name := b.pick_icon(("back", "menu", "close"))):
        b.icon_button(name, 28, 60, b.canvas.theme.text, rng.uniform(20, 25), 24)
        left = 56
    right = WIDTH - 12
    if rng.random() < 0.4 and (found := b.pick(vocabulary.BUTTONS, 60, 18)):
        mark = b.canvas.text(WIDTH - 40, 60, found[0], found[1], b.canvas.theme.accent, "mm")
        b.add(found[0], (WIDTH - 76, 36, WIDTH - 4, 84), mark)
        right = WIDTH - 80
    focused = rng.random() < 0.55
    if focused:
        b.keyboard()
    b.used.add("field:search")
    b.field((left, 36, right, 84), "field:search", focused, True)
    b.rows(96, b.bottom)


def cards(b: Builder) -> None:
    """Cards with a picture, a name and optionally a button, above tabs."""
    canvas, rng, theme = b.canvas, b.rng, b.canvas.theme
    bottom = b.tab_bar() if rng.random() < 0.8 else b.bottom
    top = b.title_bar(rng.random() < 0.6) + 8
    columns = rng.choice((1, 1, 2))
    height = rng.uniform(96, 128) if columns == 1 else rng.uniform(150, 200)
    radius = rng.choice((4.0, 12.0, 20.0))
    while top + height <= bottom:
        for k in range(columns):
            left = 12 + k * (WIDTH - 12) / columns
            right = (k + 1) * (WIDTH - 12) / columns
            canvas.rounded((left, top, right, top + height - 10), radius, theme.surface, theme.line)
            picture = height - 30 if columns == 1 else (right - left) * 0.45
            canvas.art((left + 10, top + 10, left + 10 + picture, top + 10 + picture), False)
            x = left + picture + 24 if columns == 1 else left + 12
            y = top + 26 if columns == 1 else top + picture + 30
            if found := b.pick(vocabulary.APPS, right - x - 8, canvas.body, 0.6):
                mark = canvas.text(x, y, found[0], found[1], theme.text)
                edge = top + height - 10 if columns == 2 else top + 44
                b.add(found[0], (left, top, right, edge) if columns == 2 else (x - 6, top, right, edge), mark)
            if columns == 1 and rng.random() < 0.6:
                wide = rng.uniform(90, 130)
                b.button((right - wide - 8, top + 46, right - 8, top + 82), vocabulary.BUTTONS, rng.random() < 0.6)
            elif columns == 1:
                canvas.text(x, y + 30, canvas.clutter(b.language, 5, 11), 12, theme.faint)
        top += height


def toolbar(b: Builder) -> None:
    """Icon buttons and a list."""
    canvas, rng, theme = b.canvas, b.rng, b.canvas.theme
    top = b.title_bar(rng.random() < 0.6, icons=rng.randint(1, 3)) + 10
    bottom = b.bottom
    if rng.random() < 0.6:
        count = rng.randint(3, 5)
        canvas.rectangle((0, bottom - 60, WIDTH, bottom), theme.surface)
        for k in range(count):
            if name := b.pick_icon():
                b.icon_button(name, (k + 0.5) * WIDTH / count, bottom - 30, theme.text, rng.uniform(24, 32), 28)
        bottom -= 64
    if rng.random() < 0.5 and (name := b.pick_icon(("plus", "search", "camera", "play"))):
        x, y = rng.choice((56.0, 180.0, 304.0)), bottom - 46
        color = rng.choice(ACCENTS)
        canvas.ellipse((x - 32, y - 32, x + 32, y + 32), color)
        b.icon_button(name, x, y, ink_on(color), rng.uniform(26, 34), 32)
        bottom -= 84
    if rng.random() < 0.6:
        canvas.art((20, top, WIDTH - 20, top + 120), False)
        top += 134
        if rng.random() < 0.7:
            for k in range(3):
                if name := b.pick_icon():
                    b.icon_button(name, 60 + k * 120, top + 30, theme.text, rng.uniform(28, 40), 32)
            top += 68
    b.rows(top, bottom)


# kind of screen -> (its weight among the kinds, its function)
LAYOUTS: dict[str, tuple[float, Callable[[Builder], None]]] = {
    "launcher": (2.0, launcher),
    "list": (2.0, settings),
    "dialog": (0.8, dialog),
    "form": (1.5, form),
    "search": (1.2, search),
    "cards": (1.6, cards),
    "toolbar": (1.5, toolbar),
}
