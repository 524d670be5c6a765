"""Stop strings are found however the text is split, and nothing that may belong to one is emitted early."""

import pytest

from autoglm.llm.stop import StopStrings, stop_token_ids


def run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    finder, emitted = StopStrings(stops), ""
    for piece in pieces:
        text, stopped = finder.add(piece)
        emitted += text
        if stopped:
            return emitted, True
    return emitted + finder.flush(), False


@pytest.mark.parametrize("stops", [[], ["END"], ["abab", "ba"], ["）", "<x>"], ["aab"]])
@pytest.mark.parametrize("text", ["", "hello", "one END two", "EN", "ENEND", "ababab", "aaab", "中文）文", "<<x>>"])
def test_the_result_does_not_depend_on_how_the_text_is_split(stops: list[str], text: str) -> None:
    indices = [text.find(stop) for stop in stops if stop in text]
    expected = (text[: min(indices)], True) if indices else (text, False)
    for size in (1, 2, 3, 100):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        emitted, stopped = run(stops, pieces)
        assert stopped == expected[1]
        # The stop string that is complete first wins; in a single piece it is the one that begins first.
        assert emitted == expected[0] or (len(stops) > 1 and text.startswith(emitted))


def test_text_that_may_belong_to_a_stop_string_is_held_back() -> None:
    finder = StopStrings(["STOP"])
    emitted = [finder.add(piece)[0] for piece in "a STO b ST"]
    assert "".join(emitted) == "a STO b "
    assert finder.flush() == "ST"


def test_stop_token_ids() -> None:
    assert stop_token_ids((1, 2), (3,), False) == {1, 2, 3}
    assert stop_token_ids((1, 2), (3,), True) == {3}
