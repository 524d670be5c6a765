import random
import re

import pytest

from demo import phrases, vocabulary
from demo.elements import Element
from demo.evaluate import judge
from demo.screens import render
from demo.tasks import KINDS, Asker, Task

pytestmark = pytest.mark.usefixtures("fonts")


def ask(kind: str, count: int = 40) -> list[tuple[Asker, Task]]:
    """Tasks of one kind on many screens."""
    found = []
    for seed in range(400):
        asker = Asker(render(seed, "test", (360, 800)), random.Random(seed))
        task = asker.ask(kind)
        if task:
            found.append((asker, task))
        if len(found) == count:
            break
    assert len(found) >= count // 2
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_in_the_language_of_the_model(kind: str) -> None:
    for _, task in ask(kind):
        assert re.fullmatch(r'do\(action="[A-Z][A-Za-z ]+"(, .+)?\)|finish\(message=".+"\)', task.action)
        assert task.kind in phrases.ACTIONS
        assert task.answer == f"<think>{task.thought}</think><answer>{task.action}"
        assert task.text and task.thought


@pytest.mark.parametrize("kind", ["tap", "hold", "page", "type"])
def test_coordinates_are_the_targets_centre(kind: str) -> None:
    for asker, task in ask(kind):
        if task.target is None:
            continue
        assert task.target in asker.screen.elements and task.target.role != "title"
        x, y = task.target.center
        assert task.action == f'do(action="{task.kind}", element=[{x},{y}])'


def test_what_is_launched_or_looked_for_is_not_on_the_screen() -> None:
    for kind in ("launch", "missing"):
        for asker, task in ask(kind):
            name = re.findall(r'[“"](.+?)[”"]', task.thought)[0]
            assert name not in {element.label for element in asker.screen.elements}


def test_the_same_words_ask_for_a_tap_where_the_application_is_visible() -> None:
    taps = [task for _, task in ask("tap", 150) if task.text.lower().startswith(("open ", "launch ", "打开", "启动"))]
    assert taps and all(task.kind == "Tap" for task in taps)


def test_text_is_typed_only_into_a_field_that_has_the_focus() -> None:
    kinds = set()
    for asker, task in ask("type", 80):
        focused = [element for element in asker.screen.elements if element.role == "focused"]
        kinds.add(task.kind)
        if task.kind == "Type":
            assert len(focused) == 1
            words = re.fullmatch(r'do\(action="Type", text="(.+)"\)', task.action)
            assert words and words[1] in task.text
        else:
            assert task.target and task.target.role == "field"
    assert kinds == {"Type", "Tap"}


def test_a_page_that_is_open_is_finished() -> None:
    finished = [(asker, task) for asker, task in ask("page", 80) if task.kind == "finish"]
    assert finished
    for asker, task in finished:
        assert asker.title and asker.title.label in task.action


def test_no_text_to_type_is_a_label() -> None:
    typed = {*vocabulary.TYPED_EN, *vocabulary.TYPED_ZH}
    assert not typed & set(vocabulary.labels())


def test_the_judge_wants_taps_inside_and_other_actions_exact() -> None:
    button = Element("OK", (0.1, 0.2, 0.3, 0.4), (0.1, 0.2, 0.3, 0.4), "target")
    task = Task("tap OK", "t", 'do(action="Tap", element=[200,300])', "Tap", button)
    assert judge(task, '<think>t</think><answer>do(action="Tap", element=[100,399])').right
    assert not judge(task, '<think>t</think><answer>do(action="Tap", element=[99,300])').right
    assert not judge(task, '<think>t</think><answer>do(action="Tap", element=[200,400])').right
    assert not judge(task, '<think>t</think><answer>do(action="Long Press", element=[200,300])').right
    assert not judge(task, '<think>t</think><answer>do(action="Tap", element=[200,300]').right
    back = Task("go back", "Go back.", 'do(action="Back")', "Back")
    assert judge(back, '<think>Go back.</think><answer>do(action="Back")').right
    assert not judge(back, '<think>Go back.</think><answer>do(action="Home")').right
    assert not judge(back, 'do(action="Back")').right
