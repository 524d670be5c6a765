"""Drawn actions: their positions, and their visibility on any background."""

import numpy as np
import pytest
from autoglm_client import Back, DoubleTap, Finish, Launch, LongPress, Point, Swipe, Tap, Type, Wait
from autoglm_client.actions import Action
from autoglm_client.draw import INK, draw
from numpy.typing import NDArray
from PIL import Image, ImageChops

SIZE = (540, 1200)
BACKGROUNDS = [(0, 0, 0), (255, 255, 255), (128, 128, 128), INK]
ACTIONS = [
    Tap(Point(500, 250)),
    DoubleTap(Point(500, 250)),
    LongPress(Point(500, 250)),
    Swipe(Point(500, 800), Point(500, 200)),
    Type("你好 hello"),
    Back(),
    Launch("微信"),
    Wait(),
    Finish(""),
]


def contrast(background: tuple[int, int, int], action: Action, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    """[height, width]: how far each pixel differs from the background, 0 to 255."""
    plain = Image.new("RGB", size, background)
    difference: NDArray[np.uint8] = np.asarray(ImageChops.difference(plain, draw(plain, action))).max(axis=2)
    return difference


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("action", ACTIONS, ids=str)
def test_actions_are_visible_on_any_background(background: tuple[int, int, int], action: Action) -> None:
    assert (contrast(background, action) > 100).sum() > 400


@pytest.mark.parametrize("point", [Point(0, 0), Point(500, 250), Point(999, 999)])
@pytest.mark.parametrize("size", [(90, 160), SIZE, (2400, 1080)])
def test_a_tap_is_drawn_only_around_its_point(point: Point, size: tuple[int, int]) -> None:
    changed = contrast((0, 0, 0), Tap(point), size) > 0
    x, y = point.to_pixels(size)
    assert changed[y, x]
    rows, columns = np.nonzero(changed)
    reach = max(20, min(size) / 12)
    assert max(abs(rows - y).max(), abs(columns - x).max()) <= reach


def test_a_swipe_is_an_arrow_from_start_to_end() -> None:
    changed = contrast((255, 255, 255), Swipe(Point(500, 800), Point(500, 200))) > 0
    assert changed[240:960, 270].all()
    assert not changed[:220].any()
    assert not changed[980:].any()
    widths = changed.sum(axis=1)
    assert widths[240:280].max() > widths[920:960].max() > widths[600]


def test_long_captions_stay_at_the_bottom() -> None:
    short = contrast((0, 0, 0), Type("你好"))
    long = contrast((0, 0, 0), Type("很长 " * 200))
    lines = contrast((0, 0, 0), Type("一\n二\n三"))
    for changed in (short, long, lines):
        assert not changed[: SIZE[1] * 3 // 4].any()
        assert not changed[:, 0].any()
        assert not changed[:, -1].any()
        assert not changed[-1].any()
    assert (lines > 0).sum() > (short > 0).sum()


def test_different_texts_look_different() -> None:
    assert (contrast((0, 0, 0), Type("abc")) != contrast((0, 0, 0), Type("abd"))).any()


def test_images_of_any_mode_are_copied() -> None:
    image = Image.new("P", (100, 100))
    before = image.tobytes()
    assert draw(image, Tap(Point(5, 5), "付款")).mode == "RGB"
    assert image.tobytes() == before
