"""In-process engines for the benchmarks: building them, submitting prompts, and timing the answers."""

import itertools
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from autoglm.checkpoint import Checkpoint
from autoglm.config import SparseAttentionConfig, load_config
from autoglm.device import choose_device
from autoglm.llm.engine import Engine
from autoglm.llm.sequence import Output, Request
from autoglm.preprocess.sampling_params import SamplingParams

TIMEOUT_S = 600.0
KV_CACHE_MB = 8192  # 200,000 tokens of the 9B shape in bf16

_request_ids = itertools.count()


def build_engine(
    checkpoint: Checkpoint, setting: str, sparse_attention: SparseAttentionConfig | None = None, **engine_config: Any
) -> Engine:
    """An engine with the default configuration on the best available device; its thread is not started.

    Args:
        setting: `int8`, or `bf16` for unquantised weights (fp32 on the CPU).
        sparse_attention: None uses the default.
        engine_config: overrides of the configuration's section `engine`.
    """
    config = load_config()
    config = replace(
        config,
        quantization=replace(config.quantization, enabled=setting == "int8"),
        engine=replace(config.engine, **engine_config),
        sparse_attention=sparse_attention or config.sparse_attention,
    )
    return Engine.from_config(checkpoint, config, *choose_device(config.model))


def open_engine(checkpoint: Checkpoint, setting: str, kv_cache_mb: int = KV_CACHE_MB, **options: Any) -> Engine:
    """`build_engine`, started, with a KV cache that leaves device memory for the benchmark itself."""
    engine = build_engine(checkpoint, setting, kv_cache_mb=kv_cache_mb, **options)
    engine.start()
    return engine


@dataclass
class Stream:
    """A request's sink. Records the `time.perf_counter` of each token."""

    request_id: str = field(default_factory=lambda: str(next(_request_ids)))
    times: list[float] = field(default_factory=list)
    error: Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def __call__(self, output: Output) -> None:
        self.times += [time.perf_counter()] * len(output.token_ids)
        self.error = output.error
        if output.is_last:
            self.done.set()

    def wait(self) -> None:
        """Wait for the end of the answer.

        Raises:
            RequestError: the request has failed.
            TimeoutError: the answer is not complete after TIMEOUT_S.
        """
        if not self.done.wait(TIMEOUT_S):
            raise TimeoutError(f"no answer within {TIMEOUT_S:.0f} s")
        if self.error is not None:
            raise self.error

    def wait_for(self, num_tokens: int) -> None:
        """Wait for this many tokens, or the end of the answer; polls every millisecond."""
        while len(self.times) < num_tokens and not self.done.is_set():
            time.sleep(0.001)


@dataclass(frozen=True)
class BenchmarkPrompt:
    """Token ids, and optionally one image with embeddings [image tokens, hidden_size]."""

    token_ids: list[int]
    grid: tuple[int, int, int] | None = None
    media_hash: bytes = b""
    embeddings: torch.Tensor | None = None

    def request(self, stream: Stream, max_tokens: int, **params: Any) -> Request:
        """A greedy request for exactly `max_tokens` tokens; `params` are fields of SamplingParams."""
        return Request(
            request_id=stream.request_id,
            token_ids=self.token_ids,
            sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params),
            sink=stream,
            image_grids=[self.grid] if self.grid else [],
            image_hashes=[self.media_hash] if self.grid else [],
            image_embeddings=self.embeddings,
        )


def random_prompt(checkpoint: Checkpoint, length: int) -> BenchmarkPrompt:
    """Random ordinary tokens, so that the prefix cache never hits."""
    special = (checkpoint.image_token_id, checkpoint.image_start_token_id, checkpoint.image_end_token_id)
    return BenchmarkPrompt(random.choices(range(min(*special, *checkpoint.eos_token_ids)), k=length))


def image_prompt(engine: Engine, length: int, grid: tuple[int, int, int]) -> BenchmarkPrompt:
    """A prompt of `length` tokens: random text around one image with random embeddings."""
    checkpoint = engine.checkpoint
    rows = grid[0] * grid[1] * grid[2] // checkpoint.vision.spatial_merge_size**2
    text = random_prompt(checkpoint, length - rows - 2).token_ids
    half = len(text) // 2
    image = [checkpoint.image_start_token_id, *[checkpoint.image_token_id] * rows, checkpoint.image_end_token_id]
    device = engine.model_runner.device
    embeddings = torch.randn(rows, checkpoint.text.hidden_size, device=device).bfloat16()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return BenchmarkPrompt(text[:half] + image + text[half:], grid, random.randbytes(32), embeddings)


def submit(engine: Engine, prompts: Sequence[BenchmarkPrompt], max_tokens: int, **params: Any) -> list[Stream]:
    streams = [Stream() for _ in prompts]
    requests = [prompt.request(stream, max_tokens, **params) for prompt, stream in zip(prompts, streams, strict=True)]
    for request in requests:
        engine.submit(request)
    return streams


def answer_seconds(engine: Engine, prompts: Sequence[BenchmarkPrompt], max_tokens: int, **params: Any) -> float:
    """Seconds from the submission of all prompts to the last token of the last answer.

    Raises:
        RuntimeError: an answer has ended early.
    """
    start = time.perf_counter()
    streams = submit(engine, prompts, max_tokens, **params)
    for stream in streams:
        stream.wait()
        if len(stream.times) != max_tokens:
            raise RuntimeError(f"an answer of {max_tokens} tokens ended after {len(stream.times)}")
    return max(stream.times[-1] for stream in streams) - start


def resident_bytes(*modules: nn.Module) -> int:
    """Bytes of all weights on the device that the modules compute on; shared storage counts once."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    device = "cuda" if any(tensor.is_cuda for tensor in tensors) else "cpu"
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == device]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
