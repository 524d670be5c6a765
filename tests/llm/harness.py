"""Runs requests through an engine, step by step in the test's own thread, and collects what comes back."""

from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import torch

from autoglm.checkpoint import Checkpoint
from autoglm.config import EngineConfig, SparseAttentionConfig
from autoglm.llm.engine import Engine
from autoglm.llm.sequence import Output, Request, Sequence
from autoglm.preprocess.sampling_params import SamplingParams
from autoglm.vision.vit import VisionTransformer
from tests.prompts import Grid, random_pixels, random_prompt

CPU = torch.device("cpu")
SMALL = EngineConfig(kv_cache_mb=8, block_size=4, max_tokens_per_step=64, max_context=2048, default_max_tokens=16)


@dataclass
class Answer:
    """Everything that a request's sink received."""

    pieces: list[Output] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return [id_ for piece in self.pieces for id_ in piece.token_ids]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def last(self) -> Output:
        assert [piece.is_last for piece in self.pieces] == [False] * (len(self.pieces) - 1) + [True]
        return self.pieces[-1]


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
        for memory in (self.engine.runner.cache.keys, self.engine.runner.cache.values):
            memory.view(torch.uint8).fill_(0xFF)  # NaN in every float
        self.vit = VisionTransformer.load(checkpoint, CPU, torch.float32)
        self.answers: dict[str, Answer] = {}

    def request(
        self, name: str, token_ids: list[int], grids: list[Grid] | None = None, pixel_seed: int = 0, **options: Any
    ) -> Request:
        """A request whose images are random pixels of `pixel_seed`."""
        answer = self.answers[name] = Answer()
        embeddings = self.vit(random_pixels(grids, pixel_seed), grids) if grids else None
        digests = [sha256(f"{pixel_seed} {i} {grid}".encode()).digest() for i, grid in enumerate(grids or [])]
        params = SamplingParams.from_parameters({"ignore_eos": True, **options}, {})
        return Request(name, token_ids, params, answer.pieces.append, grids or [], digests, embeddings)

    def random_request(self, name: str, variant: int, grids: list[Grid] | None = None, **options: Any) -> Request:
        prompt = random_prompt(self.checkpoint, grids or [], variant, before=5 + variant * 7 % 40)
        return self.request(name, prompt, grids, variant, **options)

    def submit(self, *requests: Request) -> None:
        """Put requests in, and do at once what the engine's thread would."""
        for request in requests:
            self.engine.submit(request)
            while not self.engine._inbox.empty():
                sequence = self.engine._inbox.get()
                assert isinstance(sequence, Sequence)
                self.engine._accept(sequence)

    def step(self) -> None:
        """A step of the engine, after which the pool is checked, and what nobody should read any more is spoilt."""
        self.engine.step()
        self.engine.scheduler.check_integrity()
        seats, free = self.engine.runner.seats, self.engine.scheduler._seats
        for memory in (seats.tokens, seats.tables, seats.marks, seats.records, seats.logits):
            memory[free] = 2**31 - 1

    def run(self, *requests: Request, steps: int = 10_000) -> None:
        """Submit, then step until nothing is left."""
        self.submit(*requests)
        for _ in range(steps):
            if not self.engine.busy:
                break
            self.step()

    def all_blocks_back(self) -> bool:
        self.engine.scheduler.check_integrity()
        return self.engine.scheduler.pool.available == self.engine.scheduler.pool.size
