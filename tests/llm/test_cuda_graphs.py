"""CUDA graphs: the shapes that have one; on a GPU, captured passes return the tokens of the CPU, and steps neither
synchronize, nor allocate, nor compile."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from autoglm.config import SparseAttentionConfig, SparseMode
from autoglm.llm.cuda_graphs import decode_sizes, mixed_shapes
from autoglm.llm.input_batch import BatchShape
from autoglm.llm.sequence import Request
from tests.conftest import Pair
from tests.llm.harness import CollectedOutputs, Harness
from tests.llm.structured_output.test_engine import sampled_requests
from tests.llm.test_engine import mixed_requests
from tests.prompts import random_text

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda", 0)


def test_sizes_of_decode_graphs() -> None:
    assert decode_sizes(1) == [1]
    assert decode_sizes(7) == [1, 2, 4, 7]
    assert decode_sizes(64) == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    assert decode_sizes(128) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128]


def test_shapes_of_graphs_with_prompts() -> None:
    shapes = mixed_shapes(max_batch_size=64, max_tokens=8192, max_mixed_tokens=1024)
    alone = [shape.num_tokens for shape in shapes if not shape.num_decode_tokens]
    assert alone == [64, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536]
    mixed = {shape.num_decode_tokens + shape.num_tokens for shape in shapes if shape.num_decode_tokens}
    assert mixed == {128, 256, 512, 1024}
    assert BatchShape(64, 8, 960) in shapes and BatchShape(16, 8, 1008) in shapes
    assert BatchShape(64, 8, 704) in mixed_shapes(max_batch_size=64, max_tokens=768, max_mixed_tokens=768)
    alone_only = mixed_shapes(max_batch_size=1, max_tokens=100, max_mixed_tokens=100)
    assert alone_only == [BatchShape(0, 1, 64), BatchShape(0, 1, 100)]
    large = mixed_shapes(max_batch_size=128, max_tokens=4096, max_mixed_tokens=4096)
    assert max(shape.num_decode_tokens + shape.num_tokens for shape in large) == 1536


@pytest.fixture
def warm(plain: Pair) -> Harness:
    harness = Harness(plain.checkpoint, GPU, max_batch_size=12, max_tokens_per_step=500)
    harness.engine.model_runner.capture(max_tokens=64, max_mixed_tokens=64)
    harness.engine.warm_up()
    return harness


@needs_gpu
def test_tokens_equal_those_of_the_cpu(plain: Pair, warm: Harness) -> None:
    """Sampled answers may differ where two tokens are almost equally likely."""
    cpu = Harness(plain.checkpoint)
    cpu.run(*mixed_requests(cpu))
    warm.run(*mixed_requests(warm))
    same = [warm.answers[name].token_ids == answer.token_ids for name, answer in cpu.answers.items()]
    assert sum(same) >= 30
    assert warm.all_blocks_available()


@needs_gpu
@pytest.mark.parametrize("mode", ["topk", "pages", "prune"])
def test_tokens_of_sparse_attention_equal_those_of_the_cpu(plain: Pair, mode: SparseMode) -> None:
    """Some may differ where two keys or blocks have almost equal scores."""
    config = SparseAttentionConfig(mode, 0.3, 1, 1)
    cpu = Harness(plain.checkpoint, sparse_attention=config)
    gpu = Harness(plain.checkpoint, GPU, config, max_batch_size=12, max_tokens_per_step=500)
    gpu.engine.model_runner.capture(max_tokens=64, max_mixed_tokens=64)
    cpu.run(*mixed_requests(cpu))
    gpu.run(*mixed_requests(gpu))
    same = [gpu.answers[name].token_ids == answer.token_ids for name, answer in cpu.answers.items()]
    assert sum(same) >= 29
    assert gpu.all_blocks_available()


@needs_gpu
def test_tokens_of_deferred_sampling_equal_those_of_the_cpu(plain: Pair, warm: Harness) -> None:
    """Sampled answers may differ where two tokens are almost equally likely."""
    cpu = Harness(plain.checkpoint)
    for harness in (cpu, warm):
        harness.run(*mixed_requests(harness), *deferred_requests(harness))
    same = [name for name, answer in cpu.answers.items() if warm.answers[name].token_ids == answer.token_ids]
    assert len(same) >= len(cpu.answers) - 3
    for name in same:
        expected, found = (harness.answers[name].logprobs for harness in (cpu, warm))
        assert [item.logprob for item in found] == pytest.approx([item.logprob for item in expected], abs=1e-2)
        assert [len(item.top) for item in found] == [len(item.top) for item in expected]
    assert warm.all_blocks_available()


def deferred_requests(harness: Harness) -> list[Request]:
    """With grammars, with log probabilities, and with both; greedy, sampled and truncated."""
    requests = sampled_requests(harness)
    for index, request in enumerate(requests):
        if index % 6 == 0:
            params = replace(request.sampling_params, logprobs=5, response_format=None)
        elif index % 3 == 0:
            params = replace(request.sampling_params, logprobs=5)
        else:
            continue
        requests[index] = replace(request, sampling_params=params)
    return requests


@pytest.fixture
def synchronization_fails() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_launches_do_not_synchronize(warm: Harness, synchronization_fails: None) -> None:
    options: list[dict[str, Any]] = [{}, {"temperature": 1.0, "top_p": 0.9}, {"repetition_penalty": 1.2}]
    warm.submit(*(warm.request(f"{i}", random_text(20, i), max_tokens=9, **o) for i, o in enumerate(options)))
    for i in range(30):
        if i == 4:
            warm.submit(warm.request("later", random_text(60, 9), max_tokens=5))
        warm.engine.step()
    assert all(answer.last.error is None for answer in warm.answers.values())


@needs_gpu
def test_deferred_sampling_does_not_synchronize(warm: Harness, request: pytest.FixtureRequest) -> None:
    requests = [
        replace(r, image_embeddings=None if r.image_embeddings is None else r.image_embeddings.to(GPU))
        for r in deferred_requests(warm)
    ]
    warm.answers["first"] = CollectedOutputs()
    warm.run(*(replace(r, request_id="first") for r in requests[:6]))  # one-time work is done here
    warm.submit(*requests[6:])
    request.getfixturevalue("synchronization_fails")
    while warm.engine.busy:
        warm.engine.step()
    assert all(answer.last.error is None for answer in warm.answers.values() if answer.outputs)


@needs_gpu
@pytest.mark.parametrize("mode", ["topk", "pages", "prune"])
def test_sparse_attention_does_not_synchronize(plain: Pair, mode: SparseMode, request: pytest.FixtureRequest) -> None:
    config = SparseAttentionConfig(mode, 0.3, 1, 1)
    harness = Harness(plain.checkpoint, GPU, config, max_batch_size=12, max_tokens_per_step=500)
    harness.engine.model_runner.capture(max_tokens=64, max_mixed_tokens=64)
    requests = [harness.random_request(f"{i}", i, [(1, 16, 12)], max_tokens=9) for i in range(6)]
    requests = [
        replace(r, image_embeddings=r.image_embeddings.to(GPU)) for r in requests if r.image_embeddings is not None
    ]
    harness.run(*requests[:3])  # one-time work is done here
    harness.submit(*requests[3:])
    request.getfixturevalue("synchronization_fails")
    for _ in range(30):
        harness.engine.step()
    assert all(answer.last.error is None for answer in harness.answers.values())


@needs_gpu
def test_decode_steps_do_not_allocate(warm: Harness) -> None:
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

    def record(**compilation: Any) -> None:
        kernels.append(compilation["repr"])

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", record)
    return kernels


@needs_gpu
def test_nothing_is_compiled_after_the_warm_up(warm: Harness, compiled: list[str]) -> None:
    compiled.clear()
    warm.run(*mixed_requests(warm), *deferred_requests(warm))
    assert compiled == []


@needs_gpu
def test_passes_without_graphs_compile_nothing(warm: Harness, compiled: list[str]) -> None:
    """Prompts too long for any graph, while 1 to 11 sequences decode."""
    compiled.clear()
    for number in range(12):
        warm.submit(warm.request(f"{number}", random_text(97 + 5 * number, number), max_tokens=60))
        warm.engine.step()
        warm.engine.step()
    while warm.engine.busy:
        warm.engine.step()
    assert compiled == []
