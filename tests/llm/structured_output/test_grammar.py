"""Whatever a model likes best, an answer keeps to its grammar, and a phone's action ends in time."""

import ast
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
import pytest
from autoglm_client import actions
from autoglm_client.parser import parse
from tokenizers import AddedToken, Tokenizer

from autoglm.errors import RequestError
from autoglm.llm.structured_output import grammar, phone_action
from autoglm.llm.structured_output.grammar import Grammars, Matcher, token_masks
from autoglm.llm.structured_output.phone_action import RESERVE
from demo.phrases import THOUGHTS
from tests.checkpoints import make_tokenizer

ACTION = '{"type":"phone_action"}'
OBJECT = '{"type":"json_object"}'
DEMO = Path(__file__).parents[3] / "demo" / "checkpoint"
PADDING = 30  # ids of the vocabulary behind the tokenizer's
ENDS = ("<|endoftext|>", "<|user|>", "</answer>")
Choose = Callable[[list[int]], int]


class Model:
    """A tokenizer with its grammars."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.vocab_size: int = self.tokenizer.get_vocab_size() + PADDING
        self.ends = [self.id(text) for text in ENDS]
        self.grammars = Grammars(directory, self.vocab_size, self.ends)

    def id(self, token: str) -> int:
        found: int | None = self.tokenizer.token_to_id(token)
        assert found is not None
        return found

    def text(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def allowed(self, matcher: Matcher) -> list[int]:
        bits = np.unpackbits(token_masks([matcher], self.vocab_size).view(np.uint8), bitorder="little")
        return [int(token) for token in np.flatnonzero(bits[: self.vocab_size])]

    def write(self, wanted: str, choose: Choose, max_tokens: int, forced: bool = False) -> list[int]:
        """An answer; `forced` tokens are taken as the grammar gives them."""
        matcher, ids = self.grammars.matcher(wanted, max_tokens), list[int]()
        while not matcher.done and len(ids) < max_tokens:
            for token in (matcher.forced() if forced else []) or [choose(self.allowed(matcher))]:
                matcher.accept(token)
                ids.append(token)
        return ids

    def takes(self, wanted: str, text: str, max_tokens: int = 1000) -> bool:
        """Whether the masks let `text` through, and end with it."""
        matcher = self.grammars.matcher(wanted, max_tokens)
        for token in self.tokenizer.encode(text, add_special_tokens=False).ids:
            if token not in self.allowed(matcher):
                return False
            matcher.accept(token)
        return matcher.done


@pytest.fixture(scope="module", params=["demo", "small"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    if request.param == "demo":
        return Model(DEMO)
    directory: Path = tmp_path_factory.mktemp("small")
    tokenizer = make_tokenizer(('"\\',) * 9)  # with a token of a quote and a backslash
    tokenizer.add_tokens([AddedToken("[note]", special=False)])
    tokenizer.save(str(directory / "tokenizer.json"))
    return Model(directory)


def phone_agent(content: str) -> dict[str, Any]:
    """What Open-AutoGLM reads, in its steps: phone_agent/model/client.py, then parse_action of actions/handler.py."""
    for mark in ("finish(message=", "do(action=", "<answer>"):
        if mark in content:
            action = (mark if mark != "<answer>" else "") + content.split(mark, 1)[1]
            break
    else:
        action = content
    action = action.strip()
    if action.startswith(('do(action="Type"', 'do(action="Type_Name"')):
        return {"action": "Type", "text": action.split("text=", 1)[1][1:-2]}
    if action.startswith("do"):
        call = ast.parse(action.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t"), mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert action.startswith("finish")
    return {"action": "finish", "message": action.replace("finish(message=", "")[1:-2]}


def check(text: str) -> str:
    """Both clients read the same action; returns its name."""
    assert re.fullmatch(r"(?s:<think>.*</think>\n?)?<answer>(?s:.*)", text)
    ours, theirs = parse(text).action, phone_agent(text)
    if ours.NAME not in ("Type", "Type_Name", "finish"):  # of these the agent takes the text as it is written
        assert theirs == {"action": ours.NAME, **{k: _plain(v) for k, v in ours.arguments().items()}}
    else:
        assert theirs["action"] == ours.NAME.removesuffix("_Name")
    return ours.NAME


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, actions.Point) else value


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("greedy", [False, True])
def test_every_random_answer_is_an_action(model: Model, greedy: bool, forced: bool) -> None:
    rng = np.random.default_rng(greedy + 2 * forced)
    seen: dict[str, int] = {}
    for _ in range(250):
        likes = rng.standard_normal(model.vocab_size)
        max_tokens = int(rng.choice([RESERVE, RESERVE + 1, 100, 150]))

        def choose(allowed: list[int], likes: Any = likes) -> int:
            return allowed[int(likes[allowed].argmax())] if greedy else int(rng.choice(allowed))

        ids = model.write(ACTION, choose, max_tokens, forced)
        assert len(ids) <= max_tokens
        name = check(model.text(ids))
        seen[name] = seen.get(name, 0) + 1
    assert len(seen) >= 10, seen


def _alphabet() -> dict[int, str]:
    """Bytes as tokenizers write them."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + index) for index, byte in enumerate(others)}


_ALPHABET = _alphabet()
_SWIPE = 'do(action="Swipe", start=[999, 999], end=[999, 999])'
_TAP = 'do(action="Tap", element=[999, 999], message="'


@pytest.mark.parametrize("end", [_SWIPE, _TAP + "no end" * 40, _TAP + "\\\\" * 90, _TAP + "👩" * 50 + "\\"])
@pytest.mark.parametrize("max_tokens", [RESERVE, RESERVE + 1, *range(RESERVE + 20, RESERVE + 26)])
def test_the_slowest_answer_ends_in_time(model: Model, end: str, max_tokens: int) -> None:
    """One that is written byte by byte, and a tag only where nothing else may be."""
    matcher = model.grammars.matcher(ACTION, max_tokens)
    ids = [model.id("<think>")]
    matcher.accept(ids[0])
    bytes_of = [[model.id(_ALPHABET[byte]) for byte in text.encode()] for text in ("👩" * max_tokens, "\n", end)]
    script = bytes_of[0]
    while not matcher.done:
        allowed = model.allowed(matcher)
        if script and script[0] in allowed:
            token = script.pop(0)
        elif model.id("</think>") in allowed:
            token, script = model.id("</think>"), bytes_of[1]
        elif model.id("<answer>") in allowed:
            token, script = model.id("<answer>"), bytes_of[2]
        else:
            token = min(allowed, key=lambda i: len(model.text([i])))
        matcher.accept(token)
        ids.append(token)
    assert len(ids) <= max_tokens
    check(model.text(ids))


@pytest.mark.parametrize("model", ["small"], indirect=True)
def test_quotes_that_end_nothing_do_not_go_on_for_ever(model: Model) -> None:
    liked = [model.id(token) for token in ('"\\', "\\")]
    matcher = model.grammars.matcher(ACTION, RESERVE)
    ids = model.tokenizer.encode('<answer>do(action="Note", message="', add_special_tokens=False).ids
    for token in ids:
        matcher.accept(token)
    while not matcher.done:
        allowed = model.allowed(matcher)
        ids.append(next((token for token in liked if token in allowed), allowed[0]))
        matcher.accept(ids[-1])
    assert len(ids) <= RESERVE
    check(model.text(ids))


def test_too_few_tokens_are_refused(model: Model) -> None:
    with pytest.raises(RequestError, match=f"^max_tokens: got {RESERVE - 1}; allowed: at least {RESERVE} with respon"):
        model.grammars.matcher(ACTION, RESERVE - 1)
    assert not model.grammars.matcher(OBJECT, 1).done


POINT = actions.Point(0, 999)
EXAMPLES = [
    actions.Launch("京东"), actions.Tap(POINT), actions.Tap(POINT, "pay"), actions.Type('a "b"\\\n你'),
    actions.TypeName("Li"), actions.Swipe(actions.Point(500, 700), actions.Point(500, 300)), actions.Back(),
    actions.Home(), actions.DoubleTap(POINT), actions.LongPress(POINT), actions.Wait("5 seconds"),
    actions.TakeOver("log in"), actions.Note(), actions.CallAPI("sum up"), actions.Interact(),
    actions.Finish("done\nall of it, finish = do(it)"),
]  # fmt: skip


@pytest.mark.parametrize("action", EXAMPLES, ids=lambda action: action.NAME)
def test_every_action_of_the_language_can_be_written(model: Model, action: actions.Action) -> None:
    for thought in ("", "<think></think>", f"<think>{THOUGHTS['zh']['visible']} a=b <b>\n</think>\n"):
        text = f"{thought}<answer>{action}"
        assert model.takes(ACTION, text)
        assert parse(text).action == action


def test_the_examples_are_all_kinds() -> None:
    assert {type(action) for action in EXAMPLES} == {*actions.KINDS, actions.Finish}


@pytest.mark.parametrize(
    "text",
    [
        "<answer>do(action=\"Tap\", element=['1',2])",
        *(
            f'<answer>do(action="Tap", element=[{point}])'
            for point in ("1000,2", "1,1000", "01,2", "-1,2", "1.5,2", "1")
        ),
        '<answer>do(action="Tap",element=[1,2])',
        '<answer>do(action="Tap")',
        '<answer>do(action="Launch", app="")',
        '<answer>do(action="Fly", to="x")',
        '<answer>do(action="Back") ',
        '<answer>do(action="Wait", duration="soon")',
        '<answer>do(action="Note", message="a\\x")',
        '<answer>do(action="Note", message="a\x00")',
        'do(action="Back")',
        '<think>a</think> or <answer>do(action="Back")',
        '<think>a<think>b</think><answer>do(action="Back")',
        '<think>finish(message=</think><answer>do(action="Back")',
        '<think>so do(action="Home")</think><answer>do(action="Back")',
        '<answer>do(action="Type", text="finish(message=")',
    ],
)
def test_what_is_no_answer_cannot_be_written(model: Model, text: str) -> None:
    assert not model.takes(ACTION, text)


@pytest.mark.parametrize("mark", ["finish(message=", "do(action=", "<answer>"])
@pytest.mark.parametrize("before", ["<think>", '<answer>do(action="Type", text="', '<answer>finish(message="'])
def test_no_text_spells_a_mark(model: Model, before: str, mark: str) -> None:
    """However it is cut into tokens, and behind what looks like its beginning."""
    for text in (mark, f"fin{mark}", f"dofinish(<an{mark}"):
        for cut in range(len(text) - len(mark) + 1, len(text)):
            matcher = model.grammars.matcher(ACTION, 500)
            for piece in (before, text[:cut]):
                for token in model.tokenizer.encode(piece, add_special_tokens=False).ids:
                    matcher.accept(token)
            texts = [model.text([token]) for token in model.allowed(matcher) if token < model.vocab_size - PADDING]
            assert len(texts) > 100
            assert not any(written.startswith(text[cut:]) for written in texts if written not in phone_action.TAGS)


def test_forced_tokens_are_those_of_the_tokenizer(model: Model) -> None:
    matcher = model.grammars.matcher(ACTION, 100)
    assert matcher.forced() == []  # a thought or none
    given, following = '<answer>do(action="Long Press', '", element=['
    ids = model.tokenizer.encode(given + following + "1", add_special_tokens=False).ids
    known = len(model.tokenizer.encode(given, add_special_tokens=False).ids)
    for token in ids[:known]:
        matcher.accept(token)
    assert matcher.forced() == ids[known : len(ids) - 1]
    assert model.text(matcher.forced()) == following


def test_masks_of_many_are_those_of_each(model: Model) -> None:
    matchers: list[Matcher | None] = [None]
    for index in range(8):
        matcher = model.grammars.matcher((ACTION, OBJECT)[index % 2], 100)
        for _ in range(index):
            allowed = model.allowed(matcher)
            matcher.accept(allowed[index % len(allowed)])
        matchers += [matcher, None]
    masks = token_masks(matchers, model.vocab_size)
    assert masks.dtype == np.int32 and masks.shape == (17, -(-model.vocab_size // 32))
    for one, mask in zip(matchers, masks, strict=True):
        assert (mask == token_masks([one], model.vocab_size)).all()
        assert (mask == -1).all() == (one is None)
    assert token_masks([], model.vocab_size).shape == (0, masks.shape[1])


@pytest.mark.parametrize("wanted", [ACTION, OBJECT])
def test_text_holds_no_added_token_and_no_padding(model: Model, wanted: str) -> None:
    matcher = model.grammars.matcher(wanted, 100)
    for token in model.tokenizer.encode("<think>" if wanted == ACTION else '{"a', add_special_tokens=False).ids:
        matcher.accept(token)
    first = model.tokenizer.get_vocab_size(with_added_tokens=False)
    allowed = [token for token in model.allowed(matcher) if token >= first]
    assert allowed == ([model.id("</think>")] if wanted == ACTION else [])


def test_a_refused_token_is_an_error(model: Model) -> None:
    matcher = model.grammars.matcher(OBJECT, 100)
    with pytest.raises(RuntimeError, match="the grammar refuses token"):
        matcher.accept(model.id("<think>"))
    assert not matcher.done


def _schema(schema: dict[str, Any]) -> str:
    return json.dumps({"type": "json_schema", "json_schema": {"schema": schema}})


def _short(model: Model, rng: np.random.Generator) -> Choose:
    """Likes what closes: random text goes on for ever."""
    closing = {token for token, id_ in model.tokenizer.get_vocab().items() if re.fullmatch(r'["\]}:]+', token)}
    ids = {model.id(token) for token in closing}

    def choose(allowed: list[int]) -> int:
        liked = [token for token in allowed if token in ids]
        return int(rng.choice(liked if liked and rng.random() < 0.8 else allowed))

    return choose


def test_json_is_json(model: Model) -> None:
    rng = np.random.default_rng(5)
    read = 0
    for _ in range(40):
        ids = model.write(OBJECT, _short(model, rng), 300, forced=True)
        if len(ids) < 300:
            assert isinstance(json.loads(model.text(ids)), dict)
            read += 1
    assert read > 20


def test_json_keeps_to_its_schema(model: Model) -> None:
    wanted = _schema(
        {
            "type": "object",
            "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 999}, "kind": {"enum": ["tap", "你"]}},
            "required": ["x", "kind"],
            "additionalProperties": False,
        }
    )
    rng = np.random.default_rng(6)
    for _ in range(40):
        ids = model.write(wanted, _short(model, rng), 1000)
        value = json.loads(model.text(ids))
        assert list(value) == ["x", "kind"] and value["kind"] in ("tap", "你") and 0 <= value["x"] <= 999


@pytest.mark.parametrize("schema", [{"type": "objekt"}, {"not": {}}, {"type": "string", "pattern": "(("}, {"enum": []}])
def test_schemas_without_a_grammar_are_refused(model: Model, schema: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"^response_format: no grammar can be made of it: "):
        model.grammars.matcher(_schema(schema), 100)


def test_few_grammars_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    made = grammar._compile

    def compile_(tokenizer: Any, wanted: str) -> Any:
        compiled.append(wanted)
        return made(tokenizer, wanted)

    monkeypatch.setattr(grammar, "_compile", compile_)
    monkeypatch.setattr(grammar, "COMPILED", 2)
    grammars = Model(DEMO).grammars
    one, two, three = (_schema({"enum": [name]}) for name in "abc")
    first = grammars.matcher(one, 9)
    first.accept(first.forced()[0])
    assert grammars.matcher(one, 9).forced() != first.forced()  # at its beginning, whatever others do
    for wanted in (two, one, three, one, two):
        grammars.matcher(wanted, 9)
    assert compiled == [one, two, three, two]


def test_threads_share_one_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    read = list[str]()
    made = llguidance.LLTokenizer

    def read_tokenizer(text: str, **options: Any) -> Any:
        read.append(text)
        return made(text, **options)

    monkeypatch.setattr(grammar, "LLTokenizer", read_tokenizer)
    model = Model(DEMO)
    with ThreadPoolExecutor(8) as pool:
        matchers = list(pool.map(lambda i: model.grammars.matcher((ACTION, OBJECT)[i % 2], 100), range(32)))
    assert len(read) == 1
    masks = token_masks(matchers, model.vocab_size)
    assert all((masks[row] == masks[row % 2]).all() for row in range(32))


def test_checkpoints_without_the_tags_have_no_actions(tmp_path: Path) -> None:
    description = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    for token in description["added_tokens"]:
        token["content"] = token["content"].replace("<answer>", "<reply>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    grammars = Grammars(tmp_path, 2600, [2546])
    with pytest.raises(RequestError, match=r"^response_format: got phone_action, but the checkpoint has no .*<answer>"):
        grammars.matcher(ACTION, 100)
    assert not grammars.matcher(OBJECT, 100).done
