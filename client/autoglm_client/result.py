"""What comes back: pieces while it streams, a result at the end."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, fields

from autoglm_client.actions import Action
from autoglm_client.errors import ActionError, Cancelled, RequestTimeout, ServerError
from autoglm_client.logprobs import TokenLogprob, read_logprobs
from autoglm_client.parser import Answer, parse
from autoglm_client.thought import find_action


@dataclass(frozen=True)
class Piece:
    """A part of the answer: its text, the ids of the tokens that it is made of, and their log probabilities if the
    request asks for them."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Usage:
    """The server's account of one request: tokens, and milliseconds by stage."""

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
    def from_json(cls, text: str) -> Usage:
        """Read USAGE; keys of a newer server are left aside. Raises ServerError when it is no JSON object."""
        try:
            values = json.loads(text)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise ServerError(f"USAGE is not a JSON object: {text[:80]!r}")
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


@dataclass(frozen=True)
class Result:
    """A complete answer. `finish_reason` is "stop" or "length"; seconds are measured by the client; `transcripts` are
    what the server heard, one for each sound that was transcribed; `logprobs` has one item for each token if the
    request asks for them."""

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
        """The action, or None when the text holds none that can be read (`action_error` says why)."""
        answer = self._parsed()
        return answer.action if isinstance(answer, Answer) else None

    @property
    def action_error(self) -> ActionError | None:
        """Why there is no action."""
        answer = self._parsed()
        return answer if isinstance(answer, ActionError) else None

    def _parsed(self) -> Answer | ActionError:
        try:
            return parse(self.text)
        except ActionError as error:
            return error


@dataclass(frozen=True)
class Response:
    """One response of the server, decoded; `finish_reason` and `usage` are empty until the last, `transcripts` come
    with the first; `logprobs` is JSON, empty unless asked for."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: str = ""
    usage: str = ""
    transcripts: tuple[str, ...] = ()
    logprobs: str = ""


@dataclass
class Transcript:
    """Gathers the responses of one request."""

    request_id: str
    _texts: list[str] = field(default_factory=list)
    _token_ids: list[int] = field(default_factory=list)
    _logprobs: list[TokenLogprob] = field(default_factory=list)
    _heard: list[str] = field(default_factory=list)
    _last: Response = field(default_factory=Response)
    _begun: float = field(default_factory=time.perf_counter)
    _first_piece_seconds: float = 0.0

    @property
    def text(self) -> str:
        """Everything that has come so far."""
        return "".join(self._texts)

    def add(self, response: Response) -> Piece | None:
        """Take a response in; the piece to hand out, or None when it carries no new text and no tokens.

        Raises Cancelled or RequestTimeout when the server says that it ended the request for that reason, Unreadable
        when log probabilities cannot be read.
        """
        if response.finish_reason == "cancelled":
            raise Cancelled("the server was told to stop this request")
        if response.finish_reason == "timeout":
            raise RequestTimeout("the request's time ran out on the server")
        logprobs = read_logprobs(response.logprobs)
        self._heard.extend(response.transcripts)
        if response.finish_reason:
            self._last = response
        if not response.text and not response.token_ids:
            return None
        if not self._texts:
            self._first_piece_seconds = time.perf_counter() - self._begun
        self._texts.append(response.text)
        self._token_ids.extend(response.token_ids)
        self._logprobs.extend(logprobs)
        return Piece(response.text, response.token_ids, logprobs)

    def result(self) -> Result:
        """The complete answer. Raises ServerError when the stream ended before a finish reason."""
        if not self._last.finish_reason:
            raise ServerError("the stream ended without a finish reason")
        return Result(
            text=self.text,
            token_ids=tuple(self._token_ids),
            finish_reason=self._last.finish_reason,
            usage=Usage.from_json(self._last.usage),
            request_id=self.request_id,
            first_piece_seconds=self._first_piece_seconds,
            total_seconds=time.perf_counter() - self._begun,
            transcripts=tuple(self._heard),
            logprobs=tuple(self._logprobs),
        )
