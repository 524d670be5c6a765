"""Passes are launched before the previous one is read back; the tokens are still those of a sequential loop."""

import random
from typing import Any

import pytest
import torch

from autoglm.checkpoint import Checkpoint
from autoglm.llm.cuda_graphs import mixed_shapes
from autoglm.llm.input_batch import BatchShape
from autoglm.llm.sequence import Request
from tests.conftest import Pair
from tests.llm.harness import Harness
from tests.llm.test_engine import mixed_requests
from tests.prompts import random_text

PENALTIES: dict[str, dict[str, Any]] = {
    "none": {},
    "frequency": {"frequency_penalty": 0.2},
    "presence": {"presence_penalty": 0.7},
    "repetition": {"repetition_penalty": 1.4},
    "all": {"frequency_penalty": 0.4, "presence_penalty": -0.2, "repetition_penalty": 1.2},
}


def sequential_loop(reference: Any, prompt: list[int], count: int, options: dict[str, float]) -> list[int]:
    """Greedy tokens: the whole sequence is computed again for each, and penalties follow their definitions."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(penalized_logits(reference, tokens, len(prompt), options).argmax()))
    return tokens[len(prompt) :]


def penalized_logits(reference: Any, tokens: list[int], prompt_length: int, options: dict[str, float]) -> torch.Tensor:
    """The logits of the token after these, with penalties: fp64 [vocab_size]."""
    row: torch.Tensor = reference(input_ids=torch.tensor([tokens])).logits[0, -1].double()
    answer = tokens[prompt_length:]
    for token in set(tokens):
        penalty = options.get("repetition_penalty", 1.0)
        row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
    for token in set(answer):
        row[token] -= answer.count(token) * options.get("frequency_penalty", 0.0)
        row[token] -= options.get("presence_penalty", 0.0)
    return row


@pytest.fixture(scope="module")
def expected(plain: Pair) -> dict[str, list[int]]:
    """24 tokens for each kind of penalty."""
    return {
        name: sequential_loop(plain.reference, random_text(9, 1), 24, options) for name, options in PENALTIES.items()
    }


def penalized_requests(harness: Harness, **options: Any) -> list[Request]:
    return [
        harness.request(name, random_text(9, 1), max_tokens=24, **penalties, **options)
        for name, penalties in PENALTIES.items()
    ]


def test_penalties_equal_those_of_a_sequential_loop(plain: Pair, expected: dict[str, list[int]]) -> None:
    assert all(expected[name] != expected["none"] for name in PENALTIES if name != "none")
    harness = Harness(plain.checkpoint)
    harness.run(*penalized_requests(harness))
    assert harness.token_ids == expected


def test_penalties_survive_preemption(plain: Pair, expected: dict[str, list[int]]) -> None:
    harness = Harness(plain.checkpoint, max_batch_size=len(PENALTIES), max_tokens_per_step=500)
    harness.submit(*penalized_requests(harness))
    preempted = set()
    for step in range(30):
        if step % 6 > 2:
            harness.submit(harness.random_request(f"urgent{step}", step, priority=1, max_tokens=2))
        harness.step()
        waiting = [s for s in harness.engine.scheduler.waiting if len(s.token_ids) > s.prompt_length]
        preempted |= {sequence.request.request_id for sequence in waiting}
    harness.run()
    assert len(preempted) >= 3
    assert {name: harness.answers[name].token_ids for name in PENALTIES} == expected


@pytest.mark.parametrize("index", [0, 1, 7])
def test_the_token_sampled_after_a_stop_token_is_discarded(
    plain: Pair, expected: dict[str, list[int]], index: int
) -> None:
    """The pass in flight computes one more token, while the blocks are already available to other requests."""
    tokens = expected["frequency"]
    first = tokens.index(tokens[index])
    harness = Harness(plain.checkpoint, kv_cache_mb=1)
    stopped = harness.request(
        "stopped", random_text(9, 1), frequency_penalty=0.2, max_tokens=24, stop_token_ids=f"[{tokens[index]}]"
    )
    others = penalized_requests(harness)
    harness.run(stopped, *others)
    assert harness.answers["stopped"].token_ids == tokens[: first + 1]
    assert harness.answers["stopped"].last.finish_reason == "stop"
    assert {name: harness.answers[name].token_ids for name in PENALTIES} == expected
    assert harness.engine.stats.generated_tokens == first + 1 + 24 * len(PENALTIES)
    assert harness.all_blocks_available()


def test_a_sequence_that_reaches_max_tokens_computes_no_extra_row(plain: Pair) -> None:
    harness = Harness(plain.checkpoint)
    harness.run(harness.request("a", random_text(9, 1), max_tokens=5))
    assert harness.engine.stats.steps == 5
    assert len(harness.answers["a"].token_ids) == 5


def test_the_token_of_a_request_cancelled_in_flight_is_discarded(plain: Pair, expected: dict[str, list[int]]) -> None:
    """Its slot and blocks are reused at once."""
    harness = Harness(plain.checkpoint, max_batch_size=2, kv_cache_mb=1)
    harness.submit(
        harness.request("cancelled", random_text(30, 2), max_tokens=900),
        harness.request("other", random_text(9, 1), max_tokens=24, frequency_penalty=0.2),
    )
    for _ in range(4):
        harness.step()
    cancelled = harness.engine.scheduler.running[0]
    assert cancelled.num_pending == 1
    before = list(cancelled.token_ids)
    slot = cancelled.slot
    harness.cancel("cancelled")
    harness.submit(harness.request("next", random_text(9, 1), max_tokens=24))
    harness.step()
    assert harness.engine.scheduler.running[-1].slot == slot
    harness.run()
    assert cancelled.token_ids == before and harness.answers["cancelled"].last.finish_reason == "cancelled"
    assert harness.answers["other"].token_ids == expected["frequency"]
    assert harness.answers["next"].token_ids == expected["none"]
    assert harness.all_blocks_available()


def random_load(checkpoint: Checkpoint, kv_cache_mb: int, count: int) -> tuple[Harness, dict[str, list[int]]]:
    """The tokens of random requests that arrive over time; urgent ones preempt others."""
    harness = Harness(checkpoint, kv_cache_mb=kv_cache_mb, max_batch_size=24, max_queue_size=count)
    rng = random.Random(1)
    for i in range(count):
        options: dict[str, Any] = {
            "max_tokens": rng.randint(1, 40),
            "temperature": rng.choice([0.0, 0.0, 1.1]),
            "top_p": rng.choice([1.0, 0.9]),
            "seed": i,
            "frequency_penalty": rng.choice([0.0, 0.2]),
            "repetition_penalty": rng.choice([1.0, 1.2]),
            "priority": rng.choice([5, 5, 5, 1]),
        }
        prompt = random_text(rng.choice([3, 16, 40]), i % 7) + random_text(rng.randint(1, 100), i)
        harness.submit(harness.request(f"r{i}", prompt, **options))
        if i % 4 == 0:
            harness.step()
    harness.run()
    assert harness.all_blocks_available()
    return harness, harness.token_ids


def test_the_size_of_the_pool_does_not_change_the_tokens(plain: Pair) -> None:
    """1 MiB holds 1024 tokens, at most ten of the 200 requests; 32 MiB hold a full batch."""
    small, tight = random_load(plain.checkpoint, 1, 200)
    _, roomy = random_load(plain.checkpoint, 32, 200)
    assert tight == roomy
    assert all(answer.last.finish_reason == "length" for answer in small.answers.values())


def test_padding_rows_do_not_change_the_tokens(plain: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    unpadded = Harness(plain.checkpoint)
    unpadded.run(*mixed_requests(unpadded))
    padded = Harness(plain.checkpoint)
    padded.pad_passes(monkeypatch)
    padded.run(*mixed_requests(padded))
    assert padded.token_ids == unpadded.token_ids
    assert padded.all_blocks_available()


@pytest.mark.parametrize("count", [1, 7, 16, 17, 20])
def test_the_largest_mixed_pass_has_a_graph(plain: Pair, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    harness = Harness(plain.checkpoint, max_batch_size=24, max_tokens_per_step=500, max_tokens_per_mixed_step=64)
    harness.submit(*(harness.request(f"{i}", random_text(9, i), max_tokens=20) for i in range(count)))
    launched = harness.record_launches(monkeypatch)
    harness.step()
    harness.submit(harness.request("long", random_text(200, 99), max_tokens=1))
    harness.step()
    shape = BatchShape.of(launched[-1])
    assert shape.num_decode_tokens == count and shape.num_tokens == 64 - (16 if count <= 16 else 24)
    graphs = mixed_shapes(max_batch_size=24, max_tokens=64, max_mixed_tokens=64)
    assert any(graph.fits(shape) and graph.num_tokens == shape.num_tokens for graph in graphs)


def test_the_warm_up_leaves_no_state_behind(plain: Pair, expected: dict[str, list[int]]) -> None:
    harness = Harness(plain.checkpoint, kv_cache_mb=1, max_context=300)
    stats = harness.engine.stats
    harness.engine.warm_up()
    assert (stats.requests, stats.steps, stats.generated_tokens) == (0, 0, 0) and stats.blocks_total == 256
    assert harness.all_blocks_available()
    harness.run(*penalized_requests(harness))
    assert {name: harness.answers[name].token_ids for name in PENALTIES} == expected


def test_a_failing_warm_up_raises(
    plain: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    harness = Harness(plain.checkpoint)

    def fail(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(harness.engine.model_runner, "launch", fail)
    with pytest.raises(RuntimeError, match=r"warm-up failed: the language model failed \(RuntimeError\); see the log"):
        harness.engine.warm_up()
    assert "no such kernel" in caplog.text


def test_prompts_are_prefilled_in_smaller_chunks_while_others_decode(
    plain: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(plain.checkpoint, max_tokens_per_step=100, max_tokens_per_mixed_step=32)
    launched = harness.record_launches(monkeypatch)
    harness.submit(harness.request("running", random_text(120, 1), max_tokens=6))
    harness.step()
    harness.step()
    harness.run(harness.request("long", random_text(90, 2), max_tokens=2))
    lengths = [[chunk.length for chunk in chunks] for chunks in launched]
    assert lengths[:5] == [[100], [20], [1, 16], [1, 16], [1, 16]]
    assert max(map(sum, lengths)) == 100
    assert lengths[-2:] == [[90 - 5 * 16], [1]]
