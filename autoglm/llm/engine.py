"""The engine: continuous batching in one thread that takes requests, runs forward passes and emits outputs.

The thread owns the scheduler, the block pool, the KV cache and the model; other threads process the prompts they submit
and put sequences into its inbox. Step N+1 is launched before step N is read back, so that the device never waits for
the host; a finished sequence may therefore sample one extra token, which is discarded.
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
from autoglm.config import Config, EngineConfig, SparseAttentionConfig
from autoglm.errors import ErrorCode, RequestError
from autoglm.llm.block_pool import BlockPool
from autoglm.llm.input_processor import InputProcessor
from autoglm.llm.loader import Calibrate, LoadConfig
from autoglm.llm.model_runner import LaunchedPass
from autoglm.llm.scheduler import Chunk, Scheduler
from autoglm.llm.sequence import FinishReason, Output, Request, Sequence, TokenLogprob
from autoglm.llm.structured_output.grammar import token_masks
from autoglm.llm.worker import Worker
from autoglm.memory import MemoryManager
from autoglm.preprocess.sampling_params import SamplingParams
from autoglm.preprocess.tokenizer import Vocabulary

log = logging.getLogger(__name__)

INTEGRITY_CHECK_S = 60.0  # minimum time between two checks
MIN_FORCED_TOKENS = 3  # a pass that computes them at once takes as long as about two decode steps
DEADLINE_POLL_S = 0.05  # between checks of waiting requests' deadlines while nothing runs
WARM_UP_LENGTHS = (1, 16, 100, 2000)  # prompts that cover all kernel variants


@dataclass
class EngineStats:
    """Totals since the start, and the current state; written by the engine's thread only."""

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
    """Serves one language model. `start` starts its thread, `close` stops it."""

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
        """Loads the model and allocates the KV cache.

        Args:
            dtype: of activations, and of weights that are not quantised.
            load_config: how the weights are quantised and cached; None does neither.
            calibrate: see `load_language_model`.
            memory: of this process; None has the default limits.
            sparse_attention: the default for requests; None is dense.
        """
        self.checkpoint = checkpoint
        self.config = config
        self.sparse_attention = sparse_attention or SparseAttentionConfig()
        self.vocabulary = Vocabulary(checkpoint.path)
        self.worker = worker = Worker(
            checkpoint,
            config,
            device,
            dtype,
            sparse_attention=self.sparse_attention,
            load_config=load_config,
            calibrate=calibrate,
            memory=memory,
        )
        self.memory, self.model_runner, self.max_context = worker.memory, worker.model_runner, worker.max_context
        self.input_processor = InputProcessor(
            checkpoint, config, self.sparse_attention, self.vocabulary, worker.model, max_context=self.max_context
        )
        num_blocks = worker.kv_cache.num_blocks
        self.scheduler = Scheduler(config, BlockPool(num_blocks))
        self.stats = EngineStats(blocks_total=num_blocks)
        self._inbox: queue.SimpleQueue[Sequence | tuple[str, FinishReason] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._closing = False
        self._in_flight: LaunchedPass | None = None
        self._checked_time = -INTEGRITY_CHECK_S

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
        return cls(
            checkpoint,
            config.engine,
            device,
            dtype,
            memory=MemoryManager(config.memory, device),  # before anything else uses the device
            load_config=LoadConfig.from_config(config, device),
            calibrate=calibrate,
            sparse_attention=config.sparse_attention,
        )

    def start(self) -> None:
        """Start the thread; on a GPU after capturing CUDA graphs and a warm-up, so that no request pays for them."""
        threading.Thread(target=self.input_processor.grammars.prepare, name="grammars", daemon=True).start()
        if self.model_runner.device.type == "cuda":
            self.worker.capture()
            with self.memory.tag("warm-up"):
                self.warm_up()
        log.info("memory by stage\n%s\n%s", self.memory.table(), json.dumps(self.memory.report()))
        # Everything allocated so far is permanent; freeze it out of GC.
        gc.collect()
        gc.freeze()
        self._thread.start()

    def warm_up(self) -> None:
        """Answer prompts of several lengths, alone and concurrently with a decoding sequence.

        Raises:
            RuntimeError: one of them failed.
        """
        outputs: list[Output] = []
        model, device = self.model_runner.model, self.model_runner.device
        model.kernels.divprune(embeddings=model.embed(torch.zeros(1, dtype=torch.int64, device=device)), count=1)
        stats = vars(self.stats).copy()
        max_length = self.max_context - 4
        for number, length in enumerate(WARM_UP_LENGTHS):
            for token in (2 * number, 2 * number + 1):  # distinct prompts, which the prefix cache does not have
                request = Request(
                    request_id="warm-up",
                    token_ids=[token] * min(length, max_length),
                    sampling_params=SamplingParams(max_tokens=4, ignore_eos=True, logprobs=None if number else 0),
                    sink=outputs.append,
                )
                self._accept(self.input_processor.process(request))
                self.step()
            while self.busy:
                self.step()
        errors = [output.error for output in outputs if output.error is not None]
        if errors:
            raise RuntimeError(f"the engine's warm-up failed: {errors[0]}")
        vars(self.stats).update(stats)

    @property
    def busy(self) -> bool:
        return self._in_flight is not None or any(True for _ in self.scheduler)

    def close(self) -> None:
        """Cancel all requests and stop the thread."""
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, request: Request) -> None:
        """Process a request's prompt in the calling thread and queue it; its sink receives all outputs and errors.

        The embeddings must be complete. Choosing visual tokens (`prune`) waits for the device, but not for its passes.
        """
        try:
            sequence = self.input_processor.process(request)
        except Exception as error:
            self._reject(request, error)
        else:
            self._inbox.put(sequence)

    def cancel(self, request_id: str, reason: Literal["cancelled", "timeout"] = "cancelled") -> None:
        """Finish the requests with this id, waiting or running; unknown ids are ignored."""
        self._inbox.put((request_id, reason))

    def _run(self) -> None:
        try:
            while not self._closing:
                self.receive()
                self.expire()
                self.step()
            for sequence in list(self.scheduler):
                self._finish(sequence, "cancelled")
        except Exception as error:
            log.exception("the engine has stopped")
            kind = type(error).__name__
            self._fail_until_closed(RequestError(f"the engine has stopped ({kind}); see the log", ErrorCode.INTERNAL))

    def _fail_until_closed(self, error: RequestError) -> None:
        """After an error of the engine itself no state can be trusted: fail every present and future request."""
        for sequence in self.scheduler:
            sequence.request.sink(Output(error=error))
        while not self._closing:
            item = self._inbox.get()
            if isinstance(item, Sequence):
                item.request.sink(Output(error=error))
            self._closing = item is None

    def receive(self) -> None:
        """Accept submitted requests and cancellations; wait for one if there is nothing to compute."""
        block = not self.scheduler.running and self._in_flight is None
        while True:
            try:
                item = self._inbox.get(block, DEADLINE_POLL_S if self.scheduler.waiting else None)
            except queue.Empty:
                return
            block = False
            if item is None:
                self._closing = True
            elif isinstance(item, Sequence):
                self._accept(item)
            else:
                request_id, reason = item
                for sequence in [s for s in self.scheduler if s.request.request_id == request_id]:
                    self._finish(sequence, reason)

    def _accept(self, sequence: Sequence) -> None:
        try:
            self.scheduler.add(sequence)
        except Exception as error:
            self._reject(sequence.request, error)
        else:
            self.stats.requests += 1
            if sequence.finish_reason is not None:  # the grammar allowed a single answer
                self._emit(sequence)

    @staticmethod
    def _reject(request: Request, error: Exception) -> None:
        """Report the failure to this request only."""
        if not isinstance(error, RequestError):
            log.error("a request could not be processed", exc_info=error)
            error = RequestError(f"the request failed ({type(error).__name__}); see the log", ErrorCode.INTERNAL)
        request.sink(Output(error=error))

    def expire(self) -> None:
        """Finish the requests whose deadline has passed."""
        now = time.monotonic()
        for sequence in [s for s in self.scheduler if s.deadline is not None and s.deadline <= now]:
            self._finish(sequence, "timeout")

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self.scheduler.remove(sequence)
        sequence.finish_reason = reason
        sequence.emit()

    def step(self) -> None:
        """Launch the next pass, then collect the previous one."""
        chunks = self.scheduler.schedule()
        previous, self._in_flight = self._in_flight, self._launch(chunks) if chunks else None
        if previous is not None:
            self._collect(previous)
        if self._in_flight is not None:
            self._sample_deferred(self._in_flight)
        self._update_stats()
        if not self.busy and time.monotonic() - self._checked_time > INTEGRITY_CHECK_S:
            self.scheduler.check_integrity()
            self._checked_time = time.monotonic()

    def _launch(self, chunks: list[Chunk]) -> LaunchedPass | None:
        """Launch a pass. An error fails these sequences only."""
        self.stats.steps += 1
        try:
            launched = self.model_runner.launch(chunks)
        except torch.OutOfMemoryError as error:
            log.warning("out of memory in a forward pass of %d sequences: %s", len(chunks), error)
            # Prompts dominate the pass's memory. Nothing was sampled: the decoding sequences are scheduled again.
            self._fail(
                [chunk.sequence for chunk in chunks if not chunk.decodes] or [chunk.sequence for chunk in chunks],
                RequestError("the GPU has too little free memory for this request", ErrorCode.UNAVAILABLE),
            )
        except Exception as error:
            self._fail_pass([chunk.sequence for chunk in chunks], error)
        else:
            self.scheduler.mark_launched(chunks)
            return launched
        torch.cuda.empty_cache()  # not earlier: the exception held the pass's tensors
        return None

    def _collect(self, launched: LaunchedPass) -> None:
        """Read a pass back, update the scheduler and emit the tokens."""
        try:
            tokens = self.model_runner.collect(launched)
        except Exception as error:
            self._fail_pass([chunk.sequence for chunk in launched.chunks], error)
            return
        for chunk in launched.chunks:
            self.scheduler.mark_completed(chunk)
        for sequence, token, logprob in tokens:
            if not sequence.removed:
                self._advance(sequence, token, logprob)

    def _advance(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> None:
        """Append a sampled token, and the tokens that the grammar forces after it."""
        known = len(sequence.token_ids)
        try:
            sequence.append(token, logprob)
            forced = sequence.append_forced(MIN_FORCED_TOKENS)
            if forced and sequence.slot is not None:
                self.scheduler.discard_sample(sequence, [] if self._in_flight is None else self._in_flight.chunks)
                self.model_runner.slots.count_tokens(sequence, forced)
        except Exception as error:
            self._fail_pass([sequence], error)
        else:
            self._emit(sequence, len(sequence.token_ids) - known)

    def _emit(self, sequence: Sequence, num_new_tokens: int = 0) -> None:
        if sequence.first_token_time is None:
            self.stats.prompt_tokens += sequence.prompt_length
            self.stats.cached_tokens += sequence.num_cached_tokens
            num_new_tokens = len(sequence.token_ids) - sequence.prompt_length
        self.stats.generated_tokens += num_new_tokens
        if sequence.finish_reason is not None:
            self.scheduler.remove(sequence)
        sequence.emit()

    def _sample_deferred(self, launched: LaunchedPass) -> None:
        """Sample the rows deferred by this step; their grammar state is now known."""
        chunks = [c for c in launched.chunks if c.samples and c.sequence.deferred and not c.sequence.removed]
        if not chunks:
            return
        try:
            masks = token_masks([chunk.sequence.matcher for chunk in chunks], self.checkpoint.text.vocab_size)
            self.model_runner.sample_deferred(launched, chunks, masks)
        except Exception as error:
            self._fail_pass([chunk.sequence for chunk in chunks], error)

    def _fail_pass(self, sequences: list[Sequence], error: Exception) -> None:
        if isinstance(error, torch.AcceleratorError):
            raise error  # the process has lost its GPU
        log.error("the language model failed for %d sequences", len(sequences), exc_info=error)
        message = f"the language model failed ({type(error).__name__}); see the log"
        self._fail(sequences, RequestError(message, ErrorCode.INTERNAL))

    def _fail(self, sequences: list[Sequence], error: RequestError) -> None:
        for sequence in [sequence for sequence in sequences if not sequence.removed]:
            self.scheduler.remove(sequence)
            sequence.request.sink(Output(error=error))

    def _update_stats(self) -> None:
        pool, stats = self.scheduler.pool, self.stats
        stats.running, stats.waiting = len(self.scheduler.running), len(self.scheduler.waiting)
        stats.blocks_cached = pool.num_evictable
        stats.blocks_held = pool.num_blocks - pool.num_available
