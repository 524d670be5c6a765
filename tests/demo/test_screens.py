from collections import Counter

import numpy as np
import pytest

from demo import vocabulary
from demo.elements import held_out
from demo.fonts import FontsMissing, _files, require_fonts
from demo.screens import SIZES, Screen, render

pytestmark = pytest.mark.usefixtures("fonts")


@pytest.fixture(scope="module")
def screens() -> list[Screen]:
    return [render(seed, "test", (360, 800)) for seed in range(120)]


def test_screens_are_deterministic() -> None:
    for seed in range(5):
        first, second = render(seed), render(seed)
        assert first.elements == second.elements
        assert first.image.tobytes() == second.image.tobytes()


def test_splits_and_seeds_give_different_screens() -> None:
    assert render(1, "test", (360, 800)).elements != render(1, "train", (360, 800)).elements
    assert render(1, "test", (360, 800)).elements != render(2, "test", (360, 800)).elements


def test_the_layout_does_not_depend_on_the_resolution() -> None:
    small, large = render(7, "test", (360, 800)), render(7, "test", (1080, 2400))
    assert large.image.size == (1080, 2400)
    assert [e.label for e in small.elements] == [e.label for e in large.elements]
    for one, other in zip(small.elements, large.elements, strict=True):
        assert one.box == pytest.approx(other.box, abs=0.02)


def test_elements_are_on_the_screen_and_have_distinct_labels(screens: list[Screen]) -> None:
    for screen in screens:
        names = [element.label for element in screen.elements]
        assert len(names) == len(set(names))
        assert set(names) <= set(vocabulary.labels())
        for element in screen.elements:
            left, top, right, bottom = element.box
            assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
            x, y = element.center
            assert left * 1000 <= x < right * 1000 and top * 1000 <= y < bottom * 1000


def test_a_centre_is_in_the_box_of_one_element_only(screens: list[Screen]) -> None:
    for screen in screens:
        tappable = [element for element in screen.elements if element.role != "title"]
        for element in tappable:
            x, y = (value / 1000 for value in element.center)
            hit = [e.label for e in tappable if e.box[0] <= x < e.box[2] and e.box[1] <= y < e.box[3]]
            assert hit == [element.label]


def test_marks_contain_ink(screens: list[Screen]) -> None:
    for screen in screens[:40]:
        width, height = screen.image.size
        for element in screen.elements:
            left, top, right, bottom = element.mark
            mark = screen.image.crop(
                (int(left * width), int(top * height), int(right * width) + 1, int(bottom * height) + 1)
            )
            grey = np.asarray(mark.convert("L"))
            assert int(grey.max()) - int(grey.min()) > 30, (screen.kind, element)


def test_every_kind_language_and_role_occurs(screens: list[Screen]) -> None:
    assert len(Counter(screen.kind for screen in screens)) == 7
    assert {screen.language for screen in screens} == {"en", "zh"}
    roles = {element.role for screen in screens for element in screen.elements}
    assert roles == {"target", "title", "field", "focused"}


def test_training_screens_have_no_held_out_pairs() -> None:
    words = {name for group in (vocabulary.FIELDS, vocabulary.TABS) for names in group.values() for name in names}
    shown = 0
    for seed in range(150):
        screen = render(seed, "train", (360, 800))
        for element in screen.elements:
            if ":" not in element.label and element.label not in words:
                assert not held_out(element.label, screen.kind)
                shown += 1
    assert shown > 500
    test_pairs = [
        (e.label, s.kind) for s in (render(seed, "test", (360, 800)) for seed in range(150)) for e in s.elements
    ]
    assert sum(held_out(*pair) for pair in test_pairs) > 50


def test_screens_have_the_size_of_a_phone() -> None:
    assert render(3).image.size in SIZES


def test_missing_fonts_are_reported_with_their_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("AUTOGLM_DEMO_FONTS", str(tmp_path))
    _files.cache_clear()
    try:
        with pytest.raises(FontsMissing, match=r"apt-get install .*fonts-wqy-microhei"):
            require_fonts()
    finally:
        monkeypatch.undo()
        _files.cache_clear()
