"""The engine's loop without a model or torch: real scheduler and block pool, simulated cache contents and tokens."""

from dataclasses import dataclass, field
from typing import Any, cast

from autoglm.config import EngineConfig
from autoglm.llm.block_pool import BlockPool
from autoglm.llm.scheduler import Chunk, Scheduler
from autoglm.llm.sequence import Output, Prompt, Request, Sequence
from autoglm.preprocess.sampling_params import SamplingParams

VOCABULARY = 50


def next_token(token_ids: list[int]) -> int:
    """The simulated model's greedy token: depends on all tokens before it."""
    return hash(tuple(token_ids)) % VOCABULARY


class NoText:
    """A detokenizer that decodes nothing."""

    def add(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


@dataclass
class Simulation:
    """Runs passes one step ahead of their results, as the engine does.

    `cache` maps each slot of the KV cache to the prefix whose last key it holds; a pass that reads another prefix than
    its own fails.
    """

    config: EngineConfig
    num_blocks: int
    cache: dict[int, tuple[int, ...]] = field(default_factory=dict)
    sampled: dict[int | None, int] = field(default_factory=dict)  # the last token of each request slot
    outputs: dict[str, list[Output]] = field(default_factory=dict)
    admitted: list[str] = field(default_factory=list)
    in_flight: list[tuple[Chunk, int | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.config, BlockPool(self.num_blocks))

    def submit(self, name: str, token_ids: list[int], max_tokens: int, priority: int = 5) -> Sequence:
        self.outputs[name] = []
        params = SamplingParams(max_tokens=max_tokens, priority=priority)
        request = Request(
            request_id=name,
            token_ids=token_ids,
            sampling_params=params,
            sink=self.outputs[name].append,
            arrival_time=float(len(self.outputs)),
        )
        prompt = Prompt(token_ids=token_ids, positions=cast(Any, None), next_position=0, media=[], embeddings=None)
        detokenizer = cast(Any, NoText())
        sequence = Sequence(request, prompt, max_tokens=max_tokens, detokenizer=detokenizer, stop_token_ids=frozenset())
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> None:
        """Launch a pass, then collect the previous one."""
        waiting = list(self.scheduler.waiting)
        chunks = self.scheduler.schedule()
        self.admitted += [s.request.request_id for s in waiting if s not in self.scheduler.waiting]
        launched = [(chunk, self.compute(chunk)) for chunk in chunks]
        self.scheduler.mark_launched(chunks)
        self.scheduler.check_integrity()
        previous, self.in_flight = self.in_flight, launched
        for chunk, _ in previous:
            self.scheduler.mark_completed(chunk)
        for chunk, token in previous:
            sequence = chunk.sequence
            if token is not None and not sequence.removed:
                sequence.append(token)
                if sequence.finish_reason is not None:
                    self.scheduler.remove(sequence)
                sequence.emit()
        self.scheduler.check_integrity()

    def compute(self, chunk: Chunk) -> int | None:
        """Write the chunk's keys, read all keys of the sequence, and sample if the chunk does."""
        sequence = chunk.sequence
        if chunk.decodes:  # the previous pass sampled the token into the slot
            token_ids = [*sequence.token_ids[: chunk.start], self.sampled[sequence.slot]]
        else:
            token_ids = sequence.token_ids[: chunk.end]
        assert len(token_ids) == chunk.end
        for index in range(chunk.start, chunk.end):
            self.cache[self.slot(sequence, index)] = tuple(token_ids[: index + 1])
        for index in range(chunk.end):
            assert self.cache[self.slot(sequence, index)] == tuple(token_ids[: index + 1])
        if not chunk.samples:
            return None
        self.sampled[sequence.slot] = next_token(token_ids)
        return self.sampled[sequence.slot]

    def slot(self, sequence: Sequence, index: int) -> int:
        size = self.config.block_size
        return sequence.blocks[index // size] * size + index % size

    @property
    def busy(self) -> bool:
        return bool(self.in_flight or self.scheduler.running or self.scheduler.waiting)

    def run(self, max_steps: int = 10_000) -> None:
        for _ in range(max_steps):
            if not self.busy:
                return
            self.step()
        raise AssertionError(f"requests are still unfinished after {max_steps} steps")

    def answer(self, name: str) -> list[int]:
        return [token for output in self.outputs[name] for token in output.token_ids]


def answer_alone(token_ids: list[int], max_tokens: int) -> list[int]:
    """The answer to a prompt on its own."""
    tokens = list(token_ids)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(token_ids) :]
