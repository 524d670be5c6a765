import random
import re

import pytest

from demo import phrases, vocabulary
from demo.elements import Element
from demo.evaluate import judge
from demo.screens import render
from demo.tasks import KINDS, Task, TaskSampler

pytestmark = pytest.mark.usefixtures("fonts")


def draw(kind: str, count: int = 40) -> list[tuple[TaskSampler, Task]]:
    """Tasks of one kind on many screens."""
    found = []
    for seed in range(400):
        sampler = TaskSampler(render(seed, "test", (360, 800)), random.Random(seed))
        task = sampler.sample(kind)
        if task:
            found.append((sampler, task))
        if len(found) == count:
            break
    assert len(found) >= count // 2
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_answers_have_the_format_of_the_model(kind: str) -> None:
    for _, task in draw(kind):
        assert re.fullmatch(r'do\(action="[A-Z][A-Za-z ]+"(, .+)?\)|finish\(message=".+"\)', task.action)
        assert task.action_type in phrases.ACTIONS
        assert task.answer == f"<think>{task.thought}</think><answer>{task.action}"
        assert task.text and task.thought


@pytest.mark.parametrize("kind", ["tap", "hold", "page", "type"])
def test_coordinates_are_the_centre_of_the_target(kind: str) -> None:
    for sampler, task in draw(kind):
        if task.target is None:
            continue
        assert task.target in sampler.screen.elements and task.target.role != "title"
        x, y = task.target.center
        assert task.action == f'do(action="{task.action_type}", element=[{x},{y}])'


def test_launched_and_missing_names_are_not_on_the_screen() -> None:
    for kind in ("launch", "missing"):
        for sampler, task in draw(kind):
            name = re.findall(r'[“"](.+?)[”"]', task.thought)[0]
            assert name not in {element.label for element in sampler.screen.elements}


def test_visible_applications_are_opened_with_a_tap() -> None:
    taps = [task for _, task in draw("tap", 150) if task.text.lower().startswith(("open ", "launch ", "打开", "启动"))]
    assert taps and all(task.action_type == "Tap" for task in taps)


def test_text_is_typed_only_into_a_focused_field() -> None:
    kinds = set()
    for sampler, task in draw("type", 80):
        focused = [element for element in sampler.screen.elements if element.role == "focused"]
        kinds.add(task.action_type)
        if task.action_type == "Type":
            assert len(focused) == 1
            words = re.fullmatch(r'do\(action="Type", text="(.+)"\)', task.action)
            assert words and words[1] in task.text
        else:
            assert task.target and task.target.role == "field"
    assert kinds == {"Type", "Tap"}


def test_going_to_an_open_page_is_a_finish() -> None:
    finished = [(sampler, task) for sampler, task in draw("page", 80) if task.action_type == "finish"]
    assert finished
    for sampler, task in finished:
        assert sampler.title and sampler.title.label in task.action


def test_texts_to_type_are_not_labels() -> None:
    typed = {*vocabulary.TYPED_EN, *vocabulary.TYPED_ZH}
    assert not typed & set(vocabulary.labels())


def test_taps_must_be_inside_the_box_and_other_actions_exact() -> None:
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
