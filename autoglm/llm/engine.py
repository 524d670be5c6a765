"""Continuous batching: one thread that takes requests in, runs forward passes and hands answers out.

The thread owns everything below it (scheduler, pool, cache, model); other threads read the prompts that they submit,
and put into its inbox. A pass is launched before the one ahead of it is collected, so that the device does not wait for
the host; what a sequence is found to end with may thus be followed by one token too many, which is dropped.
"""

import gc
import json
import logging
import queue
import threading
import time
from dataclasses import dataclass
from typing import Literal

import torch

from autoglm.checkpoint import Checkpoint
from autoglm.config import Config, EngineConfig, MemoryConfig, SparseAttentionConfig
from autoglm.errors import ErrorCode, RequestError
from autoglm.llm.block_pool import BlockPool
from autoglm.llm.input_processor import Intake
from autoglm.llm.kv_cache import KVCache
from autoglm.llm.loader import Calibrate, LoadConfig, load_language_model
from autoglm.llm.model import LanguageModel
from autoglm.llm.model_runner import ModelRunner, Pass
from autoglm.llm.prefill import largest_pass
from autoglm.llm.scheduler import Chunk, Scheduler
from autoglm.llm.sequence import FinishReason, Output, Request, Sequence, TokenLogprob
from autoglm.llm.structured_output.grammar import token_masks
from autoglm.memory import MemoryManager
from autoglm.preprocess.sampling_params import SamplingParams
from autoglm.preprocess.tokenizer import Vocabulary

log = logging.getLogger(__name__)

GRAPHS = 2**30  # bytes that captured passes take
INTEGRITY_S = 60.0  # at least so long between two proofs that no block is lost
FORCED_AT_ONCE = 3  # tokens: the pass that computes them at once takes as long as about two that decode
LONGEST_WAIT = 0.05  # seconds between looks at the deadlines of waiting requests while nothing runs
WARM_UP_PROMPTS = (1, 16, 100, 2000)  # tokens: a prompt for each choice among kernels

STORED_AS = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float8": torch.float8_e4m3fn, "int8": torch.int8}


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
        self,
        checkpoint: Checkpoint,
        config: EngineConfig,
        device: torch.device,
        dtype: torch.dtype,
        *,
        load_config: LoadConfig | None = None,
        calibrate: Calibrate | None = None,
        memory: MemoryManager | None = None,
        sparse_attention: SparseAttentionConfig | None = None,
    ) -> None:
        """Loads the model and takes the memory that the configuration allows.

        Args:
            dtype: of activations, and of weights that are not quantised.
            load_config: how the weights are quantised and cached; None does neither.
            calibrate: see `load_language_model`.
            memory: of this process; None bounds it as the configuration's defaults do.
            sparse_attention: of requests that do not say; None is dense.
        """
        text = checkpoint.text
        self.checkpoint = checkpoint
        self.config = config
        self.sparse_attention = sparse_attention or SparseAttentionConfig()
        self.vocabulary = Vocabulary(checkpoint.path)
        self.memory = memory or MemoryManager(MemoryConfig(), device)
        with self.memory.tag("weights"):
            model = load_language_model(checkpoint, device, dtype, load_config, calibrate)
        cache = self._make_cache(model, dtype)
        blocks = cache.keys.shape[1] // config.block_size
        self.max_context = min(config.max_context, text.max_position_embeddings, blocks * config.block_size)
        paging = self.sparse_attention if self.sparse_attention.mode == "pages" else None
        self.runner = ModelRunner(model, cache, config.max_batch_size, self.max_context, paging)
        self.intake = Intake(
            checkpoint,
            self.vocabulary,
            model,
            device,
            self.max_context,
            config.default_max_tokens,
            self.sparse_attention,
        )
        self.scheduler = Scheduler(
            BlockPool(blocks),
            config.block_size,
            config.max_batch_size,
            config.max_tokens_per_step,
            config.max_tokens_per_mixed_step,
            config.max_queue_size,
            config.prefix_cache,
        )
        self.stats = EngineStats(blocks_total=blocks)
        self._inbox: queue.SimpleQueue[Sequence | tuple[str, FinishReason] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._closing = False
        # bitsandbytes synchronises with the device, which no CUDA graph can capture.
        self._captures = load_config is None or not load_config.uses_bitsandbytes
        self._in_flight: Pass | None = None
        self._proved_at = -INTEGRITY_S

    @classmethod
    def from_config(
        cls,
        checkpoint: Checkpoint,
        config: Config,
        device: torch.device,
        dtype: torch.dtype,
        calibrate: Calibrate | None = None,
    ) -> "Engine":
        """An engine with the whole configuration. Call it before the process uses the device.

        Args:
            calibrate: see `load_language_model`.
        """
        memory = MemoryManager(config.memory, device)
        load_config = LoadConfig.from_config(config, device)
        return cls(
            checkpoint,
            config.engine,
            device,
            dtype,
            load_config=load_config,
            calibrate=calibrate,
            memory=memory,
            sparse_attention=config.sparse_attention,
        )

    def start(self) -> None:
        """Begin to work; on a GPU after a warm-up, so that no request pays for what happens once."""
        threading.Thread(target=self.intake.grammars.prepare, name="grammars", daemon=True).start()
        if self.runner.device.type == "cuda":
            if self._captures:
                with self.memory.tag("graphs"):
                    self.runner.capture(self.scheduler.max_tokens_per_step, self.scheduler.max_tokens_per_mixed_step)
            with self.memory.tag("warm-up"):
                self.warm_up()
        log.info("memory by stage\n%s\n%s", self.memory.table(), json.dumps(self.memory.report()))
        # What lives by now lives on: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        self._thread.start()

    def warm_up(self) -> None:
        """Answer prompts of several lengths, alone and while another is being answered.

        Raises:
            RuntimeError: one of them failed.
        """
        outputs: list[Output] = []
        model = self.runner.model
        model.kernels.most_diverse(model.embed(torch.zeros(1, dtype=torch.int64, device=self.runner.device)), 1)
        fresh = vars(self.stats).copy()
        longest = self.max_context - 4
        for number, length in enumerate(WARM_UP_PROMPTS):
            for token in (2 * number, 2 * number + 1):  # not to be found in the prefix cache
                prompt = [token] * min(length, longest)
                params = SamplingParams(max_tokens=4, ignore_eos=True, logprobs=None if number else 0)
                self._accept(self.intake.sequence(Request("warm-up", prompt, params, outputs.append)))
                self.step()
            while self.busy:
                self.step()
        errors = [output.error for output in outputs if output.error is not None]
        if errors:
            raise RuntimeError(f"the engine's warm-up failed: {errors[0]}")
        vars(self.stats).update(fresh)

    @property
    def busy(self) -> bool:
        return self._in_flight is not None or any(True for _ in self.scheduler)

    def close(self) -> None:
        """End every request as cancelled, and the thread."""
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, request: Request) -> None:
        """Read a request's prompt and queue it; everything about it, refusals included, goes to its sink.

        A prompt that cannot be read is refused in the caller's thread. Visual tokens are chosen there, too (`prune`),
        which waits for the device, but for no pass. The embeddings must be there already.
        """
        try:
            sequence = self.intake.sequence(request)
        except Exception as error:
            self._refuse(request, error)
        else:
            self._inbox.put(sequence)

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
            if isinstance(item, Sequence):
                item.request.sink(Output(error=fault))
            self._closing = item is None

    def _take_in(self) -> None:
        """Empty the inbox; wait for it when nothing else is to do."""
        block = not self.scheduler.running and self._in_flight is None
        while True:
            try:
                item = self._inbox.get(block, LONGEST_WAIT if self.scheduler.waiting else None)
            except queue.Empty:
                return
            block = False
            if item is None:
                self._closing = True
            elif isinstance(item, Sequence):
                self._accept(item)
            else:
                for sequence in [s for s in self.scheduler if s.request.request_id == item[0]]:
                    self._finish(sequence, item[1])

    def _accept(self, sequence: Sequence) -> None:
        try:
            self.scheduler.add(sequence)
        except Exception as error:
            self._refuse(sequence.request, error)
        else:
            self.stats.requests += 1
            if sequence.finish_reason is not None:  # its grammar leaves nothing to choose
                self._hand_out(sequence)

    @staticmethod
    def _refuse(request: Request, error: Exception) -> None:
        """Whatever a request brought, it is its own fault."""
        if not isinstance(error, RequestError):
            log.error("a request could not be taken in", exc_info=error)
            error = RequestError(f"the request failed: {error}", ErrorCode.INTERNAL)
        request.sink(Output(error=error))

    def _expire(self) -> None:
        now = time.monotonic()
        for sequence in [s for s in self.scheduler if s.deadline is not None and s.deadline <= now]:
            self._finish(sequence, "timeout")

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self.scheduler.remove(sequence)
        sequence.finish_reason = reason
        sequence.emit()

    def step(self) -> None:
        """Launch what the scheduler chooses, then see to what the pass before has brought."""
        chunks = self.scheduler.schedule()
        ahead, self._in_flight = self._in_flight, self._launch(chunks) if chunks else None
        if ahead is not None:
            self._collect(ahead)
        if self._in_flight is not None:
            self._choose_late(self._in_flight)
        self._count_blocks()
        if not self.busy and time.monotonic() - self._proved_at > INTEGRITY_S:
            self.scheduler.check_integrity()
            self._proved_at = time.monotonic()

    def _launch(self, chunks: list[Chunk]) -> Pass | None:
        """Whatever goes wrong, only these sequences saw it: they end, the engine goes on."""
        self.stats.steps += 1
        try:
            launched = self.runner.launch(chunks)
        except torch.OutOfMemoryError as error:
            log.warning("a forward pass of %d sequences found too little memory: %s", len(chunks), error)
            # It is the prompts that take memory. Nothing has been sampled: the others' turn comes again.
            self._fail(
                [chunk.sequence for chunk in chunks if not chunk.decodes] or [chunk.sequence for chunk in chunks],
                RequestError(f"the GPU has not enough memory for this request: {error}", ErrorCode.UNAVAILABLE),
            )
        except Exception as error:
            self._fail_all([chunk.sequence for chunk in chunks], error)
        else:
            self.scheduler.launched(chunks)
            return launched
        torch.cuda.empty_cache()  # only here: the exception has held the pass's tensors
        return None

    def _collect(self, launched: Pass) -> None:
        """Note what a pass has computed, and hand out the tokens that it gave."""
        try:
            tokens = self.runner.collect(launched)
        except Exception as error:
            self._fail_all([chunk.sequence for chunk in launched.chunks], error)
            return
        for chunk in launched.chunks:
            self.scheduler.complete(chunk)
        for sequence, token, logprob in tokens:
            if not sequence.gone:
                self._advance(sequence, token, logprob)

    def _advance(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> None:
        """Hand out a token that has come, and those that the grammar forces behind it."""
        known = len(sequence.tokens)
        try:
            sequence.append(token, logprob)
            forced = sequence.take_forced(FORCED_AT_ONCE)
            if forced and sequence.seat is not None:
                self.scheduler.withdraw(sequence, [] if self._in_flight is None else self._in_flight.chunks)
                self.runner.seats.count(sequence, forced)
        except Exception as error:
            self._fail_all([sequence], error)
        else:
            self._hand_out(sequence, len(sequence.tokens) - known)

    def _hand_out(self, sequence: Sequence, fresh: int = 0) -> None:
        """`fresh`: tokens that the pass has brought."""
        if sequence.first_token_at is None:
            self.stats.prompt_tokens += sequence.prompt_length
            self.stats.cached_tokens += sequence.cached_tokens
            fresh = len(sequence.tokens) - sequence.prompt_length
        self.stats.generated_tokens += fresh
        if sequence.finish_reason is not None:
            self.scheduler.remove(sequence)
        sequence.emit()

    def _choose_late(self, launched: Pass) -> None:
        """Launch what a pass has left behind, now that the tokens ahead of it are known."""
        chunks = [c for c in launched.chunks if c.samples and c.sequence.deferred and not c.sequence.gone]
        if not chunks:
            return
        try:
            masks = token_masks([chunk.sequence.matcher for chunk in chunks], self.checkpoint.text.vocab_size)
            self.runner.choose_late(launched, chunks, masks)
        except Exception as error:
            self._fail_all([chunk.sequence for chunk in chunks], error)

    def _fail_all(self, sequences: list[Sequence], error: Exception) -> None:
        if isinstance(error, torch.AcceleratorError):
            raise error  # this process can use its GPU no more
        log.error("the language model failed for %d sequences", len(sequences), exc_info=error)
        self._fail(sequences, RequestError(f"the language model failed: {error}", ErrorCode.INTERNAL))

    def _fail(self, sequences: list[Sequence], fault: RequestError) -> None:
        for sequence in [sequence for sequence in sequences if not sequence.gone]:
            self.scheduler.remove(sequence)
            sequence.request.sink(Output(error=fault))

    def _count_blocks(self) -> None:
        pool, stats = self.scheduler.pool, self.stats
        stats.running, stats.waiting = len(self.scheduler.running), len(self.scheduler.waiting)
        stats.blocks_cached = pool.idle
        stats.blocks_held = pool.size - pool.available

    def _make_cache(self, model: LanguageModel, dtype: torch.dtype) -> KVCache:
        """As large and in such numbers as configured."""
        config, text = self.config, self.checkpoint.text
        stored_as = STORED_AS.get(config.kv_cache_dtype, dtype)
        seats = (config.max_batch_size + 1) * text.vocab_size * (4 + 4)  # marks and logits
        size = self.memory.kv_cache_bytes(
            config.kv_cache_mb,
            lambda: largest_pass(model, config.max_tokens_per_step, config.max_batch_size),
            reserve=seats + GRAPHS,
        )
        summarized = self.sparse_attention.mode == "pages"
        block = KVCache.bytes_per_token(text, stored_as) * config.block_size
        block += KVCache.summary_bytes(text, dtype) if summarized else 0
        device = model.rotary.table.device
        with self.memory.tag("KV cache"):
            cache = KVCache(text, size // block, config.block_size, device, dtype, stored_as, summarized)
        if model.kv_scales is not None and stored_as == torch.float8_e4m3fn:
            cache.set_scales(*model.kv_scales)
        return cache
