"""Answers in a grammar: the tokens of a plain loop with a mask, whatever else runs, waits, leaves or fails."""

import json
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from autoglm.errors import ErrorCode
from autoglm.llm import engine
from autoglm.llm.cuda_graphs import chunk_shapes, decode_sizes
from autoglm.llm.input_batch import ROW
from autoglm.llm.sequence import Request
from autoglm.llm.structured_output.grammar import Grammars, Matcher, token_masks
from tests.conftest import Pair
from tests.llm.harness import Harness
from tests.llm.test_engine import mixed_requests
from tests.llm.test_overlap import PENALTIES, PaddedGraph, penalised_row, plain_loop
from tests.prompts import random_text

MAX_TOKENS = 60
PROMPT = random_text(9, 1)


def schema(value: Any) -> str:
    return json.dumps({"type": "json_schema", "json_schema": {"name": "a", "schema": value, "strict": True}})


def record_of(**properties: Any) -> str:
    return schema(
        {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    )


FORMATS = {
    "choice": record_of(colour={"enum": ["red", "green", "blue"]}, certain={"type": "boolean"}),
    "text": record_of(a_long_name_that_is_forced={"type": "string", "pattern": "^[a-f]{3,9}$"}, n={"type": "integer"}),
    "object": '{"type": "json_object"}',
    "number": schema({"type": "integer", "minimum": 0, "maximum": 999999}),
}


def allowed_by(matcher: Matcher, vocab: int) -> torch.Tensor:
    """bool [vocab]"""
    words = torch.from_numpy(token_masks([matcher], vocab))[0]
    return ((words[:, None] >> torch.arange(32)) & 1).flatten()[:vocab].bool()


def masked_loop(pair: Pair, answer_format: str, options: dict[str, float]) -> list[int]:
    """`plain_loop` of one token again and again, with a mask; a token is taken without looking at what is forced."""
    vocab, ends = pair.checkpoint.text.vocab_size, pair.checkpoint.eos_token_ids
    matcher = Grammars(pair.checkpoint.path, vocab, ends).matcher(answer_format, MAX_TOKENS)
    tokens = list(PROMPT)
    while len(tokens) < len(PROMPT) + MAX_TOKENS and not matcher.done and tokens[-1] not in ends:
        row = penalised_row(pair.reference, tokens, len(PROMPT), options)
        tokens.append(int(row.where(allowed_by(matcher, vocab), -torch.inf).argmax()))
        matcher.accept(tokens[-1])
    return tokens[len(PROMPT) :]


@pytest.fixture(scope="module")
def wanted(plain: Pair) -> dict[str, list[int]]:
    """By format and kind of penalty, and by kind of penalty alone for answers that are free."""
    free = {name: plain_loop(plain.reference, PROMPT, 24, options) for name, options in PENALTIES.items()}
    return free | {
        f"{form} {name}": masked_loop(plain, text, options)
        for form, text in FORMATS.items()
        for name, options in PENALTIES.items()
    }


def all_requests(harness: Harness) -> list[Request]:
    requests = []
    for name, penalties in PENALTIES.items():
        requests.append(harness.request(name, PROMPT, max_tokens=24, **penalties))
        for form, text in FORMATS.items():
            options: dict[str, Any] = {"max_tokens": MAX_TOKENS, "ignore_eos": False, **penalties}
            requests.append(harness.request(f"{form} {name}", PROMPT, response_format=text, **options))
    return requests


def tokens_of(harness: Harness) -> dict[str, list[int]]:
    return {name: answer.token_ids for name, answer in harness.answers.items()}


@pytest.fixture
def forces_nothing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """To be called before an engine is made."""
    return lambda: monkeypatch.setattr(Matcher, "forced", lambda _: [])


@pytest.mark.parametrize(
    "changes", [{}, {"prefix_cache": False}, {"max_tokens_per_step": 5}, {"max_batch_size": 3}, {"kv_cache_mb": 1}]
)
def test_as_in_a_plain_loop(plain: Pair, wanted: dict[str, list[int]], changes: dict[str, Any]) -> None:
    harness = Harness(plain.checkpoint, **changes)
    harness.run(*all_requests(harness))
    assert tokens_of(harness) == wanted
    assert harness.engine.stats.generated_tokens == sum(map(len, wanted.values()))
    assert harness.engine.stats.prompt_tokens == len(PROMPT) * len(wanted)
    assert harness.all_blocks_back()


def test_answers_are_what_the_schema_says(plain: Pair, wanted: dict[str, list[int]]) -> None:
    harness = Harness(plain.checkpoint)
    harness.run(*all_requests(harness))
    complete = 0
    for name, answer in harness.answers.items():
        reason, usage = answer.last.finish_reason, answer.last.usage
        assert usage is not None and usage.completion_tokens == len(wanted[name])
        if " " in name and reason == "stop":
            value = json.loads(answer.text)
            complete += 1
            assert not name.startswith("choice") or value["colour"] in ("red", "green", "blue")
            assert not name.startswith("text") or 3 <= len(value["a_long_name_that_is_forced"]) <= 9
        else:
            assert reason == "length"
    assert complete >= 8


def test_forced_tokens_need_no_pass_of_their_own(
    plain: Pair, wanted: dict[str, list[int]], forces_nothing: Callable[[], None]
) -> None:
    def steps(name: str, form: str) -> int:
        harness = Harness(plain.checkpoint)
        options: dict[str, Any] = {"max_tokens": MAX_TOKENS, "repetition_penalty": 1.4, "ignore_eos": False}
        harness.run(harness.request(name, PROMPT, response_format=FORMATS[form], **options))
        assert tokens_of(harness) == {name: wanted[name]}
        return harness.engine.stats.steps

    with_forcing = steps("text repetition", "text")
    forces_nothing()
    without = steps("text repetition", "text")
    assert without >= len(wanted["text repetition"])
    assert with_forcing <= without - 12


def drawn_requests(harness: Harness, **options: Any) -> list[Request]:
    """In all formats, with images, drawn and penalised."""
    requests = []
    for i, text in enumerate([*FORMATS.values()] * 3):
        penalty = {"frequency_penalty": 0.3 * (i % 2), "repetition_penalty": (1.0, 1.2)[i % 3 == 0]}
        draw = {"temperature": 1.0 * (i % 5 > 0), "top_p": (1.0, 0.9)[i % 2], "seed": i}
        grids = [[], [(1, 8, 4)], [(1, 4, 6), (1, 10, 8)]][i % 3]
        requests.append(
            harness.random_request(
                f"c{i}", i, grids, response_format=text, max_tokens=40, ignore_eos=False, **penalty, **draw, **options
            )
        )
    return requests


@pytest.mark.parametrize("mode", ["off", "topk", "snap", "prune"])
def test_forcing_changes_no_answer(plain: Pair, forces_nothing: Callable[[], None], mode: str) -> None:
    """Under `pages` it may: there a token that is computed alone sees less than one of a chunk."""
    results = []
    for forces in (True, False):
        if not forces:
            forces_nothing()
        harness = Harness(plain.checkpoint)
        harness.run(*mixed_requests(harness), *drawn_requests(harness, sparse_mode=mode, sparse_ratio=0.4))
        results.append(tokens_of(harness))
        assert harness.all_blocks_back()
    assert results[0] == results[1]
    free = Harness(plain.checkpoint)
    free.run(*mixed_requests(free))
    assert tokens_of(free).items() <= results[0].items()


@pytest.fixture(scope="module")
def undisturbed(plain: Pair) -> dict[str, list[int]]:
    harness = Harness(plain.checkpoint)
    for request in [*all_requests(harness), *drawn_requests(harness)]:
        harness.run(request)
    return tokens_of(harness)


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_pushed_out_and_cancelled_at_any_time(
    plain: Pair, undisturbed: dict[str, list[int]], seed: int, prefix_cache: bool
) -> None:
    harness = Harness(plain.checkpoint, max_tokens_per_step=100, max_batch_size=12, prefix_cache=prefix_cache)
    chance, scheduler, cancelled = random.Random(seed), harness.engine.scheduler, set()
    requests = [*all_requests(harness), *drawn_requests(harness)]
    chance.shuffle(requests)
    harness.submit(*requests)
    for step in range(150):
        for sequence in [s for s in scheduler.running if chance.random() < 0.1]:
            scheduler._preempt(sequence)
        if step % 12 == 7 and scheduler.running:
            victim = chance.choice(scheduler.running)
            cancelled.add(victim.request.request_id)
            harness.engine._finish(victim, "cancelled")
        harness.step()
    harness.run()
    assert len(cancelled) >= 3
    for name, answer in harness.answers.items():
        whole = undisturbed[name]
        assert answer.token_ids == (whole[: len(answer.token_ids)] if name in cancelled else whole)
    assert harness.all_blocks_back()


@torch.inference_mode()
def test_passes_of_fixed_shapes(plain: Pair, undisturbed: dict[str, list[int]]) -> None:
    """What a graph holds leaves deferred rows alone, and what pads touches nobody."""
    harness = Harness(plain.checkpoint, max_tokens_per_step=64)
    runner = harness.engine.runner
    decode: Any = {n: PaddedGraph(runner._decode, (torch.zeros(ROW, n, dtype=torch.int32),)) for n in decode_sizes(32)}
    shapes = chunk_shapes(32, 64, 64)
    mixed: Any = {s: PaddedGraph(partial(runner._mixed, s), runner._mixed_inputs(s)) for s in shapes}
    runner.decode_graphs, runner.mixed_graphs = decode, mixed
    harness.run(*all_requests(harness), *drawn_requests(harness))
    assert tokens_of(harness) == undisturbed


@pytest.mark.parametrize("step", range(1, 14))
def test_a_pass_that_found_no_memory(
    plain: Pair, wanted: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Then nothing is in flight when forced tokens come, whatever step that is."""
    harness = Harness(plain.checkpoint)
    options: dict[str, Any] = {"max_tokens": MAX_TOKENS, "repetition_penalty": 1.4, "ignore_eos": False}
    harness.submit(harness.request("text repetition", PROMPT, response_format=FORMATS["text"], **options))
    for _ in range(step):
        harness.step()

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    decoding = harness.engine.scheduler.running[0].decodes
    with monkeypatch.context() as patch:
        patch.setattr(harness.engine.runner, "launch", fail)
        harness.submit(harness.request("big", random_text(30, 2)))
        harness.step()
    harness.run()
    error = harness.answers["big"].last.error
    assert error is not None and error.code == ErrorCode.UNAVAILABLE
    if decoding:
        assert harness.answers["text repetition"].token_ids == wanted["text repetition"]
    assert harness.all_blocks_back()


def test_nothing_to_choose_needs_no_pass(plain: Pair) -> None:
    harness = Harness(plain.checkpoint)
    harness.run(harness.request("a", PROMPT, response_format=schema({"const": "yes, indeed"})))
    answer, stats = harness.answers["a"], harness.engine.stats
    assert answer.last.finish_reason == "stop" and answer.text == '"yes, indeed"'
    assert (stats.steps, stats.prompt_tokens, stats.generated_tokens) == (0, len(PROMPT), len(answer.token_ids))
    assert harness.all_blocks_back()


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 13, 14, 20])
def test_forced_tokens_end_where_the_answer_may(plain: Pair, wanted: dict[str, list[int]], max_tokens: int) -> None:
    harness = Harness(plain.checkpoint)
    options: dict[str, Any] = {"max_tokens": max_tokens, "repetition_penalty": 1.4}
    harness.run(harness.request("a", PROMPT, response_format=FORMATS["text"], **options))
    assert harness.answers["a"].token_ids == wanted["text repetition"][:max_tokens]
    assert harness.answers["a"].last.finish_reason == "length"
    assert harness.all_blocks_back()


def test_a_stop_string_in_forced_text(plain: Pair) -> None:
    harness = Harness(plain.checkpoint)
    harness.run(harness.request("a", PROMPT, response_format=FORMATS["text"], max_tokens=60, stop="_is_fo"))
    assert harness.answers["a"].last.finish_reason == "stop"
    assert harness.answers["a"].text.endswith('"a_long_name_that')


def test_what_was_held_back_for_a_stop_string_is_shown_at_the_end(plain: Pair) -> None:
    """The answer ends with what a stop string begins with."""
    harness = Harness(plain.checkpoint)
    answer_format = record_of(sure={"type": "boolean"})
    harness.run(harness.request("a", PROMPT, response_format=answer_format, max_tokens=60, stop='["e}x", "}y"]'))
    assert harness.answers["a"].last.finish_reason == "stop"
    assert json.loads(harness.answers["a"].text)["sure"] in (True, False)


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("method", ["accept", "forced"])
@pytest.mark.parametrize("call", [1, 2, 4])
def test_a_failing_matcher_ends_its_own_request_only(
    plain: Pair, undisturbed: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch, method: str, call: int
) -> None:
    harness = Harness(plain.checkpoint)
    requests = drawn_requests(harness)
    usual, calls = getattr(Matcher, method), iter(range(1, 10**6))
    harness.submit(*requests)
    victim = harness.engine.scheduler.waiting[1].matcher

    def fail_later(matcher: Matcher, *arguments: Any) -> Any:
        if matcher is victim and next(calls) == call:
            raise Broken("no way on")
        return usual(matcher, *arguments)

    monkeypatch.setattr(Matcher, method, fail_later)
    harness.run()
    error = harness.answers["c1"].last.error
    assert error is not None and error.code == ErrorCode.INTERNAL and "no way on" in str(error)
    assert all(answer.token_ids == undisturbed[n] for n, answer in harness.answers.items() if n != "c1")
    assert harness.all_blocks_back()


def test_a_grammar_that_fails_by_itself(plain: Pair, undisturbed: dict[str, list[int]]) -> None:
    """llguidance allows the ends of text then: no answer, though it looks like one."""
    harness = Harness(plain.checkpoint)
    harness.submit(*drawn_requests(harness))
    matcher = harness.engine.scheduler.waiting[1].matcher
    assert matcher is not None
    with pytest.raises(RuntimeError):
        matcher.accept(7)
    harness.run()
    error = harness.answers["c1"].last.error
    assert error is not None and error.code == ErrorCode.INTERNAL
    assert all(answer.token_ids == undisturbed[n] for n, answer in harness.answers.items() if n != "c1")


@pytest.mark.parametrize("part", ["masks", "launch"])
def test_a_late_choice_that_fails_ends_those_who_wait_for_it(
    plain: Pair, undisturbed: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    harness = Harness(plain.checkpoint)
    harness.submit(*all_requests(harness))
    for _ in range(6):
        harness.step()

    def fail(*_: object) -> None:
        raise Broken("no mask")

    with monkeypatch.context() as patch:
        if part == "masks":
            patch.setattr(engine, "token_masks", fail)
        else:
            patch.setattr(harness.engine.runner, "choose_late", fail)
        harness.step()
    harness.run()
    failed = {name for name, answer in harness.answers.items() if answer.last.error is not None}
    assert failed and not failed & set(PENALTIES)
    for name in harness.answers.keys() - failed:
        assert harness.answers[name].token_ids == undisturbed[name]
    assert harness.all_blocks_back()


def test_who_asks_for_nothing_pays_nothing(plain: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(plain.checkpoint)
    calls: list[object] = []
    monkeypatch.setattr(harness.engine.runner, "choose_late", lambda *_: calls.append(0))
    monkeypatch.setattr(engine, "token_masks", lambda *_: calls.append(0))
    harness.run(*mixed_requests(harness))
    assert not calls


@pytest.mark.parametrize("max_tokens", [90, 200])
def test_a_phone_s_action_is_complete_with_and_without_forcing(
    plain: Pair, forces_nothing: Callable[[], None], max_tokens: int
) -> None:
    results = []
    for forces in (True, False):
        if not forces:
            forces_nothing()
        harness = Harness(plain.checkpoint)
        options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 1.0, "ignore_eos": False}
        options["response_format"] = '{"type": "phone_action"}'
        harness.run(*(harness.request(f"{i}", PROMPT, seed=i, **options) for i in range(12)))
        for answer in harness.answers.values():
            assert answer.last.finish_reason == "stop"
            assert answer.text.count("do(action=") + answer.text.count("finish(message=") == 1
        results.append(tokens_of(harness))
    assert results[0] == results[1]


def test_refusals(plain: Pair) -> None:
    harness = Harness(plain.checkpoint)
    harness.run(harness.request("a", PROMPT, response_format=schema({"type": "nonsense"})))
    error = harness.answers["a"].last.error
    assert error is not None and error.code == ErrorCode.INVALID_ARGUMENT and "response_format" in error.message
