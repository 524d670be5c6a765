"""Sparse attention in the engine: dense at ratio 1, independent of batching, and no block is lost."""

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
from tests.prompts import GRIDS, random_prompt

MODES = ("topk", "prune")  # their answers do not depend on the rest of the batch
LARGE = [(1, 16, 12)]  # 48 tokens


def config_of(mode: str, ratio: float = 0.3, dense_layers: int = 1) -> SparseAttentionConfig:
    return SparseAttentionConfig(mode, ratio, 1, dense_layers)  # type: ignore[arg-type]


def image_requests(harness: Harness, **options: object) -> list[Request]:
    """With no, one, two and three images; the prompts with one and two appear twice."""
    kinds = ["none", "one", "two", "three", "one", "two"]
    return [
        harness.random_request(f"r{i}", i % 4, GRIDS[kind], max_tokens=6 + i, seed=i, **options)
        for i, kind in enumerate(kinds)
    ]


def tokens_of(harness: Harness) -> dict[str, list[int]]:
    assert all(answer.last.error is None for answer in harness.answers.values())
    return harness.token_ids


@pytest.fixture(scope="module")
def dense(plain: Pair) -> dict[str, list[int]]:
    harness = Harness(plain.checkpoint)
    harness.run(*image_requests(harness))
    return tokens_of(harness)


@pytest.fixture(scope="module")
def alone(plain: Pair) -> dict[str, dict[str, list[int]]]:
    """The answers by mode, each request on a separate engine."""
    found: dict[str, dict[str, list[int]]] = {}
    for mode in MODES:
        found[mode] = {}
        for number in range(6):
            harness = Harness(plain.checkpoint, sparse_attention=config_of(mode))
            request = image_requests(harness)[number]
            harness.answers = {request.request_id: harness.answers[request.request_id]}
            harness.run(request)
            found[mode] |= tokens_of(harness)
    return found


@pytest.mark.parametrize("mode", [*MODES, "pages"])
def test_ratio_1_equals_dense_attention(plain: Pair, dense: dict[str, list[int]], mode: str) -> None:
    harness = Harness(plain.checkpoint, sparse_attention=config_of(mode, 1.0))
    harness.run(*image_requests(harness))
    assert tokens_of(harness) == dense
    assert harness.all_blocks_available()


def test_smaller_ratios_change_answers_about_images(
    dense: dict[str, list[int]], alone: dict[str, dict[str, list[int]]]
) -> None:
    for mode in MODES:
        assert alone[mode]["r0"] == dense["r0"]
        assert alone[mode] != dense
    assert alone["topk"] != alone["prune"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("budget", [5, 1000])
def test_batching_does_not_change_the_tokens(
    plain: Pair, alone: dict[str, dict[str, list[int]]], mode: str, prefix_cache: bool, budget: int
) -> None:
    harness = Harness(
        plain.checkpoint, sparse_attention=config_of(mode), prefix_cache=prefix_cache, max_tokens_per_step=budget
    )
    harness.run(*image_requests(harness))
    assert tokens_of(harness) == alone[mode]
    harness.run(*image_requests(harness))  # from the prefix cache if it is enabled
    assert tokens_of(harness) == alone[mode]
    assert harness.all_blocks_available()


@pytest.mark.parametrize("mode", MODES)
def test_preemption_in_random_steps(plain: Pair, alone: dict[str, dict[str, list[int]]], mode: str) -> None:
    harness = Harness(plain.checkpoint, sparse_attention=config_of(mode), max_tokens_per_step=20)
    rng = random.Random(0)
    harness.submit(*image_requests(harness))
    scheduler = harness.engine.scheduler
    for _ in range(60):
        for sequence in [s for s in scheduler.running if rng.random() < 0.15]:
            scheduler.preempt(sequence)
        harness.step()
    harness.run()
    assert tokens_of(harness) == alone[mode]
    assert harness.all_blocks_available()


def test_modes_of_requests_do_not_share_the_prefix_cache(
    plain: Pair, dense: dict[str, list[int]], alone: dict[str, dict[str, list[int]]]
) -> None:
    harness = Harness(plain.checkpoint, sparse_attention=config_of("topk"))
    expected = {"off": dense, **alone}
    for _ in range(2):
        for mode, tokens in expected.items():
            harness.run(*image_requests(harness, sparse_mode=mode))
            assert tokens_of(harness) == tokens, mode
    assert harness.all_blocks_available()


@pytest.mark.parametrize("mode", MODES)
def test_cancellation_in_random_steps(plain: Pair, alone: dict[str, dict[str, list[int]]], mode: str) -> None:
    """With a pool too small for all requests."""
    for seed in range(4):
        harness = Harness(
            plain.checkpoint, sparse_attention=config_of(mode), kv_cache_mb=1, max_batch_size=3, max_tokens_per_step=24
        )
        rng = random.Random(seed)
        cancelled = set()
        for request in image_requests(harness):
            harness.submit(request)
            harness.step()
            running = list(harness.engine.scheduler)
            if running and rng.random() < 0.4:
                victim = rng.choice(running)
                harness.cancel(victim.request.request_id)
                cancelled.add(victim.request.request_id)
        harness.run()
        complete = {name: ids for name, ids in tokens_of(harness).items() if name not in cancelled}
        assert complete == {name: alone[mode][name] for name in complete}
        assert harness.all_blocks_available()


def test_prune_shortens_the_prompt(plain: Pair) -> None:
    harness = Harness(plain.checkpoint, sparse_attention=config_of("prune", 0.25))
    harness.run(harness.random_request("a", 1, LARGE))
    usage = harness.answers["a"].last.usage
    assert usage is not None and (usage.image_tokens, usage.prompt_tokens) == (12, 12 + 12 + 2 + 5)


def test_prune_runs_in_the_submitting_thread(
    plain: Pair, alone: dict[str, dict[str, list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(plain.checkpoint, sparse_attention=config_of("prune"))
    engine, threads = harness.engine, set()

    def record(*, embeddings: torch.Tensor, count: int) -> torch.Tensor:
        threads.add(threading.current_thread())
        return reference_sparse.divprune(embeddings=embeddings, count=count)

    monkeypatch.setattr(engine.model_runner.model.kernels, "divprune", record)
    requests = image_requests(harness)
    engine.start()
    for request in requests:
        engine.submit(request)
    harness.wait()
    engine.close()
    assert threads == {threading.current_thread()}
    assert tokens_of(harness) == alone["prune"]
    assert engine.stats.requests == len(requests)


def test_failing_pruning_fails_its_own_request_only(plain: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(plain.checkpoint, sparse_attention=config_of("prune"))
    engine = harness.engine

    def fail(**_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    requests = [harness.random_request(name, 1, LARGE, max_tokens=400) for name in ("running", "failing", "next")]
    engine.start()
    engine.submit(requests[0])
    with monkeypatch.context() as patch:
        patch.setattr(engine.model_runner.model.kernels, "divprune", fail)
        engine.submit(requests[1])
    engine.submit(requests[2])
    error = harness.answers["failing"].last.error
    assert error is not None and error.code == ErrorCode.INTERNAL
    assert error.message == "the request failed (OutOfMemoryError); see the log"
    harness.wait()
    engine.close()
    assert harness.answers["running"].token_ids == harness.answers["next"].token_ids
    assert harness.answers["next"].last.finish_reason == "length"
    assert engine.stats.requests == 2


def test_a_model_with_one_kv_head(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("one")
    make_checkpoint(directory, Shape(hidden=96, heads=6, kv_heads=1, section=(1, 1, 2), layers=3))
    for mode in MODES:
        results = []
        for config in (None, config_of(mode, 1.0)):
            harness = Harness(Checkpoint.open(directory), sparse_attention=config)
            harness.run(harness.random_request("a", 1, LARGE, max_tokens=12))
            results.append(tokens_of(harness))
        assert results[0] == results[1]


def test_pages_needs_min_batch_sequences(plain: Pair) -> None:
    """Alone, or with sparse_mode off, a sequence attends to all blocks; in a batch of two to the selected ones."""
    config = SparseAttentionConfig("pages", 0.2, 2, 0)
    results = {}
    for case, num_others, mode in (("alone", 0, None), ("batch", 1, None), ("off", 1, "off")):
        harness = Harness(plain.checkpoint, sparse_attention=config)
        requests = [harness.random_request("a", 1, LARGE, max_tokens=24, sparse_mode=mode)]
        requests += [harness.random_request(name, 2, max_tokens=24) for name in ["b"][:num_others]]
        harness.run(*requests)
        results[case] = tokens_of(harness)["a"]
        assert harness.all_blocks_available()
    dense = Harness(plain.checkpoint)
    dense.run(dense.random_request("a", 1, LARGE, max_tokens=24))
    assert results["alone"] == results["off"] == tokens_of(dense)["a"] != results["batch"]


def test_answers_with_pages_are_not_cached(plain: Pair) -> None:
    """The next turn finds only the prompt in the prefix cache. Reused slots and blocks do not change the tokens."""
    harness = Harness(plain.checkpoint, sparse_attention=config_of("pages", 0.2, 0), kv_cache_mb=1, max_batch_size=3)
    harness.run(*image_requests(harness))
    first = tokens_of(harness)
    prompt = random_prompt(plain.checkpoint, LARGE, 1, before=9)
    harness.run(harness.request("a", prompt, LARGE, 1, max_tokens=20))
    turn = [*prompt, *harness.answers["a"].token_ids, 1, 2, 3]
    harness.run(harness.request("b", turn, LARGE, 1, sparse_mode="off"))
    usage = harness.answers["b"].last.usage
    assert usage is not None and usage.cached_tokens == len(prompt) // 4 * 4
    fresh = Harness(plain.checkpoint)
    fresh.run(fresh.request("b", turn, LARGE, 1))
    assert harness.answers["b"].token_ids == fresh.answers["b"].token_ids
    harness.run(*image_requests(harness))
    assert {name: ids for name, ids in tokens_of(harness).items() if name in first} == first
