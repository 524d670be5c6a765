"""The engine returns the tokens of transformers, however requests are batched, chunked, cached or cancelled."""

import random
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from autoglm.checkpoint import Checkpoint
from autoglm.errors import ErrorCode
from autoglm.llm.model import Attention
from autoglm.llm.sequence import Request
from tests.checkpoints import Shape, make_checkpoint
from tests.conftest import Pair
from tests.llm.harness import Harness
from tests.prompts import GRIDS, random_pixels, random_prompt, random_text


@pytest.mark.parametrize("images", GRIDS)
def test_greedy_tokens_equal_those_of_transformers(pair: Pair, images: str) -> None:
    grids = GRIDS[images]
    ids = random_prompt(pair.checkpoint, grids, 5)
    tensor = torch.tensor([ids])
    inputs = {"input_ids": tensor, "mm_token_type_ids": (tensor == pair.checkpoint.image_token_id).int()}
    if grids:
        inputs |= {"pixel_values": random_pixels(grids, 6), "image_grid_thw": torch.tensor(grids)}
    expected = pair.reference.generate(**inputs, max_new_tokens=64, do_sample=False, eos_token_id=-1)
    harness = Harness(pair.checkpoint)
    harness.run(harness.request("a", ids, grids, 6, max_tokens=64))
    assert harness.answers["a"].token_ids == expected[0, len(ids) :].tolist()
    assert harness.answers["a"].last.finish_reason == "length"


def mixed_requests(harness: Harness) -> list[Request]:
    """32 different requests: with and without images, short and long, greedy with penalties and sampled."""
    kinds = list(GRIDS)
    return [
        harness.random_request(
            f"r{i}", i, GRIDS[kinds[i % 4]], max_tokens=4 + i % 13, frequency_penalty=0.2 * (i % 2),
            temperature=0.9 * (i % 3 == 0), seed=i, top_p=(0.95, 1.0)[i % 2], top_k=(0, 20)[i % 9 == 0],
            repetition_penalty=1.1 if i % 5 == 0 else 1.0,
        )
        for i in range(32)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def one_by_one(plain: Pair) -> dict[str, list[int]]:
    harness = Harness(plain.checkpoint)
    for request in mixed_requests(harness):
        harness.run(request)
    return harness.token_ids


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_batching_does_not_change_the_tokens(plain: Pair, one_by_one: dict[str, list[int]], prefix_cache: bool) -> None:
    harness = Harness(plain.checkpoint, prefix_cache=prefix_cache)
    harness.run(*mixed_requests(harness))
    assert harness.token_ids == one_by_one
    assert harness.all_blocks_available()


@pytest.mark.parametrize("seed", range(3))
def test_cancellations_do_not_affect_other_requests(plain: Pair, one_by_one: dict[str, list[int]], seed: int) -> None:
    """In random order, with a pool too small for all requests at once."""
    harness = Harness(plain.checkpoint, kv_cache_mb=1, max_batch_size=6, max_tokens_per_step=24)
    rng = random.Random(seed)
    requests = mixed_requests(harness)
    rng.shuffle(requests)
    cancelled = set()
    for request in requests:
        harness.submit(request)
        harness.step()
        if rng.random() < 0.3:
            victims = [s for s in harness.engine.scheduler if s.request.request_id not in cancelled]
            if victims:
                victim = rng.choice(victims)
                harness.cancel(victim.request.request_id)
                cancelled.add(victim.request.request_id)
    harness.run()
    for name, answer in harness.answers.items():
        reason = answer.last.finish_reason
        assert reason == ("cancelled" if name in cancelled else "length")
        assert answer.token_ids == one_by_one[name][: len(answer.token_ids)]
        assert name in cancelled or answer.token_ids == one_by_one[name]
    assert cancelled
    assert harness.all_blocks_available()


@pytest.mark.parametrize("options", [{"frequency_penalty": 0.2}, {"temperature": 1.0, "seed": 3, "top_p": 0.9}])
@pytest.mark.parametrize("budget", [1, 7, 16, 1000])
def test_chunked_prefill_does_not_change_the_tokens(plain: Pair, budget: int, options: dict[str, float]) -> None:
    grids = [(1, 10, 8), (1, 4, 6)]
    prompt = random_prompt(plain.checkpoint, grids, 3, before=90)
    results = []
    for tokens in (2048, budget):
        harness = Harness(plain.checkpoint, max_tokens_per_step=tokens)
        harness.run(harness.request("a", prompt, grids, 9, max_tokens=12, **options))
        results.append(harness.answers["a"].token_ids)
        assert harness.engine.stats.steps >= len(prompt) // tokens
    assert results[0] == results[1]


def test_a_shared_text_prefix_is_computed_once(plain: Pair) -> None:
    harness = Harness(plain.checkpoint)
    prefix = random_text(40, 1)
    harness.run(harness.request("a", prefix + random_text(5, 2)))
    harness.run(harness.request("b", prefix + random_text(5, 3)))
    usage = [harness.answers[name].last.usage for name in "ab"]
    assert [u.cached_tokens for u in usage if u] == [0, 40]
    assert harness.engine.stats.cached_tokens == 40
    fresh = Harness(plain.checkpoint)
    fresh.run(fresh.request("b", prefix + random_text(5, 3)))
    assert harness.answers["b"].token_ids == fresh.answers["b"].token_ids


def test_a_cached_image_is_reused_but_not_for_another_image_in_its_place(plain: Pair) -> None:
    harness = Harness(plain.checkpoint)
    grids = GRIDS["two"]
    prompt = random_prompt(plain.checkpoint, grids, 1)
    first_image = prompt.index(plain.checkpoint.image_token_id)
    for name, pixel_seed in (("a", 1), ("again", 1), ("other", 2)):
        harness.run(harness.request(name, [*prompt, *random_text(3, pixel_seed)], grids, pixel_seed))
    cached = {name: answer.last.usage.cached_tokens for name, answer in harness.answers.items() if answer.last.usage}
    assert cached["a"] == 0
    assert cached["again"] == (len(prompt) + 2) // 4 * 4
    assert cached["other"] <= first_image
    fresh = Harness(plain.checkpoint)
    fresh.run(fresh.request("other", [*prompt, *random_text(3, 2)], grids, 2))
    assert harness.answers["other"].token_ids == fresh.answers["other"].token_ids
    assert harness.answers["other"].token_ids != harness.answers["a"].token_ids


def test_the_last_token_of_a_cached_prompt_is_computed_again(plain: Pair) -> None:
    harness = Harness(plain.checkpoint)
    prompt = random_text(48, 1)
    harness.run(harness.request("a", prompt))
    harness.run(harness.request("b", prompt))
    assert harness.answers["a"].token_ids == harness.answers["b"].token_ids
    usage = harness.answers["b"].last.usage
    assert usage is not None and usage.cached_tokens == 44


def test_an_answer_is_cached_for_the_next_turn(plain: Pair) -> None:
    harness = Harness(plain.checkpoint)
    prompt = random_text(10, 1)
    harness.run(harness.request("a", prompt, max_tokens=31))
    harness.run(harness.request("b", prompt + harness.answers["a"].token_ids + random_text(4, 2)))
    usage = harness.answers["b"].last.usage
    assert usage is not None and usage.cached_tokens == 40


def test_preemption_recomputes_the_same_tokens(plain: Pair, one_by_one: dict[str, list[int]]) -> None:
    """By an urgent request."""
    harness = Harness(plain.checkpoint, max_batch_size=4)
    requests = mixed_requests(harness)
    victims = [r for r in requests if r.request_id in ("r9", "r10", "r11", "r12")]
    harness.submit(*victims)
    scheduler = harness.engine.scheduler
    while len(scheduler.running) < 4 or not scheduler.running[-1].num_pending:
        harness.step()
    preempted = scheduler.running[-1]
    assert preempted.num_pending == 1
    known = len(preempted.token_ids)
    harness.submit(harness.random_request("urgent", 50, priority=1, max_tokens=3))
    harness.step()
    assert "urgent" in [s.request.request_id for s in scheduler.running]
    # The token that was in flight is kept.
    assert scheduler.waiting == [preempted] and (len(preempted.token_ids), preempted.num_pending) == (known + 1, 0)
    harness.run()
    for request in victims:
        assert harness.answers[request.request_id].token_ids == one_by_one[request.request_id]
    assert harness.all_blocks_available()


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preempted_sequences_resume_only_after_their_pass_in_flight(
    plain: Pair, one_by_one: dict[str, list[int]], prefix_cache: bool
) -> None:
    """Preempted in random steps, with room to resume at once."""
    harness = Harness(plain.checkpoint, max_tokens_per_step=100, prefix_cache=prefix_cache)
    rng = random.Random(2)
    harness.submit(*mixed_requests(harness))
    scheduler = harness.engine.scheduler
    for _ in range(80):
        for sequence in [s for s in scheduler.running if rng.random() < 0.15]:
            scheduler.preempt(sequence)
        harness.step()
    harness.run()
    assert harness.token_ids == one_by_one
    assert harness.all_blocks_available()


def test_requests_are_served_by_priority(plain: Pair) -> None:
    harness = Harness(plain.checkpoint, max_batch_size=1)
    harness.submit(*(harness.random_request(f"p{p}", p, priority=p, max_tokens=2) for p in (9, 3, 7, 1)))
    order = []
    while harness.engine.busy:
        harness.step()
        order += [name for name, answer in harness.answers.items() if answer.ended and name not in order]
    assert order == ["p1", "p3", "p7", "p9"]


def test_requests_that_cannot_be_queued_are_rejected(plain: Pair) -> None:
    harness = Harness(plain.checkpoint, max_queue_size=2, max_context=100, kv_cache_mb=1)
    harness.submit(harness.request("long", random_text(100, 1)), harness.request("empty", []))
    harness.submit(*(harness.request(f"q{i}", random_text(5, i)) for i in range(3)))
    errors = {name: answer.last.error for name, answer in harness.answers.items() if answer.outputs}
    assert {name: error.code for name, error in errors.items() if error} == {
        "long": ErrorCode.INVALID_ARGUMENT,
        "empty": ErrorCode.INVALID_ARGUMENT,
        "q2": ErrorCode.UNAVAILABLE,
    }
    assert str(errors["long"]) == "prompt must be at most 99 tokens, one less than the context of 100 (got 100 tokens)"
    harness.run()
    assert harness.answers["q1"].last.finish_reason == "length"


@pytest.mark.parametrize("grid", [(1, 0, 0), (1, -2, -2), (1, 3, 4)])
def test_an_impossible_grid_is_rejected(plain: Pair, grid: tuple[int, int, int]) -> None:
    harness = Harness(plain.checkpoint)
    request = harness.random_request("a", 1)
    harness.run(replace(request, image_grids=[grid], image_hashes=[b"x"]))
    error = harness.answers["a"].last.error
    assert error is not None and error.code == ErrorCode.INVALID_ARGUMENT and "multiples of 2" in error.message


def test_a_request_that_cannot_be_processed_fails_alone(plain: Pair) -> None:
    harness = Harness(plain.checkpoint)
    harness.run(replace(harness.random_request("broken", 1), image_hashes=[b"a hash without an image"]))
    error = harness.answers["broken"].last.error
    assert error is not None and error.code == ErrorCode.INTERNAL
    harness.run(harness.random_request("next", 1))
    assert harness.answers["next"].last.finish_reason == "length"


def test_an_answer_ends_at_max_context(plain: Pair) -> None:
    harness = Harness(plain.checkpoint, max_context=20)
    harness.run(harness.request("a", random_text(15, 1), max_tokens=3000))
    assert len(harness.answers["a"].token_ids) == 5
    assert harness.answers["a"].last.finish_reason == "length"


def test_running_and_waiting_requests_time_out(plain: Pair) -> None:
    harness = Harness(plain.checkpoint, max_batch_size=1)
    harness.submit(*(harness.random_request(n, 1, max_tokens=1000, timeout=30_000) for n in ("running", "waiting")))
    harness.step()
    time.sleep(0.04)
    harness.engine.expire()
    assert [harness.answers[n].last.finish_reason for n in ("running", "waiting")] == ["timeout", "timeout"]
    assert harness.all_blocks_available()


@pytest.mark.parametrize("method", ["launch", "collect"])
def test_a_failing_pass_fails_its_own_requests_only(plain: Pair, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    harness = Harness(plain.checkpoint)

    def fail(*_: object) -> None:
        raise RuntimeError("no such kernel")

    with monkeypatch.context() as patch:
        patch.setattr(harness.engine.model_runner, method, fail)
        harness.run(harness.random_request("a", 1))
    error = harness.answers["a"].last.error
    assert (
        error is not None
        and error.code == ErrorCode.INTERNAL
        and str(error) == "the language model failed (RuntimeError); see the log"
    )
    harness.run(harness.random_request("b", 1))
    assert harness.answers["b"].last.finish_reason == "length"
    assert harness.all_blocks_available()


def test_out_of_memory_fails_the_prompts_of_the_pass_only(
    plain: Pair, one_by_one: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(plain.checkpoint, max_tokens_per_step=1000, max_tokens_per_mixed_step=1000)
    decoding = mixed_requests(harness)[8:11]
    harness.submit(*decoding)
    model = harness.engine.model_runner.model
    forward = model.forward

    def fail_if_large(hidden: torch.Tensor, attention: Attention) -> torch.Tensor:
        result = forward(hidden, attention)
        if len(hidden) > 300:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return result

    monkeypatch.setattr(model, "forward", fail_if_large)
    harness.step()
    harness.step()
    harness.run(*(harness.request(f"big{i}", random_text(200, i)) for i in range(2)))
    for i in range(2):
        error = harness.answers[f"big{i}"].last.error
        assert error is not None and error.code == ErrorCode.UNAVAILABLE
        assert str(error) == "the GPU has too little free memory for this request"
    for request in decoding:
        assert harness.answers[request.request_id].token_ids == one_by_one[request.request_id]
    harness.run(harness.request("next", random_text(200, 0)))
    assert harness.answers["next"].last.finish_reason == "length"
    assert harness.all_blocks_available()


@pytest.mark.parametrize(
    ("part", "method", "error"),
    [
        ("scheduler", "schedule", RuntimeError("block 3 is lost")),
        ("model_runner", "collect", torch.AcceleratorError("lost")),
    ],
)
def test_an_error_of_the_engine_fails_present_and_future_requests(
    plain: Pair, monkeypatch: pytest.MonkeyPatch, part: str, method: str, error: Exception
) -> None:
    """The engine can still be closed."""
    harness = Harness(plain.checkpoint, max_batch_size=1)
    engine = harness.engine
    for name in ("running", "waiting"):
        engine.submit(harness.random_request(name, 1, max_tokens=1900))
    owner = getattr(engine, part)
    original, calls = getattr(owner, method), iter(range(10**6))

    def fail_later(*arguments: Any) -> Any:
        if next(calls) == 5:
            raise error
        return original(*arguments)

    monkeypatch.setattr(owner, method, fail_later)
    engine.start()
    harness.wait()
    engine.submit(harness.random_request("later", 1))
    harness.wait()
    for answer in harness.answers.values():
        assert answer.last.error is not None
        assert answer.last.error.message == f"the engine has stopped ({type(error).__name__}); see the log"
    engine.close()


def test_the_thread_answers_cancels_and_closes_with_unfinished_requests(plain: Pair) -> None:
    harness = Harness(plain.checkpoint)
    engine, num_threads = harness.engine, num_engine_threads()
    engine.start()
    for name in ("short", "cancel-me", "closed"):
        engine.submit(harness.random_request(name, 1, max_tokens=4 if name == "short" else 1900))
    harness.wait("short")
    engine.cancel("cancel-me")
    engine.cancel("unknown")
    harness.wait("cancel-me")
    assert harness.answers["cancel-me"].last.finish_reason == "cancelled"
    assert num_engine_threads() == num_threads + 1
    engine.close()
    assert harness.answers["closed"].last.finish_reason == "cancelled"
    assert num_engine_threads() == num_threads
    assert harness.all_blocks_available()


def num_engine_threads() -> int:
    return sum(thread.name == "engine" for thread in threading.enumerate())


@pytest.mark.parametrize("ends_at_answer", [True, False])
def test_the_answer_tag_is_never_part_of_the_text(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, ends_at_answer: bool
) -> None:
    """`</answer>` ends the answer if the checkpoint lists it as an end token; otherwise it is skipped."""
    directory = tmp_path_factory.mktemp("ends")
    make_checkpoint(directory, Shape(ends_at_answer=ends_at_answer))
    harness = Harness(Checkpoint.open(directory))
    tag = harness.engine.vocabulary.tokenizer.token_to_id("</answer>")
    assert tag is not None
    model = harness.engine.model_runner.model
    weight = model.lm_head.weight
    assert isinstance(weight, torch.Tensor)
    weight[tag] = 0  # the tag's logit is 0, all others are negative
    weight[:tag] = weight[tag + 1 :] = -model.norm.weight
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: logits(hidden.abs()))
    harness.run(harness.random_request("a", 1, ignore_eos=False, max_tokens=5))
    answer = harness.answers["a"]
    assert answer.token_ids == ([tag] if ends_at_answer else [tag] * 5)
    assert answer.last.finish_reason == ("stop" if ends_at_answer else "length")
    assert answer.text == ""
