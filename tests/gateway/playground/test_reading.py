"""The page parses answers as the Python client does."""

import random
from typing import Any

from autoglm_client import ActionError, Point, parse
from autoglm_client.thought import ThoughtFilter
from playwright.sync_api import Page

from tests.client.test_parser import ACTIONS, FAULTS, STRINGS, THOUGHTS
from tests.client.test_thought import ANSWERS

READ = """async (texts) => {
    const { parse } = await import("./actions.js");
    return texts.map((text) => parse(text));
}"""


def parse_in_python(text: str) -> dict[str, Any] | None:
    """The action found by the Python parser, in the format of the page's parser."""
    try:
        action = parse(text).action
    except ActionError:
        return None
    values = {name: list(value) if isinstance(value, Point) else value for name, value in vars(action).items()}
    return {"name": action.NAME, **values}


def test_parses_actions_as_the_python_client_does(page: Page) -> None:
    texts = [*dict(ACTIONS), *dict(THOUGHTS), *(text for text, _, _ in FAULTS)]
    texts += [f'do(action="Type", text={written})' for written, _ in STRINGS]
    texts += [f"<think>a</think>\n<answer>finish(message={written}) </answer> " for written, _ in STRINGS]
    random.seed(0)
    for text in texts * 20:  # with parts removed or repeated at random
        start, end = sorted(random.choices(range(len(text) + 1), k=2))
        texts.append(random.choice((text[:start] + text[end:], text[:end] + text[start:], text[:end])))
    for text, found in zip(texts, page.evaluate(READ, texts), strict=True):
        assert found["action"] == parse_in_python(text), text
        if found["action"]:
            assert found["thought"] == parse(text).thought
        else:
            assert found["error"]


def test_shows_thoughts_as_the_python_client_does(page: Page) -> None:
    answers = [answer for answer, _ in ANSWERS]
    shown = page.evaluate(
        """async (answers) => {
            const { certainThought } = await import("./actions.js");
            const thoughts = (answer) => [...answer].map((_, n) => certainThought(answer.slice(0, n + 1)));
            return answers.map(thoughts);
        }""",
        answers,
    )
    for answer, thoughts in zip(answers, shown, strict=True):
        thought, seen = ThoughtFilter(), ""
        for character, found in zip(answer, thoughts, strict=True):
            seen += thought.feed(character)
            assert seen.startswith(found) and seen.strip() == seen[: len(found)].strip(), repr(answer)
