"""The scheduler: chunks and budgets by example, and properties of whole runs with random requests."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoglm.config import EngineConfig
from autoglm.errors import ErrorCode, RequestError
from autoglm.llm.scheduler import MAX_MIXED_PROMPTS
from tests.llm.simulation import Simulation, answer_alone

CONFIG = EngineConfig(
    block_size=4, max_batch_size=4, max_tokens_per_step=32, max_tokens_per_mixed_step=16, max_queue_size=100
)


def simulation(num_blocks: int = 64, **changes: Any) -> Simulation:
    return Simulation(replace(CONFIG, **changes), num_blocks)


def lengths(sim: Simulation) -> list[int]:
    return [chunk.length for chunk, _ in sim.in_flight]


def test_a_prompt_is_cut_into_chunks_of_the_budget() -> None:
    sim = simulation()
    sim.submit("a", list(range(75)), 2)
    seen = []
    while sim.busy:
        sim.step()
        seen.append(lengths(sim))
    assert seen == [[32], [32], [11], [1], []]
    assert sim.answer("a") == answer_alone(list(range(75)), 2)


def test_decoding_sequences_come_first_and_prompts_share_the_smaller_budget() -> None:
    sim = simulation()
    sim.submit("decoding", [1], 20)
    sim.step()
    sim.submit("prompt", list(range(40)), 1)
    sim.step()
    assert lengths(sim) == [1, 12]  # 16 rows less the 4 that are reserved for decoding sequences
    assert [chunk.decodes for chunk, _ in sim.in_flight] == [True, False]


def test_a_mixed_pass_takes_few_prompts() -> None:
    sim = simulation(max_batch_size=16, max_tokens_per_step=64, max_tokens_per_mixed_step=64)
    sim.submit("decoding", [1], 20)
    sim.step()
    for number in range(12):
        sim.submit(f"{number}", [number], 1)
    sim.step()
    assert len(lengths(sim)) == 1 + MAX_MIXED_PROMPTS


def test_admission_needs_room_for_the_longest_answer() -> None:
    sim = simulation(num_blocks=8)
    sim.submit("first", [1] * 8, 13)  # 20 stored tokens, 5 blocks
    sim.submit("second", [2] * 8, 13)
    sim.step()
    assert [s.request.request_id for s in sim.scheduler.running] == ["first"]
    sim.run()
    assert sim.answer("second") == answer_alone([2] * 8, 13)


def test_a_cached_prefix_is_not_computed_again() -> None:
    sim = simulation()
    prompt = list(range(20))
    sim.submit("a", prompt, 1)
    sim.run()
    sequence = sim.submit("b", prompt, 1)
    sim.step()
    assert lengths(sim) == [4]  # the last token's logits are needed, so its block is computed
    assert sequence.num_cached_tokens == 16


def test_without_a_prefix_cache_everything_is_computed() -> None:
    sim = simulation(prefix_cache=False)
    for name in "ab":
        sim.submit(name, list(range(20)), 1)
        sim.run()
    assert sim.scheduler.pool.num_evictable == 0


def test_an_urgent_request_preempts_the_latest_of_the_least_urgent() -> None:
    sim = simulation(max_batch_size=2)
    low = [sim.submit(name, [ord(name)], 30, priority=9) for name in "ab"]
    sim.step()
    sim.submit("urgent", [7], 2, priority=1)
    sim.step()
    assert [s.request.request_id for s in sim.scheduler.running] == ["a", "urgent"]
    assert sim.scheduler.waiting == [low[1]]
    sim.run()
    assert sim.answer("b") == answer_alone([ord("b")], 30)


def test_equal_priority_does_not_preempt() -> None:
    sim = simulation(max_batch_size=1)
    sim.submit("a", [1], 10)
    sim.step()
    sim.submit("b", [2], 1)
    sim.step()
    assert [s.request.request_id for s in sim.scheduler.running] == ["a"]


def test_nothing_is_preempted_if_it_would_not_make_enough_room() -> None:
    sim = simulation(num_blocks=8)
    sim.submit("same", [1] * 4, 13, priority=1)
    sim.submit("low", [2] * 4, 8, priority=9)
    sim.step()
    sim.submit("urgent", [3] * 20, 8, priority=1)
    sim.step()
    assert {s.request.request_id for s in sim.scheduler.running} == {"same", "low"}


def test_a_full_queue_rejects() -> None:
    sim = simulation(max_queue_size=1)
    sim.submit("a", [1], 1)
    with pytest.raises(RequestError, match=r"the queue is full: 1 requests are waiting") as rejected:
        sim.submit("b", [1], 1)
    assert rejected.value.code == ErrorCode.UNAVAILABLE


def test_a_request_that_never_fits_is_rejected() -> None:
    with pytest.raises(RequestError, match=r"must fit into the 2 blocks .* \(got 13 tokens, which need 3;") as rejected:
        simulation(num_blocks=2).submit("a", [1] * 10, 3)
    assert rejected.value.code == ErrorCode.INVALID_ARGUMENT


requests = st.lists(
    st.tuples(
        st.integers(0, 2),  # which of three common prefixes
        st.integers(1, 40),  # length of the prompt
        st.integers(1, 20),  # max_tokens
        st.sampled_from([1, 5, 9]),  # priority
        st.integers(0, 3),  # steps before the next request
        st.sampled_from(["", "", "", "cancel", "preempt"]),  # what happens to a running sequence then
    ),
    min_size=1,
    max_size=14,
)
configs: st.SearchStrategy[dict[str, Any]] = st.builds(
    dict,
    max_batch_size=st.integers(1, 6),
    max_tokens_per_step=st.integers(1, 40),
    max_tokens_per_mixed_step=st.integers(1, 40),
    block_size=st.sampled_from([1, 4, 16]),
    prefix_cache=st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(requests=requests, config=configs, spare_blocks=st.integers(0, 60))
def test_random_runs(requests: list[tuple[int, int, int, int, int, str]], config: Any, spare_blocks: int) -> None:
    """No block is lost or read with another's content, every request ends, and its tokens are those it has alone."""
    largest = max(-(-(length + max_tokens) // config["block_size"]) for _, length, max_tokens, *_ in requests)
    sim = simulation(num_blocks=largest + spare_blocks, **config)
    expected, cancelled = {}, set()
    for number, (prefix, length, max_tokens, priority, steps, event) in enumerate(requests):
        name, prompt = f"r{number}", [prefix] * (length // 2) + [number % 3] * (length - length // 2)
        expected[name] = answer_alone(prompt, max_tokens)
        sim.submit(name, prompt, max_tokens, priority)
        for _ in range(steps):
            sim.step()
        victims = list(sim.scheduler.running)
        if event == "cancel" and victims:
            cancelled.add(victims[-1].request.request_id)
            sim.scheduler.remove(victims[-1])
        elif event == "preempt" and victims:
            sim.scheduler.preempt(victims[0])
    sim.run()
    for name, tokens in expected.items():
        assert sim.answer(name) == (tokens[: len(sim.answer(name))] if name in cancelled else tokens)
        assert name in cancelled or sim.outputs[name][-1].finish_reason == "length"
    sim.scheduler.check_integrity()
    assert sim.scheduler.pool.num_available == sim.scheduler.pool.num_blocks


@settings(max_examples=60, deadline=None)
@given(priorities=st.lists(st.integers(1, 10), min_size=1, max_size=12), max_batch_size=st.integers(1, 3))
def test_priorities_hold(priorities: list[int], max_batch_size: int) -> None:
    """Requests that wait together are admitted by priority, then by arrival."""
    sim = simulation(max_batch_size=max_batch_size)
    for number, priority in enumerate(priorities):
        sim.submit(f"{number}", [number] * 3, 2, priority)
    sim.run()
    order = sorted(range(len(priorities)), key=lambda number: (priorities[number], number))
    assert sim.admitted == [str(number) for number in order]
