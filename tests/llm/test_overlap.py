"""Passes run ahead of what is known: the tokens are those of a plain loop, whatever ends, leaves or waits meanwhile."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from autoglm.checkpoint import Checkpoint
from autoglm.llm.cuda_graphs import chunk_shapes, decode_sizes
from autoglm.llm.input_batch import ROW, Shape
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


def plain_loop(reference: Any, prompt: list[int], count: int, options: dict[str, float]) -> list[int]:
    """Greedy, the whole sequence computed again for every token, penalties by their definitions."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(penalised_row(reference, tokens, len(prompt), options).argmax()))
    return tokens[len(prompt) :]


def penalised_row(reference: Any, tokens: list[int], prompt_length: int, options: dict[str, float]) -> torch.Tensor:
    """The logits behind these tokens, penalties taken off. fp64 [vocab]"""
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
def wanted(plain: Pair) -> dict[str, list[int]]:
    """By kind of penalty, 24 tokens."""
    return {name: plain_loop(plain.reference, random_text(9, 1), 24, options) for name, options in PENALTIES.items()}


def penalised_requests(harness: Harness, **options: Any) -> list[Request]:
    return [
        harness.request(name, random_text(9, 1), max_tokens=24, **penalties, **options)
        for name, penalties in PENALTIES.items()
    ]


def test_penalties_as_in_a_plain_loop(plain: Pair, wanted: dict[str, list[int]]) -> None:
    assert all(wanted[name] != wanted["none"] for name in PENALTIES if name != "none")
    harness = Harness(plain.checkpoint)
    harness.run(*penalised_requests(harness))
    assert {name: answer.token_ids for name, answer in harness.answers.items()} == wanted


def test_penalties_survive_being_pushed_out(plain: Pair, wanted: dict[str, list[int]]) -> None:
    harness = Harness(plain.checkpoint, max_batch_size=len(PENALTIES), max_tokens_per_step=500)
    harness.submit(*penalised_requests(harness))
    pushed_out = set()
    for step in range(30):
        if step % 6 > 2:
            harness.submit(harness.random_request(f"urgent{step}", step, priority=1, max_tokens=2))
        harness.step()
        waiting = [s for s in harness.engine.scheduler.waiting if len(s.tokens) > s.prompt_length]
        pushed_out |= {sequence.request.request_id for sequence in waiting}
    harness.run()
    assert len(pushed_out) >= 3
    assert {name: harness.answers[name].token_ids for name in PENALTIES} == wanted


@pytest.mark.parametrize("place", [0, 1, 7])
def test_a_stop_token_drops_what_follows_it(plain: Pair, wanted: dict[str, list[int]], place: int) -> None:
    """The pass in flight computes one token more; nobody sees it, and its blocks are others' at once."""
    tokens = wanted["frequency"]
    first = tokens.index(tokens[place])
    harness = Harness(plain.checkpoint, kv_cache_mb=1)
    stopped = harness.request(
        "stopped", random_text(9, 1), frequency_penalty=0.2, max_tokens=24, stop_token_ids=f"[{tokens[place]}]"
    )
    others = penalised_requests(harness)
    harness.run(stopped, *others)
    assert harness.answers["stopped"].token_ids == tokens[: first + 1]
    assert harness.answers["stopped"].last.finish_reason == "stop"
    assert {name: harness.answers[name].token_ids for name in PENALTIES} == wanted
    assert harness.engine.stats.generated_tokens == first + 1 + 24 * len(PENALTIES)
    assert harness.all_blocks_back()


def test_ends_known_beforehand_waste_no_row(plain: Pair) -> None:
    harness = Harness(plain.checkpoint)
    harness.run(harness.request("a", random_text(9, 1), max_tokens=5))
    assert harness.engine.stats.steps == 5
    assert len(harness.answers["a"].token_ids) == 5


def test_cancelled_in_flight(plain: Pair, wanted: dict[str, list[int]]) -> None:
    """At once the seat and the blocks are another's, and the token that still comes is nobody's."""
    harness = Harness(plain.checkpoint, max_batch_size=2, kv_cache_mb=1)
    harness.submit(
        harness.request("gone", random_text(30, 2), max_tokens=900),
        harness.request("stays", random_text(9, 1), max_tokens=24, frequency_penalty=0.2),
    )
    for _ in range(4):
        harness.step()
    gone = harness.engine.scheduler.running[0]
    assert gone.pending == 1
    before = list(gone.tokens)
    seat = gone.seat
    harness.engine._finish(gone, "cancelled")
    harness.submit(harness.request("next", random_text(9, 1), max_tokens=24))
    harness.step()
    assert harness.engine.scheduler.running[-1].seat == seat
    harness.run()
    assert gone.tokens == before and harness.answers["gone"].last.finish_reason == "cancelled"
    assert harness.answers["stays"].token_ids == wanted["frequency"]
    assert harness.answers["next"].token_ids == wanted["none"]
    assert harness.all_blocks_back()


def random_load(checkpoint: Checkpoint, pool: int, count: int) -> tuple[Harness, dict[str, list[int]]]:
    """The tokens of many random requests that arrive little by little, urgent ones pushing others out."""
    harness, chance = Harness(checkpoint, kv_cache_mb=pool, max_batch_size=24, max_queue_size=count), random.Random(1)
    for i in range(count):
        options: dict[str, Any] = {
            "max_tokens": chance.randint(1, 40),
            "temperature": chance.choice([0.0, 0.0, 1.1]),
            "top_p": chance.choice([1.0, 0.9]),
            "seed": i,
            "frequency_penalty": chance.choice([0.0, 0.2]),
            "repetition_penalty": chance.choice([1.0, 1.2]),
            "priority": chance.choice([5, 5, 5, 1]),
        }
        prompt = random_text(chance.choice([3, 16, 40]), i % 7) + random_text(chance.randint(1, 100), i)
        harness.submit(harness.request(f"r{i}", prompt, **options))
        if i % 4 == 0:
            harness.step()
    harness.run()
    assert harness.all_blocks_back()
    return harness, {name: answer.token_ids for name, answer in harness.answers.items()}


def test_a_pool_that_holds_ten_of_two_hundred(plain: Pair) -> None:
    """1 MiB holds 1024 tokens, ten requests at the most; 32 MiB hold all that may run at once."""
    small, tight = random_load(plain.checkpoint, 1, 200)
    _, roomy = random_load(plain.checkpoint, 32, 200)
    assert tight == roomy
    assert all(answer.last.finish_reason == "length" for answer in small.answers.values())


class PaddedGraph:
    """In place of a captured pass: the pass itself."""

    def __init__(self, run: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> None:
        self.run, self.inputs = run, inputs

    def replay(self) -> torch.Tensor:
        return self.run(*(given.clone() for given in self.inputs))


@torch.inference_mode()
def test_rows_that_pad_change_nothing(plain: Pair) -> None:
    wanted = Harness(plain.checkpoint)
    wanted.run(*mixed_requests(wanted))
    found = Harness(plain.checkpoint)
    runner = found.engine.runner
    decode: Any = {n: PaddedGraph(runner._decode, (torch.zeros(ROW, n, dtype=torch.int32),)) for n in decode_sizes(32)}
    shapes = chunk_shapes(32, 64, 64)
    mixed: Any = {s: PaddedGraph(partial(runner._mixed, s), runner._mixed_inputs(s)) for s in shapes}
    runner.decode_graphs, runner.mixed_graphs = decode, mixed
    found.run(*mixed_requests(found))
    assert {n: a.token_ids for n, a in found.answers.items()} == {n: a.token_ids for n, a in wanted.answers.items()}
    assert found.all_blocks_back()


def test_sizes_of_decoding_graphs() -> None:
    assert decode_sizes(1) == [1]
    assert decode_sizes(7) == [1, 2, 4, 7]
    assert decode_sizes(64) == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    assert decode_sizes(128) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128]


def test_shapes_of_graphs_with_prompts() -> None:
    shapes = chunk_shapes(64, 8192, 1024)
    alone = [shape.tokens for shape in shapes if not shape.singles]
    assert alone == [64, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536]
    assert {shape.singles + shape.tokens for shape in shapes if shape.singles} == {128, 256, 512, 1024}
    assert Shape(64, 8, 960) in shapes and Shape(16, 8, 1008) in shapes
    assert Shape(64, 8, 704) in chunk_shapes(64, 768, 768)
    assert chunk_shapes(1, 100, 100) == [Shape(0, 1, 64), Shape(0, 1, 100)]
    assert max(shape.singles + shape.tokens for shape in chunk_shapes(128, 4096, 4096)) == 1536


@pytest.mark.parametrize("count", [1, 7, 16, 17, 20])
def test_the_largest_pass_beside_others_has_a_graph(plain: Pair, count: int) -> None:
    harness = Harness(plain.checkpoint, max_batch_size=24, max_tokens_per_step=500, max_tokens_per_mixed_step=64)
    harness.submit(*(harness.request(f"{i}", random_text(9, i), max_tokens=20) for i in range(count)))
    harness.engine.step()
    harness.submit(harness.request("long", random_text(200, 99), max_tokens=1))
    harness.engine.step()
    assert harness.engine._in_flight is not None
    shape = Shape.of(harness.engine._in_flight.chunks)
    assert shape.singles == count and shape.tokens == 64 - (16 if count <= 16 else 24)
    assert any(graph.holds(shape) and graph.tokens == shape.tokens for graph in chunk_shapes(24, 64, 64))


def test_warm_up_leaves_no_trace(plain: Pair, wanted: dict[str, list[int]]) -> None:
    harness = Harness(plain.checkpoint, kv_cache_mb=1, max_context=300)
    stats = harness.engine.stats
    harness.engine.warm_up()
    assert (stats.requests, stats.steps, stats.generated_tokens) == (0, 0, 0) and stats.blocks_total == 256
    assert harness.all_blocks_back()
    harness.run(*penalised_requests(harness))
    assert {name: harness.answers[name].token_ids for name in PENALTIES} == wanted


def test_a_warm_up_that_fails_is_told(plain: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(plain.checkpoint)

    def fail(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(harness.engine.runner, "launch", fail)
    with pytest.raises(RuntimeError, match="no such kernel"):
        harness.engine.warm_up()


def test_prompts_are_cut_short_while_others_decode(plain: Pair) -> None:
    harness = Harness(plain.checkpoint, max_tokens_per_step=100, max_tokens_per_mixed_step=32)
    lengths: list[list[int]] = []
    launch = harness.engine.runner.launch

    def watch(chunks: list[Any]) -> Any:
        lengths.append([chunk.length for chunk in chunks])
        return launch(chunks)

    harness.engine.runner.launch = watch  # type: ignore[method-assign]
    harness.submit(harness.request("running", random_text(120, 1), max_tokens=6))
    harness.step()
    harness.step()
    harness.run(harness.request("long", random_text(90, 2), max_tokens=2))
    assert lengths[:5] == [[100], [20], [1, 16], [1, 16], [1, 16]]
    assert max(map(sum, lengths)) == 100
    assert lengths[-2:] == [[90 - 5 * 16], [1]]
