"""Extraction of the thought from a streamed answer."""

import random

import pytest
from autoglm_client.thought import ThoughtFilter

ANSWERS = [
    (
        '<think>a < b, see <answer_box>\nthen do it</think>\n<answer>do(action="Back")',
        "a < b, see <answer_box>\nthen do it",
    ),
    ('想一想 do(action="Back")', "想一想"),
    ('<think><think>a</think>\n<answer></think><answer>finish(message="b")', "a"),
    ('<answer>finish(message="b")</answer>', ""),
    ("only words ", "only words"),
    ("do or finish", "do or finish"),
]


@pytest.mark.parametrize(("answer", "thought"), ANSWERS)
def test_only_the_thought_is_shown_for_any_split_into_pieces(answer: str, thought: str) -> None:
    random.seed(0)
    for _ in range(50):
        shown = ThoughtFilter()
        rest, seen = answer, ""
        while rest:
            size = random.randint(1, 6)
            seen += shown.feed(rest[:size])
            rest = rest[size:]
            assert thought.startswith(seen)
        assert seen + shown.end() == thought


def test_only_possible_tags_are_held_back() -> None:
    shown = ThoughtFilter()
    assert shown.feed("<think>点设置") == "点设置"
    assert shown.feed("<") == ""
    assert shown.feed("x") == "<x"
