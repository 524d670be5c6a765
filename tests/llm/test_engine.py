"""The engine: the same tokens as transformers, however requests are batched, chunked, cached or cancelled."""

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from autoglm.checkpoint import Checkpoint
from autoglm.errors import ErrorCode
from autoglm.llm.input_batch import Batch
from autoglm.llm.sequence import Output, Request
from autoglm.llm.sparse.attention import View
from tests.checkpoints import Shape, make_checkpoint
from tests.conftest import Pair
from tests.llm.harness import Harness
from tests.prompts import GRIDS, random_pixels, random_prompt, random_text


@pytest.mark.parametrize("images", GRIDS)
def test_greedy_equals_transformers(pair: Pair, images: str) -> None:
    grids = GRIDS[images]
    ids = random_prompt(pair.checkpoint, grids, 5)
    tensor = torch.tensor([ids])
    inputs = {"input_ids": tensor, "mm_token_type_ids": (tensor == pair.checkpoint.image_token_id).int()}
    if grids:
        inputs |= {"pixel_values": random_pixels(grids, 6), "image_grid_thw": torch.tensor(grids)}
    wanted = pair.reference.generate(**inputs, max_new_tokens=64, do_sample=False, eos_token_id=-1)
    harness = Harness(pair.checkpoint)
    harness.run(harness.request("a", ids, grids, 6, max_tokens=64))
    assert harness.answers["a"].token_ids == wanted[0, len(ids) :].tolist()
    assert harness.answers["a"].last.finish_reason == "length"


def mixed_requests(harness: Harness) -> list[Request]:
    """32 requests, no two alike: with and without images, short and long, greedy with penalties and sampled."""
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
    return {name: answer.token_ids for name, answer in harness.answers.items()}


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_together_as_alone(plain: Pair, one_by_one: dict[str, list[int]], prefix_cache: bool) -> None:
    harness = Harness(plain.checkpoint, prefix_cache=prefix_cache)
    harness.run(*mixed_requests(harness))
    assert {name: answer.token_ids for name, answer in harness.answers.items()} == one_by_one
    assert harness.all_blocks_back()


@pytest.mark.parametrize("seed", range(3))
def test_random_order_with_cancellations(plain: Pair, one_by_one: dict[str, list[int]], seed: int) -> None:
    """What is not cancelled is untouched by what is, on a pool so small that not all fit at once."""
    harness = Harness(plain.checkpoint, kv_cache_mb=1, max_batch_size=6, max_tokens_per_step=24)
    chance = random.Random(seed)
    requests = mixed_requests(harness)
    chance.shuffle(requests)
    cancelled = set()
    for request in requests:
        harness.submit(request)
        harness.step()
        if chance.random() < 0.3:
            victims = [s for s in harness.engine.scheduler if s.request.request_id not in cancelled]
            if victims:
                victim = chance.choice(victims)
                harness.engine._finish(victim, "cancelled")
                cancelled.add(victim.request.request_id)
    harness.run()
    for name, answer in harness.answers.items():
        reason = answer.last.finish_reason
        assert reason == ("cancelled" if name in cancelled else "length")
        assert answer.token_ids == one_by_one[name][: len(answer.token_ids)]
        assert name in cancelled or answer.token_ids == one_by_one[name]
    assert cancelled
    assert harness.all_blocks_back()


@pytest.mark.parametrize("options", [{"frequency_penalty": 0.2}, {"temperature": 1.0, "seed": 3, "top_p": 0.9}])
@pytest.mark.parametrize("budget", [1, 7, 16, 1000])
def test_chunked_prefill(plain: Pair, budget: int, options: dict[str, float]) -> None:
    grids = [(1, 10, 8), (1, 4, 6)]
    prompt = random_prompt(plain.checkpoint, grids, 3, before=90)
    results = []
    for tokens in (2048, budget):
        harness = Harness(plain.checkpoint, max_tokens_per_step=tokens)
        harness.run(harness.request("a", prompt, grids, 9, max_tokens=12, **options))
        results.append(harness.answers["a"].token_ids)
        assert harness.engine.stats.steps >= len(prompt) // tokens
    assert results[0] == results[1]


def test_shared_text_prefix_is_computed_once(plain: Pair) -> None:
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


def test_shared_image_prefix_and_another_image_in_its_place(plain: Pair) -> None:
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


def test_whole_prompt_cached(plain: Pair) -> None:
    """The same request again computes at least its last token, and answers alike."""
    harness = Harness(plain.checkpoint)
    prompt = random_text(48, 1)
    harness.run(harness.request("a", prompt))
    harness.run(harness.request("b", prompt))
    assert harness.answers["a"].token_ids == harness.answers["b"].token_ids
    usage = harness.answers["b"].last.usage
    assert usage is not None and usage.cached_tokens == 44


def test_answer_is_cached_for_the_next_turn(plain: Pair) -> None:
    harness = Harness(plain.checkpoint)
    prompt = random_text(10, 1)
    harness.run(harness.request("a", prompt, max_tokens=31))
    harness.run(harness.request("b", prompt + harness.answers["a"].token_ids + random_text(4, 2)))
    usage = harness.answers["b"].last.usage
    assert usage is not None and usage.cached_tokens == 40


def test_preemption_recomputes_the_same_tokens(plain: Pair, one_by_one: dict[str, list[int]]) -> None:
    """An urgent request pushes out running ones; they come back and end as if nothing had happened."""
    harness = Harness(plain.checkpoint, max_batch_size=4)
    requests = mixed_requests(harness)
    low = [r for r in requests if r.request_id in ("r9", "r10", "r11", "r12")]
    harness.submit(*low)
    scheduler = harness.engine.scheduler
    while len(scheduler.running) < 4 or not scheduler.running[-1].pending:
        harness.step()
    pushed_out = scheduler.running[-1]
    assert pushed_out.pending == 1
    known = len(pushed_out.tokens)
    harness.submit(harness.random_request("urgent", 50, priority=1, max_tokens=3))
    harness.step()
    assert "urgent" in [s.request.request_id for s in scheduler.running]
    # What it had in flight has come and counts.
    assert scheduler.waiting == [pushed_out] and (len(pushed_out.tokens), pushed_out.pending) == (known + 1, 0)
    harness.run()
    for request in low:
        assert harness.answers[request.request_id].token_ids == one_by_one[request.request_id]
    assert harness.all_blocks_back()


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_nobody_comes_back_before_what_was_in_flight(
    plain: Pair, one_by_one: dict[str, list[int]], prefix_cache: bool
) -> None:
    """Pushed out at any time, with room to come back at once."""
    harness, chance = Harness(plain.checkpoint, max_tokens_per_step=100, prefix_cache=prefix_cache), random.Random(2)
    harness.submit(*mixed_requests(harness))
    scheduler = harness.engine.scheduler
    for _ in range(80):
        for sequence in [s for s in scheduler.running if chance.random() < 0.15]:
            scheduler._preempt(sequence)
        harness.step()
    harness.run()
    assert {name: answer.token_ids for name, answer in harness.answers.items()} == one_by_one
    assert harness.all_blocks_back()


def test_urgent_requests_come_first(plain: Pair) -> None:
    harness = Harness(plain.checkpoint, max_batch_size=1)
    harness.submit(*(harness.random_request(f"p{p}", p, priority=p, max_tokens=2) for p in (9, 3, 7, 1)))
    order = []
    while harness.engine.busy:
        harness.step()
        order += [n for n, a in harness.answers.items() if a.pieces and a.pieces[-1].is_last and n not in order]
    assert order == ["p1", "p3", "p7", "p9"]


def test_refusals(plain: Pair) -> None:
    harness = Harness(plain.checkpoint, max_queue_size=2, max_context=100, kv_cache_mb=1)
    harness.submit(harness.request("long", random_text(100, 1)), harness.request("empty", []))
    harness.submit(*(harness.request(f"q{i}", random_text(5, i)) for i in range(3)))
    errors = {name: answer.last.error for name, answer in harness.answers.items() if answer.pieces}
    assert {name: error.code for name, error in errors.items() if error} == {
        "long": ErrorCode.INVALID_ARGUMENT,
        "empty": ErrorCode.INVALID_ARGUMENT,
        "q2": ErrorCode.UNAVAILABLE,
    }
    assert "100 tokens" in str(errors["long"])
    harness.run()
    assert harness.answers["q1"].last.finish_reason == "length"


@pytest.mark.parametrize("grid", [(1, 0, 0), (1, -2, -2), (1, 3, 4)])
def test_impossible_grid_is_refused(plain: Pair, grid: tuple[int, int, int]) -> None:
    harness = Harness(plain.checkpoint)
    request = harness.random_request("a", 1)
    harness.run(replace(request, grids=[grid], digests=[b"x"]))
    error = harness.answers["a"].last.error
    assert error is not None and error.code == ErrorCode.INVALID_ARGUMENT and "multiples of 2" in error.message


def test_whatever_a_request_brings_is_its_own_fault(plain: Pair) -> None:
    harness = Harness(plain.checkpoint)
    harness.run(replace(harness.random_request("odd", 1), digests=[b"a digest without an image"]))
    error = harness.answers["odd"].last.error
    assert error is not None and error.code == ErrorCode.INTERNAL
    harness.run(harness.random_request("next", 1))
    assert harness.answers["next"].last.finish_reason == "length"


def test_answer_ends_at_the_context(plain: Pair) -> None:
    harness = Harness(plain.checkpoint, max_context=20)
    harness.run(harness.request("a", random_text(15, 1), max_tokens=3000))
    assert len(harness.answers["a"].token_ids) == 5
    assert harness.answers["a"].last.finish_reason == "length"


def test_deadline_of_running_and_waiting(plain: Pair) -> None:
    harness = Harness(plain.checkpoint, max_batch_size=1)
    harness.submit(*(harness.random_request(n, 1, max_tokens=1000, timeout=30_000) for n in ("running", "waiting")))
    harness.step()
    time.sleep(0.04)
    harness.engine._expire()
    assert [harness.answers[n].last.finish_reason for n in ("running", "waiting")] == ["timeout", "timeout"]
    assert harness.all_blocks_back()


@pytest.mark.parametrize("method", ["launch", "collect"])
def test_a_failing_pass_ends_its_requests_only(plain: Pair, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    harness = Harness(plain.checkpoint)

    def fail(*_: object) -> None:
        raise RuntimeError("no such kernel")

    with monkeypatch.context() as patch:
        patch.setattr(harness.engine.runner, method, fail)
        harness.run(harness.random_request("a", 1))
    error = harness.answers["a"].last.error
    assert error is not None and error.code == ErrorCode.INTERNAL and "no such kernel" in str(error)
    harness.run(harness.random_request("b", 1))
    assert harness.answers["b"].last.finish_reason == "length"
    assert harness.all_blocks_back()


def test_too_little_memory_ends_the_prompts_of_its_pass_only(
    plain: Pair, one_by_one: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(plain.checkpoint, max_tokens_per_step=1000, max_tokens_per_mixed_step=1000)
    few = mixed_requests(harness)[8:11]
    harness.submit(*few)
    forward = harness.engine.runner._forward

    def fail_with_many(hidden: torch.Tensor, batch: Batch, views: Sequence[View]) -> torch.Tensor:
        result = forward(hidden, batch, views)
        if len(hidden) > 300:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return result

    monkeypatch.setattr(harness.engine.runner, "_forward", fail_with_many)
    harness.step()
    harness.step()
    harness.run(*(harness.request(f"big{i}", random_text(200, i)) for i in range(2)))
    for i in range(2):
        error = harness.answers[f"big{i}"].last.error
        assert error is not None and error.code == ErrorCode.UNAVAILABLE
        assert str(error).startswith("the GPU has not enough memory for this request")
    for request in few:
        assert harness.answers[request.request_id].token_ids == one_by_one[request.request_id]
    harness.run(harness.request("next", random_text(200, 0)))
    assert harness.answers["next"].last.finish_reason == "length"
    assert harness.all_blocks_back()


@pytest.mark.parametrize(
    "part, method, error",
    [("scheduler", "schedule", RuntimeError("block 3 is lost")), ("runner", "collect", torch.AcceleratorError("lost"))],
)
def test_a_fault_of_the_engine_hangs_nobody(
    plain: Pair, monkeypatch: pytest.MonkeyPatch, part: str, method: str, error: Exception
) -> None:
    """Whoever runs, waits or comes later is told; and the engine can still be closed."""
    harness = Harness(plain.checkpoint, max_batch_size=1)
    engine = harness.engine
    for name in ("running", "waiting"):
        engine.submit(harness.random_request(name, 1, max_tokens=1900))
    owner = getattr(engine, part)
    usual, calls = getattr(owner, method), iter(range(10**6))

    def fail_later(*arguments: Any) -> Any:
        if next(calls) == 5:
            raise error
        return usual(*arguments)

    monkeypatch.setattr(owner, method, fail_later)
    engine.start()
    wait_for(lambda: ended(harness.answers["running"].pieces) and ended(harness.answers["waiting"].pieces))
    engine.submit(harness.random_request("later", 1))
    wait_for(lambda: ended(harness.answers["later"].pieces))
    for answer in harness.answers.values():
        assert answer.last.error is not None and "lost" in answer.last.error.message
    engine.close()


def test_thread(plain: Pair) -> None:
    """Submitting from outside, cancelling by id, closing with work in hand."""
    harness = Harness(plain.checkpoint)
    engine = harness.engine
    engine.start()
    for name in ("short", "cancel-me", "closed"):
        engine.submit(harness.random_request(name, 1, max_tokens=4 if name == "short" else 1900))
    wait_for(lambda: ended(harness.answers["short"].pieces))
    engine.cancel("cancel-me")
    engine.cancel("nobody")
    wait_for(lambda: ended(harness.answers["cancel-me"].pieces))
    assert harness.answers["cancel-me"].last.finish_reason == "cancelled"
    engine.close()
    assert harness.answers["closed"].last.finish_reason == "cancelled"
    assert not engine._thread.is_alive()
    assert harness.all_blocks_back()


def ended(pieces: list[Output]) -> bool:
    return bool(pieces) and pieces[-1].is_last


def wait_for(condition, seconds: float = 20) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.mark.parametrize("ends_at_answer", [True, False])
def test_answer_tag_never_shows(tmp_path_factory: pytest.TempPathFactory, ends_at_answer: bool) -> None:
    """`</answer>` ends the answer where the checkpoint says so; where it does not, it is left out of the text."""
    directory = tmp_path_factory.mktemp("ends")
    make_checkpoint(directory, Shape(ends_at_answer=ends_at_answer))
    harness = Harness(Checkpoint.open(directory))
    tag = harness.engine.vocabulary.tokenizer.token_to_id("</answer>")
    assert tag is not None
    weight = harness.engine.runner.model.lm_head.weight
    assert isinstance(weight, torch.Tensor)
    weight[tag] = 0  # logits of 0 for the tag, everything else below
    weight[:tag] = weight[tag + 1 :] = -harness.engine.runner.model.norm.weight
    request = harness.random_request("a", 1, ignore_eos=False, max_tokens=5)
    run = harness.engine.runner.model.logits
    harness.engine.runner.model.logits = lambda hidden: run(hidden.abs())  # type: ignore[method-assign]
    harness.run(request)
    answer = harness.answers["a"]
    assert answer.token_ids == ([tag] if ends_at_answer else [tag] * 5)
    assert answer.last.finish_reason == ("stop" if ends_at_answer else "length")
    assert answer.text == ""
