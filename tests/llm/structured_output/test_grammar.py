"""Answers follow their grammar whichever allowed tokens are chosen, and phone actions end within max_tokens."""

import ast
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

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
PADDING = 30  # ids of the vocabulary after those of the tokenizer
ENDS = ("<|endoftext|>", "<|user|>", "</answer>")
Choose = Callable[[list[int]], int]


class Model:
    """A tokenizer and its grammars."""

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

    def write(self, response_format: str, choose: Choose, max_tokens: int, forced: bool = False) -> list[int]:
        """A random answer. forced: append the tokens that the grammar forces without choosing."""
        matcher, ids = self.grammars.matcher(response_format, max_tokens), list[int]()
        while not matcher.done and len(ids) < max_tokens:
            for token in (matcher.forced() if forced else []) or [choose(self.allowed(matcher))]:
                matcher.accept(token)
                ids.append(token)
        return ids

    def accepts(self, response_format: str, text: str, max_tokens: int = 1000) -> bool:
        """Whether the masks allow `text` and the answer is complete after it."""
        matcher = self.grammars.matcher(response_format, max_tokens)
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
    """The action that Open-AutoGLM reads (phone_agent/model/client.py, then parse_action of actions/handler.py)."""
    for marker in ("finish(message=", "do(action=", "<answer>"):
        if marker in content:
            action = (marker if marker != "<answer>" else "") + content.split(marker, 1)[1]
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
    """Check that both clients read the same action; returns its name."""
    assert re.fullmatch(r"(?s:<think>.*</think>\n?)?<answer>(?s:.*)", text)
    ours, theirs = parse(text).action, phone_agent(text)
    if ours.NAME not in ("Type", "Type_Name", "finish"):  # their text is read literally
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
    for _ in range(125):
        scores = rng.standard_normal(model.vocab_size)
        max_tokens = int(rng.choice([RESERVE, RESERVE + 1, 100, 150]))

        def choose(allowed: list[int], scores: Any = scores) -> int:
            return allowed[int(scores[allowed].argmax())] if greedy else int(rng.choice(allowed))

        ids = model.write(ACTION, choose, max_tokens, forced)
        assert len(ids) <= max_tokens
        name = check(model.text(ids))
        seen[name] = seen.get(name, 0) + 1
    assert len(seen) >= 10, seen


def _alphabet() -> dict[int, str]:
    """The characters of byte-level tokenizers."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


_ALPHABET = _alphabet()
_SWIPE = 'do(action="Swipe", start=[999, 999], end=[999, 999])'
_TAP = 'do(action="Tap", element=[999, 999], message="'


@pytest.mark.parametrize("end", [_SWIPE, _TAP + "no end" * 40, _TAP + "\\\\" * 90, _TAP + "👩" * 50 + "\\"])
@pytest.mark.parametrize("max_tokens", [RESERVE, RESERVE + 1, *range(RESERVE + 20, RESERVE + 26)])
def test_the_longest_answer_ends_within_max_tokens(model: Model, end: str, max_tokens: int) -> None:
    """It is written byte by byte, with a tag only where nothing else is allowed."""
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
def test_escaped_quotes_do_not_prevent_the_end(model: Model) -> None:
    preferred = [model.id(token) for token in ('"\\', "\\")]
    matcher = model.grammars.matcher(ACTION, RESERVE)
    ids = model.tokenizer.encode('<answer>do(action="Note", message="', add_special_tokens=False).ids
    for token in ids:
        matcher.accept(token)
    while not matcher.done:
        allowed = model.allowed(matcher)
        ids.append(next((token for token in preferred if token in allowed), allowed[0]))
        matcher.accept(ids[-1])
    assert len(ids) <= RESERVE
    check(model.text(ids))


def test_too_small_max_tokens_are_rejected(model: Model) -> None:
    message = rf"^max_tokens must be at least {RESERVE} with response_format phone_action, .* \(got {RESERVE - 1}\)$"
    with pytest.raises(RequestError, match=message):
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
def test_every_action_can_be_written(model: Model, action: actions.Action) -> None:
    for thought in ("", "<think></think>", f"<think>{THOUGHTS['zh']['visible']} a=b <b>\n</think>\n"):
        text = f"{thought}<answer>{action}"
        assert model.accepts(ACTION, text)
        assert parse(text).action == action


def test_the_examples_contain_every_kind_of_action() -> None:
    assert {type(action) for action in EXAMPLES} == set(actions.KINDS.values())


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
def test_invalid_actions_cannot_be_written(model: Model, text: str) -> None:
    assert not model.accepts(ACTION, text)


@pytest.mark.parametrize("marker", ["finish(message=", "do(action=", "<answer>"])
@pytest.mark.parametrize("before", ["<think>", '<answer>do(action="Type", text="', '<answer>finish(message="'])
def test_text_cannot_contain_a_marker(model: Model, before: str, marker: str) -> None:
    """However it is split into tokens, and after text that resembles its beginning."""
    for text in (marker, f"fin{marker}", f"dofinish(<an{marker}"):
        for cut in range(len(text) - len(marker) + 1, len(text)):
            matcher = model.grammars.matcher(ACTION, 500)
            for piece in (before, text[:cut]):
                for token in model.tokenizer.encode(piece, add_special_tokens=False).ids:
                    matcher.accept(token)
            texts = [model.text([token]) for token in model.allowed(matcher) if token < model.vocab_size - PADDING]
            assert len(texts) > 100
            assert not any(each.startswith(text[cut:]) for each in texts if each not in phone_action.TAGS)


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


def test_masks_of_a_batch_equal_those_of_each_matcher(model: Model) -> None:
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


@pytest.mark.parametrize("response_format", [ACTION, OBJECT])
def test_text_contains_neither_added_tokens_nor_padding(model: Model, response_format: str) -> None:
    matcher = model.grammars.matcher(response_format, 100)
    for token in model.tokenizer.encode(
        "<think>" if response_format == ACTION else '{"a', add_special_tokens=False
    ).ids:
        matcher.accept(token)
    first = model.tokenizer.get_vocab_size(with_added_tokens=False)
    allowed = [token for token in model.allowed(matcher) if token >= first]
    assert allowed == ([model.id("</think>")] if response_format == ACTION else [])


def test_a_rejected_token_is_an_error(model: Model) -> None:
    matcher = model.grammars.matcher(OBJECT, 100)
    with pytest.raises(RuntimeError, match="the grammar rejects token"):
        matcher.accept(model.id("<think>"))
    assert not matcher.done


def _schema(schema: dict[str, Any]) -> str:
    return json.dumps({"type": "json_schema", "json_schema": {"schema": schema}})


def _short(model: Model, rng: np.random.Generator) -> Choose:
    """Prefers tokens that close JSON values: uniformly random text would hardly end."""
    closing = {id_ for token, id_ in model.tokenizer.get_vocab().items() if re.fullmatch(r'["\]}:]+', token)}

    def choose(allowed: list[int]) -> int:
        preferred = [token for token in allowed if token in closing]
        return int(rng.choice(preferred if preferred and rng.random() < 0.8 else allowed))

    return choose


def test_json_objects_can_be_parsed(model: Model) -> None:
    rng = np.random.default_rng(5)
    read = 0
    for _ in range(40):
        ids = model.write(OBJECT, _short(model, rng), 300, forced=True)
        if len(ids) < 300:
            assert isinstance(json.loads(model.text(ids)), dict)
            read += 1
    assert read > 20


def test_json_matches_its_schema(model: Model) -> None:
    response_format = _schema(
        {
            "type": "object",
            "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 999}, "kind": {"enum": ["tap", "你"]}},
            "required": ["x", "kind"],
            "additionalProperties": False,
        }
    )
    rng = np.random.default_rng(6)
    for _ in range(40):
        ids = model.write(response_format, _short(model, rng), 1000)
        value = json.loads(model.text(ids))
        assert list(value) == ["x", "kind"] and value["kind"] in ("tap", "你") and 0 <= value["x"] <= 999


@pytest.mark.parametrize("schema", [{"type": "objekt"}, {"not": {}}, {"type": "string", "pattern": "(("}, {"enum": []}])
def test_schemas_without_a_grammar_are_rejected(model: Model, schema: dict[str, Any]) -> None:
    accepted = r"made of supported keywords \(got \"not\"\)$" if "not" in schema else "satisfiable, with known types"
    with pytest.raises(RequestError, match=rf"^response_format\.json_schema\.schema must be {accepted}"):
        model.grammars.matcher(_schema(schema), 100)


def test_the_least_recently_used_grammar_is_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Mock(wraps=llguidance.LLMatcher)
    monkeypatch.setattr(grammar, "LLMatcher", compiler)
    monkeypatch.setattr(grammar, "MAX_COMPILED", 2)
    grammars = Model(DEMO).grammars
    one, two, three = (_schema({"enum": [name]}) for name in "abc")
    first = grammars.matcher(one, 9)
    first.accept(first.forced()[0])
    assert grammars.matcher(one, 9).forced() != first.forced()  # a new answer starts at the beginning
    for response_format in (two, one, three, one, two):
        grammars.matcher(response_format, 9)
    compiled = [call.args[0]["enum"] for call in compiler.grammar_from_json_schema.call_args_list]
    assert compiled == [["a"], ["b"], ["c"], ["b"]]


def test_threads_share_one_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Mock(wraps=llguidance.LLTokenizer)
    monkeypatch.setattr(grammar, "LLTokenizer", read)
    model = Model(DEMO)
    with ThreadPoolExecutor(8) as pool:
        matchers = list(pool.map(lambda i: model.grammars.matcher((ACTION, OBJECT)[i % 2], 100), range(32)))
    assert read.call_count == 1
    masks = token_masks(matchers, model.vocab_size)
    assert all((masks[row] == masks[row % 2]).all() for row in range(32))


def test_phone_actions_are_rejected_for_checkpoints_without_the_tags(tmp_path: Path) -> None:
    description = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    for token in description["added_tokens"]:
        token["content"] = token["content"].replace("<answer>", "<reply>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    grammars = Grammars(tmp_path, 2600, [2546])
    message = r"^response_format must be json_object or json_schema for .* no token <answer> \(got 'phone_action'\)$"
    with pytest.raises(RequestError, match=message):
        grammars.matcher(ACTION, 100)
    assert not grammars.matcher(OBJECT, 100).done
