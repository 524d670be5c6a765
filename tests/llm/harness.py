"""Runs requests through an engine, step by step in the test's thread, and collects their outputs."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import pytest
import torch

from autoglm.checkpoint import Checkpoint
from autoglm.config import EngineConfig, SparseAttentionConfig
from autoglm.llm import model_runner
from autoglm.llm.engine import Engine
from autoglm.llm.scheduler import Chunk
from autoglm.llm.sequence import Output, Request, TokenLogprob
from autoglm.preprocess.sampling_params import SamplingParams
from autoglm.vision.vit import VisionTransformer
from tests.prompts import Grid, random_pixels, random_prompt

CPU = torch.device("cpu")
MAX_STEPS = 10_000
MAX_WAIT_S = 20
SMALL = EngineConfig(kv_cache_mb=8, block_size=4, max_tokens_per_step=64, max_context=2048, default_max_tokens=16)


@dataclass
class CollectedOutputs:
    """The outputs that a request's sink received."""

    outputs: list[Output] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return [id_ for output in self.outputs for id_ in output.token_ids]

    @property
    def text(self) -> str:
        return "".join(output.text for output in self.outputs)

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [item for output in self.outputs for item in output.logprobs]

    @property
    def ended(self) -> bool:
        return bool(self.outputs) and self.outputs[-1].is_last

    @property
    def last(self) -> Output:
        assert [output.is_last for output in self.outputs] == [False] * (len(self.outputs) - 1) + [True]
        return self.outputs[-1]


class Harness:
    """An engine without its thread."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device = CPU,
        sparse_attention: SparseAttentionConfig | None = None,
        **changes: Any,
    ) -> None:
        self.checkpoint = checkpoint
        config = replace(SMALL, **changes)
        self.engine = Engine(checkpoint, config, device, torch.float32, sparse_attention=sparse_attention)
        for memory in (self.engine.model_runner.kv_cache.keys, self.engine.model_runner.kv_cache.values):
            memory.view(torch.uint8).fill_(0xFF)  # NaN in every float
        self.vit = VisionTransformer.load(checkpoint, CPU, torch.float32)
        self.answers: dict[str, CollectedOutputs] = {}

    @property
    def token_ids(self) -> dict[str, list[int]]:
        """The tokens of all answers."""
        return {name: answer.token_ids for name, answer in self.answers.items()}

    def request(
        self, name: str, token_ids: list[int], grids: list[Grid] | None = None, pixel_seed: int = 0, **options: Any
    ) -> Request:
        """A request whose images are random pixels of `pixel_seed`."""
        answer = self.answers[name] = CollectedOutputs()
        embeddings = self.vit(random_pixels(grids, pixel_seed), grids) if grids else None
        return Request(
            request_id=name,
            token_ids=token_ids,
            sampling_params=SamplingParams.from_parameters({"ignore_eos": True, **options}, {}),
            sink=answer.outputs.append,
            image_grids=grids or [],
            image_hashes=[sha256(f"{pixel_seed} {i} {grid}".encode()).digest() for i, grid in enumerate(grids or [])],
            image_embeddings=embeddings,
        )

    def random_request(self, name: str, variant: int, grids: list[Grid] | None = None, **options: Any) -> Request:
        prompt = random_prompt(self.checkpoint, grids or [], variant, before=5 + variant * 7 % 40)
        return self.request(name, prompt, grids, variant, **options)

    def submit(self, *requests: Request) -> None:
        """Submit requests and accept them at once, as the engine's thread would."""
        for request in requests:
            self.engine.submit(request)
            if not self.answers[request.request_id].outputs:  # not rejected
                self.engine.receive()

    def cancel(self, request_id: str) -> None:
        self.engine.cancel(request_id)
        self.engine.receive()

    def step(self) -> None:
        """A step of the engine; then check the pool, and overwrite the state of free slots, which must not be read."""
        self.engine.step()
        self.engine.scheduler.check_integrity()
        slots, scheduler = self.engine.model_runner.slots, self.engine.scheduler
        free = sorted(set(range(scheduler.max_batch_size)) - {sequence.slot for sequence in scheduler.running})
        for memory in (
            slots.block_tables, slots.state.last_tokens, slots.state.output_token_counts, slots.state.sampling_metadata,
            slots.state.logits_buffer,
        ):  # fmt: skip
            memory[free] = 2**31 - 1

    def run(self, *requests: Request) -> None:
        """Submit, then step until the engine is idle."""
        self.submit(*requests)
        for _ in range(MAX_STEPS):
            if not self.engine.busy:
                return
            self.step()
        raise AssertionError(f"the engine is still busy after {MAX_STEPS} steps")

    def wait(self, *names: str) -> None:
        """Wait until the engine's thread has finished these requests, or all."""
        end = time.monotonic() + MAX_WAIT_S
        while not all(self.answers[name].ended for name in names or self.answers):
            assert time.monotonic() < end, "the requests are still unfinished"
            time.sleep(0.005)

    def all_blocks_available(self) -> bool:
        self.engine.scheduler.check_integrity()
        return self.engine.scheduler.pool.num_available == self.engine.scheduler.pool.num_blocks

    def record_launches(self, monkeypatch: pytest.MonkeyPatch) -> list[list[Chunk]]:
        """The chunks of the passes that are launched from now on."""
        launched: list[list[Chunk]] = []
        launch = self.engine.model_runner.launch

        def record(chunks: list[Chunk]) -> model_runner.LaunchedPass:
            launched.append(chunks)
            return launch(chunks)

        monkeypatch.setattr(self.engine.model_runner, "launch", record)
        return launched

    def pad_passes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Run passes padded to the shapes of CUDA graphs, as on a GPU, but without capturing them."""
        monkeypatch.setattr(model_runner, "capture", lambda passes: [UncapturedPass(*each) for each in passes])
        self.engine.model_runner.capture(max_tokens=64, max_mixed_tokens=64)


@dataclass(frozen=True)
class UncapturedPass:
    """In place of a `CapturedPass`: runs the function itself, on copies of its inputs."""

    run: Callable[..., torch.Tensor]
    inputs: tuple[torch.Tensor, ...]

    def replay(self) -> torch.Tensor:
        return self.run(*(each.clone() for each in self.inputs))
