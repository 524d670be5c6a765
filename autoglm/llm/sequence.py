"""One request on its way through the engine."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from autoglm.errors import RequestError
from autoglm.llm.block_hash import MediaSpan, prefix_key
from autoglm.llm.sparse.policy import WINDOW, Sparsity
from autoglm.llm.stop import StopStrings
from autoglm.preprocess.sampling_params import SamplingParams

if TYPE_CHECKING:
    import torch

    from autoglm.llm.structured_output.grammar import Matcher
    from autoglm.preprocess.tokenizer import Detokenizer

FinishReason = Literal["stop", "length", "cancelled", "timeout"]
Sink = Callable[["Output"], None]


@dataclass(frozen=True)
class Usage:
    """What a request took; milliseconds by stage. `audio_tokens` are those of bridged clips: a transcript is text."""

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
    """How probable a token was to the model, before penalties, temperature, cuts and any grammar: its natural
    logarithm, and those of the most probable tokens, highest first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass
class Output:
    """The next piece of an answer. The last one has a finish reason and the usage, or an error; the first one has the
    transcripts of the request's clips. `logprobs` has one item per token if the request asks for them, else none."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    transcripts: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: RequestError | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass(frozen=True)
class Clip:
    """A sound in a prompt: either `tokens` placeholders, which its embeddings replace, or one, which its transcript
    does. `digest` names the sound and what embedded it."""

    digest: bytes
    tokens: int = 0
    transcript: str = ""


@dataclass(frozen=True)
class Request:
    """What the engine is asked for.

    `token_ids` has every image and clip expanded to its placeholders; `grids` and `digests` are one per image, in
    order; `embeddings` [image tokens, hidden] holds the images' rows one after another, and `audio_embeddings` those
    of the bridged `clips`. `sink` is called by the engine's thread, in order, and must not block; with a
    refusal also by the thread that submits.
    """

    request_id: str
    token_ids: list[int]
    sampling: SamplingParams
    sink: Sink
    grids: list[tuple[int, int, int]] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    embeddings: torch.Tensor | None = None
    preprocess_ms: float = 0.0
    vision_ms: float = 0.0
    clips: list[Clip] = field(default_factory=list)
    audio_embeddings: torch.Tensor | None = None
    audio_ms: float = 0.0
    arrival: float = field(default_factory=time.monotonic)


class Sequence:
    """A request's state: its tokens, how many of them have keys and values, and the blocks that hold these.

    Passes run ahead of what is known: `computed` counts what the passes launched so far compute, and `pending` the
    tokens that they sample and that have not come back. At most one is pending when a pass is chosen.

    Where the sequence's keys are thinned out (`snap`), `dropped` counts those that `blocks` have no more: from there on
    a token's place in the cache is its index less these. Its position stays what it was.
    """

    def __init__(
        self,
        request: Request,
        positions: torch.Tensor,
        next_position: int,
        media: list[MediaSpan],
        detokenizer: Detokenizer,
        stop_ids: frozenset[int],
        max_tokens: int,
        sparsity: Sparsity | None = None,
        matcher: Matcher | None = None,
    ) -> None:
        """`media` are all, in the order of their embeddings; `sparsity` is None for what has no images, or sees all of
        them; `matcher` follows the answer through its grammar, if it has one."""
        self.request = request
        self.tokens = list(request.token_ids)
        self.prompt_length = len(self.tokens)
        self.positions = positions  # int32 [3, prompt_length]
        self.next_position = next_position
        self.media = media
        self.images = [span for span in media if span.visual]
        self.sparsity = sparsity
        self.matcher = matcher
        self.deferred = matcher is not None or request.sampling.logprobs is not None  # chosen late, see `late`
        self.visual = sum(span.length for span in self.images)
        self.max_length = self.prompt_length + max_tokens
        self.computed = 0
        self.blocks: list[int] = []
        self.thin_blocks: list[int] = []  # where the pass that is being launched puts the keys that stay
        self.thinned = False
        self.dropped = 0
        self.attention: torch.Tensor | None = None  # fp32 [layers, kv_heads, visual], what the window gave so far
        self.keys: list[bytes] = []
        self.published = 0
        self.cached_tokens = 0
        self.seat: int | None = None  # while running
        self.entered = False  # a pass has been launched since it got its seat
        self.decodes = False  # its next token is in its seat
        self.pending = 0
        self.in_flight = 0  # launched passes that have not come back
        self.gone = False  # whatever a pass brings is dropped
        seed = request.sampling.seed
        self.seed = secrets.randbits(63) if seed is None else seed
        self.finish_reason: FinishReason | None = None
        self.scheduled_at: float | None = None
        self.first_token_at: float | None = None
        timeout = request.sampling.timeout_us
        self.deadline = None if timeout is None else request.arrival + timeout / 1e6
        self._detokenizer = detokenizer
        self._stop_ids = stop_ids
        self._stops = StopStrings(request.sampling.stop)
        self._cut = False  # at a stop string
        self._piece = Output(transcripts=[clip.transcript for clip in request.clips if not clip.tokens])

    @property
    def length(self) -> int:
        """Tokens, pending ones included."""
        return len(self.tokens) + self.pending

    @property
    def remaining(self) -> int:
        """Tokens that a pass is still to compute; the last one of the longest answer never needs to be."""
        return 0 if self.length == self.max_length else self.length - self.computed

    @property
    def window(self) -> int:
        """Where the text begins that chooses among visual keys under `snap`."""
        behind = max((span.end for span in self.images), default=0)
        return max(behind, self.prompt_length - WINDOW)

    @property
    def to_thin(self) -> bool:
        """Whether keys of the prompt are still to be left behind. Needs text behind the last image, and tokens of an
        answer that will look at what is left."""
        snaps = self.sparsity is not None and self.sparsity.mode == "snap"
        useful = self.window < self.prompt_length < self.max_length - 1
        return snaps and not self.thinned and useful

    @property
    def superfluous(self) -> int:
        """Visual keys that `snap` leaves behind."""
        return 0 if self.sparsity is None else self.visual - self.sparsity.kept(self.visual)

    @property
    def reusable(self) -> int:
        """Tokens at the start that may be found in the prefix cache. The last is always computed: its logits are
        needed; so is the window of `snap`."""
        return self.window if self.to_thin else len(self.tokens) - 1

    @property
    def nameable(self) -> int:
        """Tokens at the start whose keys are what their names say, see `sparsity`."""
        limited = self.sparsity is not None and self.sparsity.mode in ("pages", "snap")
        return self.prompt_length if limited else self.max_length

    def key(self, index: int, block_size: int) -> bytes:
        """The name of the content of block `index`, whose tokens are all known."""
        while len(self.keys) <= index:
            start = len(self.keys) * block_size
            parent = self.keys[-1] if self.keys else b""
            self.keys.append(prefix_key(parent, self.tokens[start : start + block_size], start, self.media))
        return self.keys[index]

    def append(self, token_id: int, logprob: TokenLogprob | None = None) -> None:
        """Take the answer's next token; sets `finish_reason` where it ends the answer.

        Raises:
            RuntimeError: the grammar refuses the token.
        """
        self.tokens.append(token_id)
        self._piece.token_ids.append(token_id)
        if logprob is not None:
            self._piece.logprobs.append(logprob)
        if self.matcher is not None:
            self.matcher.accept(token_id)  # ends of text, too: they are all that a grammar that has failed allows
        if token_id in self._stop_ids:
            self.finish_reason = "stop"
            return
        shown, self._cut = self._stops.add(self._detokenizer.add(token_id))
        self._piece.text += shown
        if self._cut or (self.matcher is not None and self.matcher.done):
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_length:
            self.finish_reason = "length"

    def take_forced(self, least: int) -> list[int]:
        """Take the tokens that the grammar forces, if they are at least so many; returns them.

        None where log probabilities are wanted: those come from a pass of each token's own.
        """
        if self.matcher is None or self.request.sampling.logprobs is not None or self.finish_reason is not None:
            return []
        forced = self.matcher.forced()
        known = len(self.tokens)
        for token_id in forced if len(forced) >= least else ():
            self.append(token_id)
            if self.finish_reason is not None:
                break
        return self.tokens[known:]

    def emit(self) -> None:
        """Hand the piece that is due to the sink: each token's when streaming, else the whole at the end."""
        if self.first_token_at is None and self._piece.token_ids:
            self.first_token_at = time.monotonic()
        if self.finish_reason is not None:
            if not self._cut:
                shown, _ = self._stops.add(self._detokenizer.flush())
                self._piece.text += shown + self._stops.flush()
            self._piece.finish_reason = self.finish_reason
            self._piece.usage = self._usage()
        elif not self.request.sampling.stream or not self._piece.token_ids:
            return
        piece, self._piece = self._piece, Output()
        self.request.sink(piece)

    def _usage(self) -> Usage:
        now = time.monotonic()
        scheduled = self.scheduled_at or now
        first = self.first_token_at or now
        return Usage(
            prompt_tokens=self.prompt_length,
            image_tokens=self.visual,
            audio_tokens=sum(span.length for span in self.media if not span.visual),
            completion_tokens=len(self.tokens) - self.prompt_length,
            cached_tokens=self.cached_tokens,
            queue_ms=(scheduled - self.request.arrival) * 1e3,
            preprocess_ms=self.request.preprocess_ms,
            vision_ms=self.request.vision_ms,
            audio_ms=self.request.audio_ms,
            prefill_ms=max(0.0, first - scheduled) * 1e3,
            decode_ms=max(0.0, now - first) * 1e3,
        )
