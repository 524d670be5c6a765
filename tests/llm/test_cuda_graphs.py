"""On a GPU: captured passes give the CPU's tokens, and steps neither wait, nor allocate, nor compile."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from autoglm.config import SparseAttentionConfig
from autoglm.llm.sequence import Request
from autoglm.llm.sparse.policy import Mode
from tests.conftest import Pair
from tests.llm.harness import Harness
from tests.llm.structured_output.test_engine import drawn_requests
from tests.llm.test_engine import mixed_requests
from tests.llm.test_logprobs import logprobs_of
from tests.prompts import random_text

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda", 0)


@pytest.fixture
def warm(plain: Pair) -> Harness:
    harness = Harness(plain.checkpoint, GPU, max_batch_size=12, max_tokens_per_step=500)
    harness.engine.runner.capture(64, 64)
    harness.engine.warm_up()
    return harness


def test_tokens_are_the_cpu_s(plain: Pair, warm: Harness) -> None:
    """Some of the sampled ones may part where two tokens are as good as equal."""
    cpu = Harness(plain.checkpoint)
    cpu.run(*mixed_requests(cpu))
    warm.run(*mixed_requests(warm))
    same = [warm.answers[name].token_ids == answer.token_ids for name, answer in cpu.answers.items()]
    assert sum(same) >= 30
    assert warm.all_blocks_back()


@pytest.mark.parametrize("mode", ["topk", "pages", "snap", "prune"])
def test_sparse_tokens_are_the_cpu_s(plain: Pair, mode: Mode) -> None:
    """Some may part where two keys or blocks are as strong as each other."""
    config = SparseAttentionConfig(mode, 0.3, 1, 1)
    cpu = Harness(plain.checkpoint, sparse_attention=config)
    gpu = Harness(plain.checkpoint, GPU, config, max_batch_size=12, max_tokens_per_step=500)
    gpu.engine.runner.capture(64, 64)
    cpu.run(*mixed_requests(cpu))
    gpu.run(*mixed_requests(gpu))
    same = [gpu.answers[name].token_ids == answer.token_ids for name, answer in cpu.answers.items()]
    assert sum(same) >= 29
    assert gpu.all_blocks_back()


def test_late_tokens_are_the_cpu_s(plain: Pair, warm: Harness) -> None:
    """Some of the sampled ones may part where two tokens are as good as equal."""
    cpu = Harness(plain.checkpoint)
    for harness in (cpu, warm):
        harness.run(*mixed_requests(harness), *late_requests(harness))
    same = [name for name, answer in cpu.answers.items() if warm.answers[name].token_ids == answer.token_ids]
    assert len(same) >= len(cpu.answers) - 3
    for name in same:
        wanted, found = (logprobs_of(harness.answers[name]) for harness in (cpu, warm))
        assert [item.logprob for item in found] == pytest.approx([item.logprob for item in wanted], abs=1e-2)
        assert [len(item.top) for item in found] == [len(item.top) for item in wanted]
    assert warm.all_blocks_back()


def late_requests(harness: Harness) -> list[Request]:
    """In grammars, with log probabilities, and both; greedy, drawn and cut."""
    requests = drawn_requests(harness)
    for place, request in enumerate(requests):
        if place % 3 == 0:
            requests[place] = replace(request, sampling=replace(request.sampling, logprobs=5))
        if place % 6 == 0:
            requests[place] = replace(request, sampling=replace(request.sampling, logprobs=5, response_format=None))
    return requests


@pytest.fixture
def nothing_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_no_launch_waits(warm: Harness, nothing_waits: None) -> None:
    options: list[dict[str, Any]] = [{}, {"temperature": 1.0, "top_p": 0.9}, {"repetition_penalty": 1.2}]
    warm.submit(*(warm.request(f"{i}", random_text(20, i), max_tokens=9, **o) for i, o in enumerate(options)))
    for i in range(30):
        if i == 4:
            warm.submit(warm.request("later", random_text(60, 9), max_tokens=5))
        warm.engine.step()
    assert all(answer.last.error is None for answer in warm.answers.values())


def test_no_late_launch_waits(warm: Harness, request: pytest.FixtureRequest) -> None:
    requests = [
        replace(r, embeddings=None if r.embeddings is None else r.embeddings.to(GPU)) for r in late_requests(warm)
    ]
    warm.run(*(replace(r, request_id="first") for r in requests[:6]))  # what happens once happens here
    warm.submit(*requests[6:])
    request.getfixturevalue("nothing_waits")
    while warm.engine.busy:
        warm.engine.step()
    assert all(answer.last.error is None for name, answer in warm.answers.items() if answer.pieces)


@pytest.mark.parametrize("mode", ["topk", "pages", "snap", "prune"])
def test_no_sparse_launch_waits(plain: Pair, mode: Mode, request: pytest.FixtureRequest) -> None:
    config = SparseAttentionConfig(mode, 0.3, 1, 1)
    harness = Harness(plain.checkpoint, GPU, config, max_batch_size=12, max_tokens_per_step=500)
    harness.engine.runner.capture(64, 64)
    requests = [harness.random_request(f"{i}", i, [(1, 16, 12)], max_tokens=9) for i in range(6)]
    requests = [replace(r, embeddings=r.embeddings.to(GPU)) for r in requests if r.embeddings is not None]
    harness.run(*requests[:3])  # what happens once happens here
    harness.submit(*requests[3:])
    request.getfixturevalue("nothing_waits")
    for _ in range(30):
        harness.engine.step()
    assert all(answer.last.error is None for answer in harness.answers.values())


def test_decode_steps_allocate_nothing(warm: Harness) -> None:
    warm.submit(*(warm.request(f"{i}", random_text(20, i), max_tokens=50, frequency_penalty=0.2) for i in range(5)))
    for _ in range(5):
        warm.engine.step()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(30):
        warm.engine.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are compiled from now on."""
    from triton import knobs

    kernels: list[str] = []

    def note(**what: Any) -> None:
        kernels.append(what["repr"])

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", note)
    return kernels


def test_nothing_is_compiled_after_the_warm_up(warm: Harness, compiled: list[str]) -> None:
    compiled.clear()
    warm.run(*mixed_requests(warm), *late_requests(warm))
    assert compiled == []


def test_passes_without_graphs_compile_nothing(warm: Harness, compiled: list[str]) -> None:
    """Prompts that no graph holds, beside 1 to 11 answers."""
    compiled.clear()
    for number in range(12):
        warm.submit(warm.request(f"{number}", random_text(97 + 5 * number, number), max_tokens=60))
        warm.engine.step()
        warm.engine.step()
    while warm.engine.busy:
        warm.engine.step()
    assert compiled == []
