"""Pieces and results of answers."""

import json
import time
from dataclasses import dataclass, field, fields

from autoglm_client.actions import Action
from autoglm_client.errors import ActionError, ServerError
from autoglm_client.logprobs import TokenLogprob, read_logprobs
from autoglm_client.parser import ParsedAnswer, parse
from autoglm_client.thought import find_action


@dataclass(frozen=True)
class Piece:
    """A part of a streamed answer: text, its token ids, and their log probabilities if requested."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of one request, and milliseconds by stage, measured by the server."""

    prompt_tokens: int = 0
    image_tokens: int = 0
    audio_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    queue_ms: float = 0.0
    preprocess_ms: float = 0.0
    vision_ms: float = 0.0
    audio_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0

    @classmethod
    def from_json(cls, text: str) -> "Usage":
        """Decode USAGE; keys of newer servers are ignored. Raises ServerError."""
        try:
            values = json.loads(text)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise ServerError(f"USAGE must be a JSON object (got {text[:80]!r})")
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


@dataclass(frozen=True)
class Result:
    """A complete answer. `finish_reason` is "stop" or "length", the seconds are measured by the client, `transcripts`
    has one item for each transcribed clip, `logprobs` one for each token if requested."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    usage: Usage
    request_id: str
    first_piece_seconds: float
    total_seconds: float
    transcripts: tuple[str, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def thought(self) -> str:
        """The text before the action, without tags."""
        return find_action(self.text)[0]

    @property
    def action(self) -> Action | None:
        """The action, or None if the text contains no valid one; `action_error` is the reason."""
        answer = self._parsed()
        return answer.action if isinstance(answer, ParsedAnswer) else None

    @property
    def action_error(self) -> ActionError | None:
        """The error in the text, None if it contains a valid action."""
        answer = self._parsed()
        return answer if isinstance(answer, ActionError) else None

    def _parsed(self) -> ParsedAnswer | ActionError:
        try:
            return parse(self.text)
        except ActionError as error:
            return error


@dataclass(frozen=True)
class Response:
    """A decoded response of the server. The last one has `finish_reason` and `usage` (JSON), the first one
    `transcripts`; `logprobs` is JSON, empty unless requested."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: str = ""
    usage: str = ""
    transcripts: tuple[str, ...] = ()
    logprobs: str = ""


@dataclass
class ResponseCollector:
    """Collects the responses to one request."""

    request_id: str
    _texts: list[str] = field(default_factory=list)
    _token_ids: list[int] = field(default_factory=list)
    _logprobs: list[TokenLogprob] = field(default_factory=list)
    _transcripts: list[str] = field(default_factory=list)
    _last: Response = field(default_factory=Response)
    _start_time: float = field(default_factory=time.perf_counter)
    _first_piece_seconds: float = 0.0

    @property
    def text(self) -> str:
        """The text received so far."""
        return "".join(self._texts)

    def add(self, response: Response) -> Piece | None:
        """Add a response; returns its piece, or None if it has neither text nor tokens. Raises MalformedResponse if the
        log probabilities cannot be decoded."""
        logprobs = read_logprobs(response.logprobs)
        self._transcripts.extend(response.transcripts)
        if response.finish_reason:
            self._last = response
        if not response.text and not response.token_ids:
            return None
        if not self._texts:
            self._first_piece_seconds = time.perf_counter() - self._start_time
        self._texts.append(response.text)
        self._token_ids.extend(response.token_ids)
        self._logprobs.extend(logprobs)
        return Piece(response.text, response.token_ids, logprobs)

    def result(self) -> Result:
        """The complete answer. Raises ServerError if no response had a finish reason."""
        if not self._last.finish_reason:
            raise ServerError("the stream ended without a finish reason")
        return Result(
            text=self.text,
            token_ids=tuple(self._token_ids),
            finish_reason=self._last.finish_reason,
            usage=Usage.from_json(self._last.usage),
            request_id=self.request_id,
            first_piece_seconds=self._first_piece_seconds,
            total_seconds=time.perf_counter() - self._start_time,
            transcripts=tuple(self._transcripts),
            logprobs=tuple(self._logprobs),
        )
