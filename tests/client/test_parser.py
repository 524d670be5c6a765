"""The parser of the action language: valid texts, errors and their positions, and round trips."""

import random
import re
from dataclasses import fields

import pytest
from autoglm_client import (
    ActionError,
    Back,
    CallAPI,
    DoubleTap,
    Finish,
    Home,
    Interact,
    Launch,
    LongPress,
    Note,
    Point,
    Swipe,
    TakeOver,
    Tap,
    Type,
    TypeName,
    Wait,
    parse,
)
from autoglm_client.actions import KINDS, Action

ACTIONS = [
    ('do(action="Launch", app="京东")', Launch("京东")),
    ('do(action="Tap", element=[517,233])', Tap(Point(517, 233))),
    ('do(action="Tap", element=[0, 999], message="支付")', Tap(Point(0, 999), "支付")),
    ('do(action="Tap",element=(5,6))', Tap(Point(5, 6))),
    ("do( action = 'Tap' , element = [ 1 , 2 ] )", Tap(Point(1, 2))),
    ('do(element=[1,2], action="Tap")', Tap(Point(1, 2))),
    ('do(action="Type", text="你好，(世界), a=b")', Type("你好，(世界), a=b")),
    ('do(action="Type", text="")', Type("")),
    ('do(action="Type_Name", text="张三")', TypeName("张三")),
    ('do(action="Swipe", start=[500,800], end=[500,200])', Swipe(Point(500, 800), Point(500, 200))),
    ('do(action="Back")', Back()),
    ('do(action="Home")', Home()),
    ('do(action="Double Tap", element=[1,2])', DoubleTap(Point(1, 2))),
    ('do(action="Long Press", element=[1,2])', LongPress(Point(1, 2))),
    ('do(action="Wait", duration="3 seconds")', Wait("3 seconds")),
    ('do(action="Wait", duration=2.5)', Wait("2.5")),
    ('do(action="Wait")', Wait("1 seconds")),
    ('do(action="Take_over", message="请登录")', TakeOver("请登录")),
    ('do(action="Note", message="True")', Note("True")),
    ('do(action="Note", message=True)', Note("True")),
    ('do(action="Call_API", instruction="总结")', CallAPI("总结")),
    ('do(action="Interact")', Interact()),
    ('finish(message="完成了")', Finish("完成了")),
    ("finish()", Finish()),
]


@pytest.mark.parametrize(("text", "action"), ACTIONS, ids=[text for text, _ in ACTIONS])
def test_parses_every_action(text: str, action: Action) -> None:
    assert parse(text).action == action
    answer = parse(f"<think>先看屏幕。\n再点。</think>\n<answer>\n{text}\n</answer>\n")
    assert (answer.thought, answer.action) == ("先看屏幕。\n再点。", action)


STRINGS = [
    (r'"say \"hi\""', 'say "hi"'),
    ('"say "hi" to (them)"', 'say "hi" to (them)'),
    ('"say "hi""', 'say "hi"'),
    ('"a") and (b"', 'a") and (b'),
    (r'"a\\b\n\tc\u4f60\ud83d\ude00"', "a\\b\n\tc你😀"),
    (r'"\d+\s"', r"\d+\s"),
    ('"two\nlines"', "two\nlines"),
    ("'it\"s'", 'it"s'),
    ('"</answer>"', "</answer>"),
    ('"finish(message=\\"x\\")"', 'finish(message="x")'),
]


@pytest.mark.parametrize(("written", "text"), STRINGS)
def test_parses_strings(written: str, text: str) -> None:
    assert parse(f'do(action="Type", text={written})').action == Type(text)
    assert parse(f"<answer>finish(message={written})</answer>").action == Finish(text)


THOUGHTS = [
    ('<think>a</think><answer>do(action="Back")', "a"),
    ('<think><think>a</think>\n<answer></think><answer>do(action="Back")</answer>', "a"),
    ('我先返回。do(action="Back")', "我先返回。"),
    ('a do(action="Home")?</think>do(action="Back")', 'a do(action="Home")?'),
    ('<think>use finish(message="x") later</think><answer>do(action="Back")', 'use finish(message="x") later'),
    ('<answer>do(action="Back")</answer>', ""),
]


@pytest.mark.parametrize(("text", "thought"), THOUGHTS)
def test_finds_the_action_after_the_thought(text: str, thought: str) -> None:
    answer = parse(text)
    assert (answer.thought, answer.action) == (thought, Back())


FAULTS = [
    ("", "no action", 0),
    ("I do not know", "no action", 13),
    ("<think>a</think><answer>Back</answer>", "no action", 37),
    ('do(action="Fly")', "action must be one of Launch, Tap", 10),
    ('do(action="finish")', "action must be one of Launch, Tap", 10),
    ("do(action=Tap)", "quotes", 10),
    ('do(action="Back"', "expected", 16),
    ('do(action="Back") and more', "text after the action", 18),
    ('do(action="Type", text="half', "not closed", 23),
    ('do(action="Tap")', "needs the argument 'element'", 0),
    ('do(action="Tap", element=[1])', "expected ','", 27),
    ('do(action="Tap", element=[1,2,3])', "expected ']'", 29),
    ('do(action="Tap", element=[1.5,2])', "expected ','", 27),
    ('do(action="Tap", element=[1000,2])', "between 0 and 999 (got 1000)", 26),
    ('do(action="Tap", element=[-1,2])', "between 0 and 999 (got -1)", 26),
    ('do(action="Tap", element="1,2")', "expected a point", 25),
    ('do(action="Back", element=[1,2])', "takes no argument 'element'", 26),
    ('do(action="Tap", element=[1,2], element=[1,2])', "given twice", 32),
    ('do(action="Type", text=__import__("os"))', "quotes", 23),
]


@pytest.mark.parametrize(("text", "message", "position"), FAULTS)
def test_errors_have_a_message_and_a_position(text: str, message: str, position: int) -> None:
    with pytest.raises(ActionError, match=re.escape(message)) as caught:
        parse(text)
    assert caught.value.position == position


def test_written_actions_parse_to_themselves() -> None:
    random.seed(0)
    pieces = [*"\"'\\\n\t(),= 你😀n", "message", "</answer>", "<answer>", "do"]

    def string() -> str:
        return "".join(random.choices(pieces, k=random.randint(0, 12)))

    def point() -> Point:
        return Point(random.randint(0, 999), random.randint(0, 999))

    for kind in list(KINDS.values()) * 200:
        values = {"element": point(), "start": point(), "end": point(), "message": string(), "text": string()}
        values |= {"app": string(), "instruction": string(), "duration": string()}
        action = kind(**{f.name: values[f.name] for f in fields(kind)})
        text = f"<think>想</think><answer>{action}"
        assert parse(text).action == action, text


def test_truncated_answers_raise_only_action_errors() -> None:
    text = '<think>a "b" \\</think>\n<answer>do(action="Tap", element=[1,2], message="x \\"y\\" ,z=")</answer>'
    for end in range(len(text)):
        try:
            assert parse(text[:end]).action == Tap(Point(1, 2), 'x "y" ,z=')
        except ActionError as error:
            assert 0 <= error.position <= end


@pytest.mark.parametrize(
    ("point", "size", "pixel"),
    [((0, 0), (1080, 2400), (0, 0)), ((999, 999), (1080, 2400), (1078, 2397)), ((517, 233), (1080, 2400), (558, 559))],
)
def test_pixels_are_rounded_down(point: tuple[int, int], size: tuple[int, int], pixel: tuple[int, int]) -> None:
    assert Point(*point).to_pixels(size) == pixel


@pytest.mark.parametrize(("duration", "seconds"), [("3 seconds", 3.0), ("2.5", 2.5), ("a while", 1.0)])
def test_wait_has_its_duration_in_seconds(duration: str, seconds: float) -> None:
    assert Wait(duration).seconds == seconds
