"""Continuous batching: one thread that takes requests in, runs forward passes and hands answers out.

The thread owns everything below it (scheduler, pool, cache, model); other threads only put into its inbox.
"""

import logging
import queue
import threading
import time
from dataclasses import dataclass
from typing import Literal

import torch

from autoglm.checkpoint import Checkpoint
from autoglm.config import EngineConfig
from autoglm.errors import ErrorCode, RequestError
from autoglm.llm.block_pool import BlockPool
from autoglm.llm.kv_cache import KVCache
from autoglm.llm.model import LanguageModel
from autoglm.llm.positions import image_runs, prompt_positions
from autoglm.llm.prefix_keys import MediaSpan
from autoglm.llm.runner import ModelRunner
from autoglm.llm.scheduler import Chunk, Scheduler
from autoglm.llm.sequence import FinishReason, Output, Request, Sequence
from autoglm.llm.stop import stop_ids
from autoglm.tokenizer import Detokenizer, Vocabulary

log = logging.getLogger(__name__)

LONGEST_WAIT = 0.05  # seconds between looks at the deadlines of waiting requests while nothing runs


@dataclass
class EngineStats:
    """Totals since the start, and what is in hand; written by the engine's thread only."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    running: int = 0
    waiting: int = 0
    blocks_total: int = 0
    blocks_held: int = 0
    blocks_cached: int = 0


class Engine:
    """Serves one language model. `start` begins to work on what `submit` brings; `close` ends it."""

    def __init__(
        self, checkpoint: Checkpoint, config: EngineConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        text = checkpoint.text
        self.checkpoint = checkpoint
        self.config = config
        self.vocabulary = Vocabulary(checkpoint.path)
        blocks = KVCache.blocks_in(config.kv_cache_mb, text, config.block_size, dtype)
        self.max_context = min(config.max_context, text.max_position_embeddings, blocks * config.block_size)
        cache = KVCache(text, blocks, config.block_size, device, dtype)
        self.runner = ModelRunner(LanguageModel.load(checkpoint, device, dtype), cache)
        self.scheduler = Scheduler(
            BlockPool(blocks),
            config.block_size,
            config.max_batch_size,
            config.max_tokens_per_step,
            config.max_queue_size,
            config.prefix_cache,
        )
        self.stats = EngineStats(blocks_total=blocks)
        self._inbox: queue.SimpleQueue[Request | tuple[str, FinishReason] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._closing = False

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End every request as cancelled, and the thread."""
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, request: Request) -> None:
        """Queue a request; everything about it, refusals included, goes to its sink."""
        self._inbox.put(request)

    def cancel(self, request_id: str, reason: Literal["cancelled", "timeout"] = "cancelled") -> None:
        """End the requests of this id, queued or running; unknown ids are ignored."""
        self._inbox.put((request_id, reason))

    def _work(self) -> None:
        try:
            while not self._closing:
                self._take_in()
                self._expire()
                self.step()
            for sequence in list(self.scheduler):
                self._finish(sequence, "cancelled")
        except Exception as error:
            log.exception("the engine has stopped")
            self._refuse_all(RequestError(f"the engine has stopped: {error}", ErrorCode.INTERNAL))

    def _refuse_all(self, fault: RequestError) -> None:
        """After a fault of the engine itself nothing can be trusted: every request, present or coming, is told so."""
        for sequence in self.scheduler:
            sequence.request.sink(Output(error=fault))
        while not self._closing:
            item = self._inbox.get()
            if isinstance(item, Request):
                item.sink(Output(error=fault))
            self._closing = item is None

    def _take_in(self) -> None:
        """Empty the inbox; wait for it when nothing else is to do."""
        block = not self.scheduler.running
        while True:
            try:
                item = self._inbox.get(block, LONGEST_WAIT if self.scheduler.waiting else None)
            except queue.Empty:
                return
            block = False
            if item is None:
                self._closing = True
            elif isinstance(item, Request):
                self._accept(item)
            else:
                for sequence in [s for s in self.scheduler if s.request.request_id == item[0]]:
                    self._finish(sequence, item[1])

    def _accept(self, request: Request) -> None:
        try:
            self.scheduler.add(self._sequence(request))
        except RequestError as error:
            request.sink(Output(error=error))
        except Exception as error:  # whatever it brought, it is this request's alone
            log.exception("a request could not be taken in")
            request.sink(Output(error=RequestError(f"the request failed: {error}", ErrorCode.INTERNAL)))
        else:
            self.stats.requests += 1

    def _sequence(self, request: Request) -> Sequence:
        length = len(request.token_ids)
        if not 0 < length < self.max_context:
            raise RequestError(f"prompt: {length} tokens; allowed: 1 to {self.max_context - 1} (engine.max_context)")
        highest = max(request.token_ids)
        if highest >= self.checkpoint.text.vocab_size or min(request.token_ids) < 0:
            raise RequestError(f"prompt: token id {highest}; allowed: 0 to {self.checkpoint.text.vocab_size - 1}")
        merge = self.checkpoint.vision.spatial_merge_size
        image_token = self.checkpoint.image_token_id
        try:
            runs = image_runs(request.token_ids, request.grids, image_token, merge)
            positions, following = prompt_positions(request.token_ids, request.grids, image_token, merge)
        except ValueError as error:
            raise RequestError(str(error)) from None
        media = [MediaSpan(digest, *run) for digest, run in zip(request.digests, runs, strict=True)]
        rows = 0 if request.embeddings is None else request.embeddings.shape[0]
        if rows != sum(span.length for span in media):
            raise RequestError(
                f"embeddings: {rows} rows for {sum(span.length for span in media)} image tokens", ErrorCode.INTERNAL
            )
        wanted = request.sampling.max_tokens or self.config.default_max_tokens
        return Sequence(
            request,
            positions,
            following,
            media,
            Detokenizer(self.vocabulary),
            stop_ids(self.checkpoint.eos_token_ids, request.sampling.stop_token_ids, request.sampling.ignore_eos),
            min(wanted, self.max_context - length),
        )

    def _expire(self) -> None:
        now = time.monotonic()
        for sequence in [s for s in self.scheduler if s.deadline is not None and s.deadline <= now]:
            self._finish(sequence, "timeout")

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self.scheduler.remove(sequence)
        sequence.finish_reason = reason
        sequence.emit()

    def step(self) -> None:
        """One forward pass over what the scheduler chooses, and what follows from it."""
        chunks = self.scheduler.schedule()
        if chunks:
            try:
                tokens = self.runner.run(chunks)
            except Exception as error:
                # Whatever it was, only these sequences saw it: they end, the engine goes on.
                log.exception("a forward pass of %d sequences failed", len(chunks))
                fault = RequestError(f"the language model failed: {error}", ErrorCode.INTERNAL)
                for chunk in chunks:
                    self.scheduler.remove(chunk.sequence)
                    chunk.sequence.request.sink(Output(error=fault))
            else:
                self._advance(chunks, tokens)
            self.stats.steps += 1
        self._count_blocks()
        if not self.scheduler.running:
            self.scheduler.check_integrity()

    def _advance(self, chunks: list[Chunk], tokens: list[tuple[Sequence, int]]) -> None:
        """Note what a pass has computed, and hand out the tokens that it gave."""
        for chunk in chunks:
            self.scheduler.complete(chunk)
        for sequence, token in tokens:
            sequence.append(token)
            self._count_token(sequence)
            if sequence.finish_reason is not None:
                self.scheduler.remove(sequence)
            sequence.emit()

    def _count_token(self, sequence: Sequence) -> None:
        self.stats.generated_tokens += 1
        if len(sequence.tokens) == sequence.prompt_length + 1:
            self.stats.prompt_tokens += sequence.prompt_length
            self.stats.cached_tokens += sequence.cached_tokens

    def _count_blocks(self) -> None:
        pool, stats = self.scheduler.pool, self.stats
        stats.running, stats.waiting = len(self.scheduler.running), len(self.scheduler.waiting)
        stats.blocks_cached = pool.idle
        stats.blocks_held = pool.size - pool.available
