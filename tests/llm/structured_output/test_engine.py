"""Answers constrained by a grammar equal those of a sequential loop with masks, in any batch and after any failure."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from autoglm.errors import ErrorCode
from autoglm.llm import engine
from autoglm.llm.sequence import Request
from autoglm.llm.structured_output.grammar import Grammars, Matcher, token_masks
from tests.conftest import Pair
from tests.llm.harness import Harness
from tests.llm.test_engine import mixed_requests
from tests.llm.test_overlap import PENALTIES, penalized_logits, sequential_loop
from tests.prompts import random_text

MAX_TOKENS = 60
PROMPT = random_text(9, 1)


def schema(value: Any) -> str:
    return json.dumps({"type": "json_schema", "json_schema": {"name": "a", "schema": value, "strict": True}})


def object_of(**properties: Any) -> str:
    return schema(
        {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    )


FORMATS = {
    "choice": object_of(colour={"enum": ["red", "green", "blue"]}, certain={"type": "boolean"}),
    "text": object_of(a_long_name_that_is_forced={"type": "string", "pattern": "^[a-f]{3,9}$"}, n={"type": "integer"}),
    "object": '{"type": "json_object"}',
    "number": schema({"type": "integer", "minimum": 0, "maximum": 999999}),
}


def allowed_by(matcher: Matcher, vocab: int) -> torch.Tensor:
    """bool [vocab]"""
    words = torch.from_numpy(token_masks([matcher], vocab))[0]
    return ((words[:, None] >> torch.arange(32)) & 1).flatten()[:vocab].bool()


def masked_loop(pair: Pair, answer_format: str, options: dict[str, float]) -> list[int]:
    """`sequential_loop` with the grammar's masks; every token is chosen from its mask, none is forced."""
    vocab, ends = pair.checkpoint.text.vocab_size, pair.checkpoint.eos_token_ids
    matcher = Grammars(pair.checkpoint.path, vocab, ends).matcher(answer_format, MAX_TOKENS)
    tokens = list(PROMPT)
    while len(tokens) < len(PROMPT) + MAX_TOKENS and not matcher.done and tokens[-1] not in ends:
        row = penalized_logits(pair.reference, tokens, len(PROMPT), options)
        tokens.append(int(row.where(allowed_by(matcher, vocab), -torch.inf).argmax()))
        matcher.accept(tokens[-1])
    return tokens[len(PROMPT) :]


@pytest.fixture(scope="module")
def expected(plain: Pair) -> dict[str, list[int]]:
    """The tokens by format and kind of penalty, and by kind of penalty alone for answers without a grammar."""
    free = {name: sequential_loop(plain.reference, PROMPT, 24, options) for name, options in PENALTIES.items()}
    return free | {
        f"{form} {name}": masked_loop(plain, text, options)
        for form, text in FORMATS.items()
        for name, options in PENALTIES.items()
    }


def grammar_requests(harness: Harness) -> list[Request]:
    """Each kind of penalty without a grammar and with each format."""
    requests = []
    for name, penalties in PENALTIES.items():
        requests.append(harness.request(name, PROMPT, max_tokens=24, **penalties))
        for form, text in FORMATS.items():
            options: dict[str, Any] = {"max_tokens": MAX_TOKENS, "ignore_eos": False, **penalties}
            requests.append(harness.request(f"{form} {name}", PROMPT, response_format=text, **options))
    return requests


@pytest.fixture
def disable_forcing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """To be called before an engine is created."""
    return lambda: monkeypatch.setattr(Matcher, "forced", lambda _: [])


@pytest.mark.parametrize(
    "changes", [{}, {"prefix_cache": False}, {"max_tokens_per_step": 5}, {"max_batch_size": 3}, {"kv_cache_mb": 1}]
)
def test_answers_equal_those_of_a_sequential_loop(
    plain: Pair, expected: dict[str, list[int]], changes: dict[str, Any]
) -> None:
    harness = Harness(plain.checkpoint, **changes)
    harness.run(*grammar_requests(harness))
    assert harness.token_ids == expected
    assert harness.engine.stats.generated_tokens == sum(map(len, expected.values()))
    assert harness.engine.stats.prompt_tokens == len(PROMPT) * len(expected)
    assert harness.all_blocks_available()


def test_answers_match_their_schema(plain: Pair, expected: dict[str, list[int]]) -> None:
    harness = Harness(plain.checkpoint)
    harness.run(*grammar_requests(harness))
    complete = 0
    for name, answer in harness.answers.items():
        reason, usage = answer.last.finish_reason, answer.last.usage
        assert usage is not None and usage.completion_tokens == len(expected[name])
        if " " in name and reason == "stop":
            value = json.loads(answer.text)
            complete += 1
            assert not name.startswith("choice") or value["colour"] in ("red", "green", "blue")
            assert not name.startswith("text") or 3 <= len(value["a_long_name_that_is_forced"]) <= 9
        else:
            assert reason == "length"
    assert complete >= 8


def test_forced_tokens_are_computed_together(
    plain: Pair, expected: dict[str, list[int]], disable_forcing: Callable[[], None]
) -> None:
    def steps(name: str, form: str) -> int:
        harness = Harness(plain.checkpoint)
        options: dict[str, Any] = {"max_tokens": MAX_TOKENS, "repetition_penalty": 1.4, "ignore_eos": False}
        harness.run(harness.request(name, PROMPT, response_format=FORMATS[form], **options))
        assert harness.token_ids == {name: expected[name]}
        return harness.engine.stats.steps

    with_forcing = steps("text repetition", "text")
    disable_forcing()
    without = steps("text repetition", "text")
    assert without >= len(expected["text repetition"])
    assert with_forcing <= without - 12


def sampled_requests(harness: Harness, **options: Any) -> list[Request]:
    """All formats, with and without images, sampled and greedy, with and without penalties."""
    requests = []
    for i, text in enumerate([*FORMATS.values()] * 3):
        penalty = {"frequency_penalty": 0.3 * (i % 2), "repetition_penalty": (1.0, 1.2)[i % 3 == 0]}
        sampling = {"temperature": 1.0 * (i % 5 > 0), "top_p": (1.0, 0.9)[i % 2], "seed": i}
        grids = [[], [(1, 8, 4)], [(1, 4, 6), (1, 10, 8)]][i % 3]
        settings: dict[str, Any] = {"max_tokens": 40, "ignore_eos": False, **penalty, **sampling, **options}
        requests.append(harness.random_request(f"c{i}", i, grids, response_format=text, **settings))
    return requests


@pytest.mark.parametrize("mode", ["off", "topk", "prune"])
def test_forcing_does_not_change_answers(plain: Pair, disable_forcing: Callable[[], None], mode: str) -> None:
    """With `pages` it may: a decoded token attends to fewer keys than one in a chunk."""
    results = []
    for forcing in (True, False):
        if not forcing:
            disable_forcing()
        harness = Harness(plain.checkpoint)
        harness.run(*mixed_requests(harness), *sampled_requests(harness, sparse_mode=mode, sparse_ratio=0.4))
        results.append(harness.token_ids)
        assert harness.all_blocks_available()
    assert results[0] == results[1]
    free = Harness(plain.checkpoint)
    free.run(*mixed_requests(free))
    assert free.token_ids.items() <= results[0].items()


@pytest.fixture(scope="module")
def undisturbed(plain: Pair) -> dict[str, list[int]]:
    harness = Harness(plain.checkpoint)
    for request in [*grammar_requests(harness), *sampled_requests(harness)]:
        harness.run(request)
    return harness.token_ids


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_preemption_and_cancellation_in_random_steps(
    plain: Pair, undisturbed: dict[str, list[int]], seed: int, prefix_cache: bool
) -> None:
    harness = Harness(plain.checkpoint, max_tokens_per_step=100, max_batch_size=12, prefix_cache=prefix_cache)
    rng, scheduler, cancelled = random.Random(seed), harness.engine.scheduler, set()
    requests = [*grammar_requests(harness), *sampled_requests(harness)]
    rng.shuffle(requests)
    harness.submit(*requests)
    for step in range(150):
        for sequence in [s for s in scheduler.running if rng.random() < 0.1]:
            scheduler.preempt(sequence)
        if step % 12 == 7 and scheduler.running:
            victim = rng.choice(scheduler.running)
            cancelled.add(victim.request.request_id)
            harness.cancel(victim.request.request_id)
        harness.step()
    harness.run()
    assert len(cancelled) >= 3
    for name, answer in harness.answers.items():
        whole = undisturbed[name]
        assert answer.token_ids == (whole[: len(answer.token_ids)] if name in cancelled else whole)
    assert harness.all_blocks_available()


def test_padded_passes_leave_deferred_rows_alone(
    plain: Pair, undisturbed: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(plain.checkpoint, max_tokens_per_step=64)
    harness.pad_passes(monkeypatch)
    harness.run(*grammar_requests(harness), *sampled_requests(harness))
    assert harness.token_ids == undisturbed


@pytest.mark.parametrize("step", range(1, 14))
def test_forced_tokens_after_a_pass_that_ran_out_of_memory(
    plain: Pair, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """No pass is in flight then."""
    harness = Harness(plain.checkpoint)
    options: dict[str, Any] = {"max_tokens": MAX_TOKENS, "repetition_penalty": 1.4, "ignore_eos": False}
    harness.submit(harness.request("text repetition", PROMPT, response_format=FORMATS["text"], **options))
    for _ in range(step):
        harness.step()

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    decoding = harness.engine.scheduler.running[0].decodes
    with monkeypatch.context() as patch:
        patch.setattr(harness.engine.model_runner, "launch", fail)
        harness.submit(harness.request("big", random_text(30, 2)))
        harness.step()
    harness.run()
    error = harness.answers["big"].last.error
    assert error is not None and error.code == ErrorCode.UNAVAILABLE
    if decoding:
        assert harness.answers["text repetition"].token_ids == expected["text repetition"]
    assert harness.all_blocks_available()


def test_a_grammar_with_a_single_answer_needs_no_pass(plain: Pair) -> None:
    harness = Harness(plain.checkpoint)
    harness.run(harness.request("a", PROMPT, response_format=schema({"const": "yes, indeed"})))
    answer, stats = harness.answers["a"], harness.engine.stats
    assert answer.last.finish_reason == "stop" and answer.text == '"yes, indeed"'
    assert (stats.steps, stats.prompt_tokens, stats.generated_tokens) == (0, len(PROMPT), len(answer.token_ids))
    assert harness.all_blocks_available()


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 13, 14, 20])
def test_forced_tokens_end_at_max_tokens(plain: Pair, expected: dict[str, list[int]], max_tokens: int) -> None:
    harness = Harness(plain.checkpoint)
    options: dict[str, Any] = {"max_tokens": max_tokens, "repetition_penalty": 1.4}
    harness.run(harness.request("a", PROMPT, response_format=FORMATS["text"], **options))
    assert harness.answers["a"].token_ids == expected["text repetition"][:max_tokens]
    assert harness.answers["a"].last.finish_reason == "length"
    assert harness.all_blocks_available()


def test_a_stop_string_in_forced_text_ends_the_answer(plain: Pair) -> None:
    harness = Harness(plain.checkpoint)
    harness.run(harness.request("a", PROMPT, response_format=FORMATS["text"], max_tokens=60, stop="_is_fo"))
    assert harness.answers["a"].last.finish_reason == "stop"
    assert harness.answers["a"].text.endswith('"a_long_name_that')


def test_text_held_back_for_a_stop_string_is_emitted_at_the_end(plain: Pair) -> None:
    """The answer ends with the beginning of a stop string."""
    harness = Harness(plain.checkpoint)
    answer_format = object_of(sure={"type": "boolean"})
    harness.run(harness.request("a", PROMPT, response_format=answer_format, max_tokens=60, stop='["e}x", "}y"]'))
    assert harness.answers["a"].last.finish_reason == "stop"
    assert json.loads(harness.answers["a"].text)["sure"] in (True, False)


class MatcherError(RuntimeError):
    pass


@pytest.mark.parametrize("method", ["accept", "forced"])
@pytest.mark.parametrize("call", [1, 2, 4])
def test_a_failing_matcher_fails_its_own_request_only(
    plain: Pair, undisturbed: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch, method: str, call: int
) -> None:
    harness = Harness(plain.checkpoint)
    requests = sampled_requests(harness)
    original, calls = getattr(Matcher, method), iter(range(1, 10**6))
    harness.submit(*requests)
    victim = harness.engine.scheduler.waiting[1].matcher

    def fail_later(matcher: Matcher, *arguments: Any) -> Any:
        if matcher is victim and next(calls) == call:
            raise MatcherError("broken")
        return original(matcher, *arguments)

    monkeypatch.setattr(Matcher, method, fail_later)
    harness.run()
    error = harness.answers["c1"].last.error
    assert error is not None and error.code == ErrorCode.INTERNAL
    assert str(error) == "the language model failed (MatcherError); see the log"
    assert all(answer.token_ids == undisturbed[n] for n, answer in harness.answers.items() if n != "c1")
    assert harness.all_blocks_available()


def test_a_grammar_in_a_failed_state_is_an_error(plain: Pair, undisturbed: dict[str, list[int]]) -> None:
    """llguidance then allows end-of-text tokens, which must not pass as a complete answer."""
    harness = Harness(plain.checkpoint)
    harness.submit(*sampled_requests(harness))
    matcher = harness.engine.scheduler.waiting[1].matcher
    assert matcher is not None
    with pytest.raises(RuntimeError):
        matcher.accept(7)
    harness.run()
    error = harness.answers["c1"].last.error
    assert error is not None and error.code == ErrorCode.INTERNAL
    assert all(answer.token_ids == undisturbed[n] for n, answer in harness.answers.items() if n != "c1")


@pytest.mark.parametrize("part", ["masks", "launch"])
def test_failing_deferred_sampling_fails_the_deferred_requests_only(
    plain: Pair, undisturbed: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    harness = Harness(plain.checkpoint)
    harness.submit(*grammar_requests(harness))
    for _ in range(6):
        harness.step()

    def fail(*_: object) -> None:
        raise MatcherError("no mask")

    with monkeypatch.context() as patch:
        if part == "masks":
            patch.setattr(engine, "token_masks", fail)
        else:
            patch.setattr(harness.engine.model_runner, "sample_deferred", fail)
        harness.step()
    harness.run()
    failed = {name for name, answer in harness.answers.items() if answer.last.error is not None}
    assert failed and not failed & set(PENALTIES)
    for name in harness.answers.keys() - failed:
        assert harness.answers[name].token_ids == undisturbed[name]
    assert harness.all_blocks_available()


def test_requests_without_grammars_and_logprobs_are_not_deferred(plain: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(plain.checkpoint)
    calls: list[object] = []
    monkeypatch.setattr(harness.engine.model_runner, "sample_deferred", lambda *_: calls.append(0))
    monkeypatch.setattr(engine, "token_masks", lambda *_: calls.append(0))
    harness.run(*mixed_requests(harness))
    assert not calls


@pytest.mark.parametrize("max_tokens", [90, 200])
def test_a_phone_action_is_complete_with_and_without_forcing(
    plain: Pair, disable_forcing: Callable[[], None], max_tokens: int
) -> None:
    results = []
    for forcing in (True, False):
        if not forcing:
            disable_forcing()
        harness = Harness(plain.checkpoint)
        options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 1.0, "ignore_eos": False}
        options["response_format"] = '{"type": "phone_action"}'
        harness.run(*(harness.request(f"{i}", PROMPT, seed=i, **options) for i in range(12)))
        for answer in harness.answers.values():
            assert answer.last.finish_reason == "stop"
            assert answer.text.count("do(action=") + answer.text.count("finish(message=") == 1
        results.append(harness.token_ids)
    assert results[0] == results[1]


def test_a_schema_without_a_grammar_is_rejected(plain: Pair) -> None:
    harness = Harness(plain.checkpoint)
    harness.run(harness.request("a", PROMPT, response_format=schema({"type": "nonsense"})))
    error = harness.answers["a"].last.error
    assert error is not None and error.code == ErrorCode.INVALID_ARGUMENT and "response_format" in error.message
