"""Requests that see a part of their images: dense at ratio 1, alike however they are run, and no block is lost."""

import random
import threading

import pytest
import torch

from autoglm.checkpoint import Checkpoint
from autoglm.config import SparseAttentionConfig
from autoglm.errors import ErrorCode
from autoglm.kernels.reference import sparse as reference_sparse
from autoglm.llm.sequence import Request
from tests.checkpoints import Shape, make_checkpoint
from tests.conftest import Pair
from tests.llm.harness import Harness
from tests.llm.test_engine import ended, wait_for
from tests.prompts import GRIDS, random_prompt

MODES = ("topk", "snap", "prune")  # whose answers do not depend on what runs beside
LARGE = [(1, 16, 12)]  # 48 tokens


def server(mode: str, ratio: float = 0.3, dense_layers: int = 1) -> SparseAttentionConfig:
    return SparseAttentionConfig(mode, ratio, 1, dense_layers)  # type: ignore[arg-type]


def some_requests(harness: Harness, **options: object) -> list[Request]:
    """With no image, one, two, three; one and two appear twice, with the same prompts."""
    kinds = ["none", "one", "two", "three", "one", "two"]
    return [
        harness.random_request(f"r{i}", i % 4, GRIDS[kind], max_tokens=6 + i, seed=i, **options)
        for i, kind in enumerate(kinds)
    ]


def answers(harness: Harness) -> dict[str, list[int]]:
    assert all(answer.last.error is None for answer in harness.answers.values())
    return {name: answer.token_ids for name, answer in harness.answers.items()}


@pytest.fixture(scope="module")
def dense(plain: Pair) -> dict[str, list[int]]:
    harness = Harness(plain.checkpoint)
    harness.run(*some_requests(harness))
    return answers(harness)


@pytest.fixture(scope="module")
def alone(plain: Pair) -> dict[str, dict[str, list[int]]]:
    """What each mode answers, every request on an engine of its own."""
    found: dict[str, dict[str, list[int]]] = {}
    for mode in MODES:
        found[mode] = {}
        for number in range(6):
            harness = Harness(plain.checkpoint, sparse_attention=server(mode))
            request = some_requests(harness)[number]
            harness.answers = {request.request_id: harness.answers[request.request_id]}
            harness.run(request)
            found[mode] |= answers(harness)
    return found


@pytest.mark.parametrize("mode", [*MODES, "pages"])
def test_ratio_1_is_dense(plain: Pair, dense: dict[str, list[int]], mode: str) -> None:
    harness = Harness(plain.checkpoint, sparse_attention=server(mode, 1.0))
    harness.run(*some_requests(harness))
    assert answers(harness) == dense
    assert harness.all_blocks_back()


def test_less_is_not_dense(dense: dict[str, list[int]], alone: dict[str, dict[str, list[int]]]) -> None:
    for mode in MODES:
        assert alone[mode]["r0"] == dense["r0"]
        assert alone[mode] != dense
    assert alone["topk"] != alone["snap"] != alone["prune"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("budget", [5, 1000])
def test_together_as_alone(
    plain: Pair, alone: dict[str, dict[str, list[int]]], mode: str, prefix_cache: bool, budget: int
) -> None:
    harness = Harness(
        plain.checkpoint, sparse_attention=server(mode), prefix_cache=prefix_cache, max_tokens_per_step=budget
    )
    harness.run(*some_requests(harness))
    assert answers(harness) == alone[mode]
    harness.run(*some_requests(harness))  # now from the prefix cache, where there is one
    assert answers(harness) == alone[mode]
    assert harness.all_blocks_back()


@pytest.mark.parametrize("mode", MODES)
def test_pushed_out_at_any_time(plain: Pair, alone: dict[str, dict[str, list[int]]], mode: str) -> None:
    harness = Harness(plain.checkpoint, sparse_attention=server(mode), max_tokens_per_step=20)
    chance = random.Random(0)
    harness.submit(*some_requests(harness))
    scheduler = harness.engine.scheduler
    for _ in range(60):
        for sequence in [s for s in scheduler.running if chance.random() < 0.15]:
            scheduler._preempt(sequence)
        harness.step()
    harness.run()
    assert answers(harness) == alone[mode]
    assert harness.all_blocks_back()


def test_modes_side_by_side(plain: Pair, dense: dict[str, list[int]], alone: dict[str, dict[str, list[int]]]) -> None:
    """Each request has the mode that it asks for, and finds nothing of another's in the prefix cache."""
    harness = Harness(plain.checkpoint, sparse_attention=server("topk"))
    expected = {"off": dense, **alone}
    for _ in range(2):
        for mode, wanted in expected.items():
            harness.run(*some_requests(harness, sparse_mode=mode))
            assert answers(harness) == wanted, mode
    assert harness.all_blocks_back()


def test_cancelled_at_any_time(plain: Pair, alone: dict[str, dict[str, list[int]]]) -> None:
    """On a pool so small that not all fit at once."""
    for seed in range(4):
        harness = Harness(
            plain.checkpoint, sparse_attention=server("snap"), kv_cache_mb=1, max_batch_size=3, max_tokens_per_step=24
        )
        chance = random.Random(seed)
        cancelled = set()
        for request in some_requests(harness):
            harness.submit(request)
            harness.step()
            running = list(harness.engine.scheduler)
            if running and chance.random() < 0.4:
                victim = chance.choice(running)
                harness.engine._finish(victim, "cancelled")
                cancelled.add(victim.request.request_id)
        harness.run()
        whole = {name: ids for name, ids in answers(harness).items() if name not in cancelled}
        assert whole == {name: alone["snap"][name] for name in whole}
        assert harness.all_blocks_back()


@pytest.mark.parametrize("stored", ["int8", "float8"])
def test_snap_of_every_kind_of_cache(plain: Pair, stored: str) -> None:
    results = []
    for config in (None, server("snap", 1.0)):
        harness = Harness(plain.checkpoint, sparse_attention=config, kv_cache_dtype=stored)
        harness.run(harness.random_request("a", 1, LARGE, max_tokens=12))
        results.append(answers(harness))
    assert results[0] == results[1]


def test_snap_frees_memory_and_leaves_the_prefix_cache_alone(plain: Pair) -> None:
    """48 visual tokens of 67; blocks of 4."""
    harness = Harness(plain.checkpoint)
    prompt = random_prompt(plain.checkpoint, LARGE, 1, before=12)
    harness.submit(harness.request("snap", prompt, LARGE, 1, sparse_mode="snap", sparse_ratio=0.25, max_tokens=9))
    for _ in range(3):
        harness.step()
    (sequence,) = harness.engine.scheduler.running
    assert sequence.dropped == 36
    assert harness.engine.stats.blocks_held == len(sequence.blocks) == -(-(sequence.computed - 36) // 4)
    assert harness.engine.scheduler.pool.idle == len(prompt) // 4
    harness.run()
    assert harness.engine.scheduler.pool.idle == len(prompt) // 4  # and nothing more
    harness.run(harness.request("dense", prompt, LARGE, 1))
    usage = harness.answers["dense"].last.usage
    assert usage is not None and usage.cached_tokens == (len(prompt) - 1) // 4 * 4
    fresh = Harness(plain.checkpoint)
    fresh.run(fresh.request("dense", prompt, LARGE, 1))
    assert harness.answers["dense"].token_ids == fresh.answers["dense"].token_ids


def test_prune_computes_less(plain: Pair) -> None:
    harness = Harness(plain.checkpoint, sparse_attention=server("prune", 0.25))
    harness.run(harness.random_request("a", 1, LARGE))
    usage = harness.answers["a"].last.usage
    assert usage is not None and (usage.image_tokens, usage.prompt_tokens) == (12, 12 + 12 + 2 + 5)


def test_prune_chooses_in_the_thread_that_submits(
    plain: Pair, alone: dict[str, dict[str, list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(plain.checkpoint, sparse_attention=server("prune"))
    engine, threads = harness.engine, set()

    def note(rows: torch.Tensor, count: int) -> torch.Tensor:
        threads.add(threading.current_thread())
        return reference_sparse.most_diverse(rows, count)

    monkeypatch.setattr(engine.runner.model.kernels, "most_diverse", note)
    requests = some_requests(harness)
    engine.start()
    for request in requests:
        engine.submit(request)
    wait_for(lambda: all(ended(answer.pieces) for answer in harness.answers.values()))
    engine.close()
    assert threads == {threading.current_thread()}
    assert answers(harness) == alone["prune"]
    assert engine.stats.requests == len(requests)


def test_a_choice_that_fails_is_its_request_s_alone(plain: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(plain.checkpoint, sparse_attention=server("prune"))
    engine = harness.engine

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    requests = [harness.random_request(name, 1, LARGE, max_tokens=400) for name in ("running", "failing", "next")]
    engine.start()
    engine.submit(requests[0])
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner.model.kernels, "most_diverse", fail)
        engine.submit(requests[1])
    engine.submit(requests[2])
    error = harness.answers["failing"].last.error
    assert error is not None and error.code == ErrorCode.INTERNAL and "2 GiB" in error.message
    wait_for(lambda: all(ended(answer.pieces) for answer in harness.answers.values()))
    engine.close()
    assert harness.answers["running"].token_ids == harness.answers["next"].token_ids
    assert harness.answers["next"].last.finish_reason == "length"
    assert engine.stats.requests == 2


def test_nothing_to_choose_by(plain: Pair) -> None:
    """An image at the prompt's end, and an answer of one token."""
    harness = Harness(plain.checkpoint, sparse_attention=server("snap"))
    prompt = random_prompt(plain.checkpoint, LARGE, 1)[: -5 - 1]
    harness.run(harness.request("end", prompt, LARGE, 1), harness.random_request("one", 2, LARGE, max_tokens=1))
    assert {len(ids) for ids in answers(harness).values()} == {16, 1}
    assert harness.all_blocks_back()


def test_each_layer_keeps_what_its_text_looks_at(plain: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written to the blocks of a sequence's own are the keys that the prompt's blocks hold."""
    harness = Harness(plain.checkpoint, sparse_attention=server("snap", 0.25))
    cache = harness.engine.runner.cache
    copied = []
    copy = cache.copy

    def note(*slots: torch.Tensor) -> None:
        copied.append(slots)
        copy(*slots)

    monkeypatch.setattr(cache, "copy", note)
    harness.submit(harness.random_request("a", 1, LARGE))
    harness.step()
    harness.step()  # with which the prompt of 67 tokens is computed
    ((sources, target),) = copied
    assert sources.shape == (2, 2, 12 + 12 + 2 + 5)
    assert not torch.isin(target, sources).any()
    for layer in range(2):
        for head in range(2):
            assert torch.equal(cache.keys[layer, target, head], cache.keys[layer, sources[layer, head], head])
            assert torch.equal(cache.values[layer, target, head], cache.values[layer, sources[layer, head], head])
    assert len({tuple(slots.tolist()) for slots in sources.flatten(0, 1)}) > 1


def test_one_kv_head(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("one")
    make_checkpoint(directory, Shape(hidden=96, heads=6, kv_heads=1, section=(1, 1, 2), layers=3))
    for mode in MODES:
        results = []
        for config in (None, server(mode, 1.0)):
            harness = Harness(Checkpoint.open(directory), sparse_attention=config)
            harness.run(harness.random_request("a", 1, LARGE, max_tokens=12))
            results.append(answers(harness))
        assert results[0] == results[1]


def test_pages_from_so_many_on(plain: Pair) -> None:
    """Alone a sequence sees everything, beside another one blocks of its choice; who asks for all gets all."""
    config = SparseAttentionConfig("pages", 0.2, 2, 0)
    results = {}
    for name, others, wish in (("alone", 0, None), ("beside", 1, None), ("off", 1, "off")):
        harness = Harness(plain.checkpoint, sparse_attention=config)
        requests = [harness.random_request("a", 1, LARGE, max_tokens=24, sparse_mode=wish)]
        requests += [harness.random_request(name, 2, max_tokens=24) for name in ["b"][:others]]
        harness.run(*requests)
        results[name] = answers(harness)["a"]
        assert harness.all_blocks_back()
    dense = Harness(plain.checkpoint)
    dense.run(dense.random_request("a", 1, LARGE, max_tokens=24))
    assert results["alone"] == results["off"] == answers(dense)["a"] != results["beside"]


def test_answers_by_pages_are_nobody_elses(plain: Pair) -> None:
    """What a next turn finds in the prefix cache ends with the prompt; seats and blocks are used again and again."""
    harness = Harness(plain.checkpoint, sparse_attention=server("pages", 0.2, 0), kv_cache_mb=1, max_batch_size=3)
    harness.run(*some_requests(harness))
    first = answers(harness)
    prompt = random_prompt(plain.checkpoint, LARGE, 1, before=9)
    harness.run(harness.request("a", prompt, LARGE, 1, max_tokens=20))
    turn = [*prompt, *harness.answers["a"].token_ids, 1, 2, 3]
    harness.run(harness.request("b", turn, LARGE, 1, sparse_mode="off"))
    usage = harness.answers["b"].last.usage
    assert usage is not None and usage.cached_tokens == len(prompt) // 4 * 4
    fresh = Harness(plain.checkpoint)
    fresh.run(fresh.request("b", turn, LARGE, 1))
    assert harness.answers["b"].token_ids == fresh.answers["b"].token_ids
    harness.run(*some_requests(harness))
    assert {name: ids for name, ids in answers(harness).items() if name in first} == first
