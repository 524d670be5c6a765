"""The engine in this process, as the benchmarks use it: built here, asked here, timed as a caller of it sees time."""

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

LONGEST_WAIT = 600.0  # seconds
KV_CACHE_MB = 8192  # 200 000 tokens of the 9B shape in bf16

_numbers = itertools.count()


def build_engine(
    checkpoint: Checkpoint, setting: str, sparse_attention: SparseAttentionConfig | None = None, **changes: Any
) -> Engine:
    """An engine that is not started, with the configuration's defaults, on the best device there is.

    Args:
        setting: `int8`, or `bf16` for weights as the checkpoint has them (the CPU computes these in fp32).
        sparse_attention: None takes the configuration's.
        changes: of single values of the configuration's section `engine`.
    """
    config = load_config()
    config = replace(
        config,
        quantization=replace(config.quantization, enabled=setting == "int8"),
        engine=replace(config.engine, **changes),
        sparse_attention=sparse_attention or config.sparse_attention,
    )
    return Engine.from_config(checkpoint, config, *choose_device(config.model))


def open_engine(checkpoint: Checkpoint, setting: str, kv_cache_mb: int = KV_CACHE_MB, **changes: Any) -> Engine:
    """The same, started, with a KV cache that leaves room for what a benchmark holds beside it."""
    engine = build_engine(checkpoint, setting, kv_cache_mb=kv_cache_mb, **changes)
    engine.start()
    return engine


@dataclass
class Stream:
    """A request's sink: when each of its tokens came, in seconds of `time.perf_counter`."""

    request_id: str = field(default_factory=lambda: str(next(_numbers)))
    times: list[float] = field(default_factory=list)
    error: Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def __call__(self, output: Output) -> None:
        self.times += [time.perf_counter()] * len(output.token_ids)
        self.error = output.error
        if output.is_last:
            self.done.set()

    def wait(self) -> None:
        """Until the answer is complete.

        Raises:
            RequestError: the request has failed.
            TimeoutError: nothing has come for too long.
        """
        if not self.done.wait(LONGEST_WAIT):
            raise TimeoutError(f"no answer in {LONGEST_WAIT:.0f} s")
        if self.error is not None:
            raise self.error

    def wait_for(self, count: int) -> None:
        """Until so many tokens have come. Looks every millisecond."""
        while len(self.times) < count and not self.done.is_set():
            time.sleep(0.001)


@dataclass(frozen=True)
class Prompt:
    """Token ids, and for a prompt with one image its grid, digest and embeddings [tokens, hidden]."""

    token_ids: list[int]
    grid: tuple[int, int, int] | None = None
    digest: bytes = b""
    embeddings: torch.Tensor | None = None

    def request(self, stream: Stream, max_tokens: int, **options: Any) -> Request:
        """Greedy, for exactly so many tokens; `options` are of SamplingParams."""
        grids, digests = ([self.grid], [self.digest]) if self.grid else ([], [])
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **options)
        return Request(stream.request_id, self.token_ids, params, stream, grids, digests, self.embeddings)


def random_prompt(checkpoint: Checkpoint, length: int) -> Prompt:
    """Ordinary tokens, others each time: the prefix cache knows none of them."""
    special = (checkpoint.image_token_id, checkpoint.image_start_token_id, checkpoint.image_end_token_id)
    return Prompt(random.choices(range(min(*special, *checkpoint.eos_token_ids)), k=length))


def image_prompt(engine: Engine, length: int, grid: tuple[int, int, int]) -> Prompt:
    """Random text around one image of random embeddings, together so many tokens."""
    checkpoint = engine.checkpoint
    rows = grid[0] * grid[1] * grid[2] // checkpoint.vision.spatial_merge_size**2
    text = random_prompt(checkpoint, length - rows - 2).token_ids
    half = len(text) // 2
    image = [checkpoint.image_start_token_id, *[checkpoint.image_token_id] * rows, checkpoint.image_end_token_id]
    device = engine.runner.device
    embeddings = torch.randn(rows, checkpoint.text.hidden_size, device=device).bfloat16()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Prompt(text[:half] + image + text[half:], grid, random.randbytes(32), embeddings)


def submit(engine: Engine, prompts: Sequence[Prompt], max_tokens: int, **options: Any) -> list[Stream]:
    streams = [Stream() for _ in prompts]
    requests = [prompt.request(stream, max_tokens, **options) for prompt, stream in zip(prompts, streams, strict=True)]
    for request in requests:
        engine.submit(request)
    return streams


def answer_seconds(engine: Engine, prompts: Sequence[Prompt], max_tokens: int, **options: Any) -> float:
    """From the submission of prompts, all together, to the last token of the last of them.

    Raises:
        RuntimeError: an answer has ended early.
    """
    began = time.perf_counter()
    streams = submit(engine, prompts, max_tokens, **options)
    for stream in streams:
        stream.wait()
        if len(stream.times) != max_tokens:
            raise RuntimeError(f"an answer of {max_tokens} tokens ended after {len(stream.times)}")
    return max(stream.times[-1] for stream in streams) - began


def resident_bytes(*modules: nn.Module) -> int:
    """Bytes of all weights that lie on the device the model computes on; what is shared counts once."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    device = "cuda" if any(tensor.is_cuda for tensor in tensors) else "cpu"
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == device]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
