"""Stop strings, however the text is cut into pieces."""

import pytest

from autoglm.llm.stop import StopStrings, stop_ids


def run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    finder, shown = StopStrings(stops), ""
    for piece in pieces:
        text, stopped = finder.add(piece)
        shown += text
        if stopped:
            return shown, True
    return shown + finder.flush(), False


@pytest.mark.parametrize("stops", [[], ["END"], ["abab", "ba"], ["）", "<x>"], ["aab"]])
@pytest.mark.parametrize("text", ["", "hello", "one END two", "EN", "ENEND", "ababab", "aaab", "中文）文", "<<x>>"])
def test_every_way_of_cutting_gives_the_same(stops: list[str], text: str) -> None:
    places = [text.find(stop) for stop in stops if stop in text]
    expected = (text[: min(places)], True) if places else (text, False)
    for size in (1, 2, 3, 100):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        shown, stopped = run(stops, pieces)
        assert stopped == expected[1]
        # In one piece a longer stop that begins earlier wins; piece by piece the one that is complete first does.
        assert shown == expected[0] or (len(stops) > 1 and text.startswith(shown))


def test_nothing_that_may_be_hidden_is_shown() -> None:
    finder = StopStrings(["STOP"])
    shown = [finder.add(piece)[0] for piece in "a STO b ST"]
    assert "".join(shown) == "a STO b "
    assert finder.flush() == "ST"


def test_stop_ids() -> None:
    assert stop_ids((1, 2), (3,), False) == {1, 2, 3}
    assert stop_ids((1, 2), (3,), True) == {3}
