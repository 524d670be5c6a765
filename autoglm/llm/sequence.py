"""Requests, their outputs, and the state of a request in the engine."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from autoglm.config import SparseAttentionConfig
from autoglm.errors import RequestError
from autoglm.llm.block_hash import MediaSpan, hash_block
from autoglm.llm.stop import StopStrings
from autoglm.preprocess.sampling_params import SamplingParams

if TYPE_CHECKING:
    import torch

    from autoglm.llm.structured_output.grammar import Matcher
    from autoglm.preprocess.tokenizer import Detokenizer

FinishReason = Literal["stop", "length", "cancelled", "timeout"]
Sink = Callable[["Output"], None]


@dataclass(frozen=True, kw_only=True)
class RequestUsage:
    """Tokens and milliseconds of a request. `audio_tokens` are those of clips given as embeddings: a transcript counts
    as text."""

    prompt_tokens: int
    image_tokens: int
    audio_tokens: int
    completion_tokens: int
    cached_tokens: int
    queue_ms: float
    preprocess_ms: float
    vision_ms: float
    audio_ms: float
    prefill_ms: float
    decode_ms: float


@dataclass(frozen=True)
class TokenLogprob:
    """The log probability of a sampled token, and of the likeliest ones in its place, in descending order.

    They are the model's own: before penalties, temperature, truncation and grammars.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(kw_only=True)
class Output:
    """The next part of an answer. The last one has a finish reason and the usage, or an error; the first one has the
    transcripts. `logprobs` has one item per token if they were requested."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    transcripts: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: RequestUsage | None = None
    error: RequestError | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass(frozen=True)
class Clip:
    """An audio clip in a prompt: `num_tokens` placeholders for its embeddings, or (0) one for its transcript."""

    media_hash: bytes
    num_tokens: int = 0
    transcript: str = ""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request to the engine.

    token_ids: the prompt, each image and clip expanded to its placeholders.
    sink: receives the outputs in order, from the engine's thread, and must not block; an error may also come
        from the thread that submits.
    image_grids, image_hashes: one per image, in order.
    image_embeddings: [image tokens, hidden_size], the images one after another.
    audio_embeddings: [audio tokens, hidden_size], likewise, of the clips that have `num_tokens`.
    """

    request_id: str
    token_ids: list[int]
    sampling_params: SamplingParams
    sink: Sink
    image_grids: list[tuple[int, int, int]] = field(default_factory=list)
    image_hashes: list[bytes] = field(default_factory=list)
    image_embeddings: torch.Tensor | None = None
    clips: list[Clip] = field(default_factory=list)
    audio_embeddings: torch.Tensor | None = None
    preprocess_ms: float = 0.0
    vision_ms: float = 0.0
    audio_ms: float = 0.0
    arrival_time: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Prompt:
    """A request's prompt as the language model takes it.

    positions: int32 [3, T]; next_position is that of the first token of the answer.
    media: images and clips in order; their embeddings [tokens, hidden_size] are one after another.
    """

    token_ids: list[int]
    positions: torch.Tensor
    next_position: int
    media: list[MediaSpan]
    embeddings: torch.Tensor | None


class Sequence:
    """The state of a request: its tokens, how many of them have keys and values, and the blocks of these.

    Passes are launched ahead of their results: `num_computed` counts the tokens of all launched passes, and
    `num_pending` the tokens sampled by them that are not known yet. At most one is pending when a pass is scheduled.
    """

    def __init__(
        self,
        request: Request,
        prompt: Prompt,
        *,
        max_tokens: int,
        detokenizer: Detokenizer,
        stop_token_ids: frozenset[int],
        sparse: SparseAttentionConfig | None = None,
        matcher: Matcher | None = None,
    ) -> None:
        """sparse: None is dense attention. matcher: the state of the answer's grammar."""
        params = request.sampling_params
        self.request = request
        self.prompt = prompt
        self.token_ids = list(prompt.token_ids)
        self.prompt_length = len(self.token_ids)
        self.max_length = self.prompt_length + max_tokens
        self.images = [span for span in prompt.media if span.visual]
        self.priority = params.priority
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self.deadline = None if params.timeout_us is None else request.arrival_time + params.timeout_us / 1e6
        self.sparse = sparse
        self.matcher = matcher
        self.deferred = matcher is not None or params.logprobs is not None  # see `deferred_sampling`

        self.slot: int | None = None  # while running
        self.slot_initialized = False  # a pass was launched since the sequence got its slot
        self.decodes = False  # the next token to compute is in the slot
        self.num_computed = 0
        self.num_pending = 0
        self.num_in_flight = 0  # launched passes that are not collected
        self.removed = False  # results of passes in flight are discarded
        self.blocks: list[int] = []
        self.num_cached_blocks = 0  # the first blocks, which are in the prefix cache
        self.finish_reason: FinishReason | None = None

        self.num_cached_tokens = 0
        self.scheduled_time: float | None = None
        self.first_token_time: float | None = None

        self._block_hashes: list[bytes] = []
        self._detokenizer = detokenizer
        self._stop_token_ids = stop_token_ids
        self._stop_strings = StopStrings(params.stop)
        self._stopped_by_string = False
        self._output = Output(transcripts=[clip.transcript for clip in request.clips if not clip.num_tokens])

    @property
    def length(self) -> int:
        """Tokens, including pending ones."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_remaining(self) -> int:
        """Tokens still to be computed (the final token at max_length is never fed back)."""
        return 0 if self.length == self.max_length else self.length - self.num_computed

    @property
    def cacheable_length(self) -> int:
        """Prefix length whose blocks may enter the prefix cache: `pages` makes the keys of an answer approximate."""
        return self.prompt_length if self.sparse is not None and self.sparse.mode == "pages" else self.max_length

    def block_hash(self, index: int, block_size: int) -> bytes:
        """The content hash of block `index`, whose tokens are all known."""
        while len(self._block_hashes) <= index:
            start = len(self._block_hashes) * block_size
            parent = self._block_hashes[-1] if self._block_hashes else b""
            token_ids = self.token_ids[start : start + block_size]
            self._block_hashes.append(hash_block(parent, token_ids, start, self.prompt.media))
        return self._block_hashes[index]

    def append(self, token_id: int, logprob: TokenLogprob | None = None) -> None:
        """Append a token to the answer; sets `finish_reason` if it ends the answer.

        Raises:
            RuntimeError: the grammar rejects the token.
        """
        self.token_ids.append(token_id)
        self._output.token_ids.append(token_id)
        if logprob is not None:
            self._output.logprobs.append(logprob)
        if self.matcher is not None:
            self.matcher.accept(token_id)  # stop tokens too: a failed grammar allows nothing else
        if token_id in self._stop_token_ids:
            self.finish_reason = "stop"
            return
        text, self._stopped_by_string = self._stop_strings.add(self._detokenizer.add(token_id))
        self._output.text += text
        if self._stopped_by_string or (self.matcher is not None and self.matcher.done):
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.max_length:
            self.finish_reason = "length"

    def append_forced(self, min_tokens: int) -> list[int]:
        """Append the tokens that the grammar forces, if there are at least `min_tokens`; returns them.

        Nothing is appended when log probabilities were requested: each token needs its own pass for them.
        """
        if self.matcher is None or self.request.sampling_params.logprobs is not None or self.finish_reason is not None:
            return []
        forced = self.matcher.forced()
        known = len(self.token_ids)
        for token_id in forced if len(forced) >= min_tokens else ():
            self.append(token_id)
            if self.finish_reason is not None:
                break
        return self.token_ids[known:]

    def emit(self) -> None:
        """Pass the pending output to the sink: after each token when streaming, otherwise at the end."""
        if self.first_token_time is None and self._output.token_ids:
            self.first_token_time = time.monotonic()
        if self.finish_reason is not None:
            if not self._stopped_by_string:
                text, _ = self._stop_strings.add(self._detokenizer.flush())
                self._output.text += text + self._stop_strings.flush()
            self._output.finish_reason = self.finish_reason
            self._output.usage = self._usage()
        elif not self.request.sampling_params.stream or not self._output.token_ids:
            return
        output, self._output = self._output, Output()
        self.request.sink(output)

    def _usage(self) -> RequestUsage:
        now = time.monotonic()
        scheduled = self.scheduled_time or now
        first = self.first_token_time or now
        return RequestUsage(
            prompt_tokens=self.prompt_length,
            image_tokens=sum(span.length for span in self.images),
            audio_tokens=sum(span.length for span in self.prompt.media if not span.visual),
            completion_tokens=len(self.token_ids) - self.prompt_length,
            cached_tokens=self.num_cached_tokens,
            queue_ms=(scheduled - self.request.arrival_time) * 1e3,
            preprocess_ms=self.request.preprocess_ms,
            vision_ms=self.request.vision_ms,
            audio_ms=self.request.audio_ms,
            prefill_ms=max(0.0, first - scheduled) * 1e3,
            decode_ms=max(0.0, now - first) * 1e3,
        )
