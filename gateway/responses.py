"""Answers in OpenAI's shapes: whole, and as the events of a stream."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from autoglm_client.result import Response
from starlette.responses import Response as HttpResponse
from starlette.types import Receive, Scope, Send

from gateway.errors import ApiError
from gateway.logprobs import Logprobs

DONE = b"data: [DONE]\n\n"
STAGES = ("queue_ms", "preprocess_ms", "vision_ms", "audio_ms", "prefill_ms", "decode_ms")

Pieces = AsyncGenerator[list[tuple[int, Response]], None]

to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass
class Usage:
    """The server's account of all choices of one request. `timings` are those of the first choice that has ended."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    image_tokens: int = 0
    audio_tokens: int = 0
    timings: dict[str, float] = field(default_factory=dict)

    def add(self, usage: str) -> None:
        """Take in the USAGE of a choice's last response. The choices share one prompt."""
        told = json.loads(usage)
        self.prompt_tokens = told["prompt_tokens"]
        self.completion_tokens += told["completion_tokens"]
        self.cached_tokens = max(self.cached_tokens, told["cached_tokens"])
        self.image_tokens = told.get("image_tokens", 0)
        self.audio_tokens = told.get("audio_tokens", 0)
        self.timings = self.timings or {stage: told[stage] for stage in STAGES if stage in told}

    def shape(self) -> dict[str, Any]:
        details = {name: getattr(self, name) for name in ("cached_tokens", "image_tokens", "audio_tokens")}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": details,
            "timings": self.timings,
        }


@dataclass
class Answer:
    """One request's answer. `kind` is "chat" for messages and deltas, "text" for plain completions."""

    kind: Literal["chat", "text"]
    id: str
    model: str
    wants_usage: bool = False
    usage: Usage = field(default_factory=Usage)
    created: int = field(default_factory=lambda: int(time.time()))

    async def gather(self, pieces: Pieces) -> dict[str, Any]:
        """The whole answer, when all of `pieces` have come, each with the number of its choice."""
        texts: dict[int, str] = {}
        logprobs: defaultdict[int, list[str]] = defaultdict(list)
        finish_reasons: dict[int, str] = {}
        heard: tuple[str, ...] = ()
        async with aclosing(pieces):
            async for together in pieces:
                for index, response in together:
                    texts[index] = texts.get(index, "") + response.text
                    logprobs[index].append(response.logprobs)
                    heard = heard or response.transcripts
                    if response.finish_reason:
                        finish_reasons[index] = response.finish_reason
                        self.usage.add(response.usage)
        choices = [
            self._choice(i, texts[i], finish_reasons[i], Logprobs(self.kind).shape(logprobs[i]), "message")
            for i in sorted(texts)
        ]
        return {**self._head("", heard), "choices": choices, "usage": self.usage.shape()}

    async def events(self, pieces: Pieces) -> AsyncGenerator[bytes, None]:
        """The same as the events of a stream, as soon as their pieces have come; those together that came together."""
        begun: dict[int, Logprobs] = {}
        async with aclosing(pieces):
            async for together in pieces:
                if content := b"".join(self._events(together, begun)):
                    yield content
        yield self._last()

    def _events(self, together: list[tuple[int, Response]], begun: dict[int, Logprobs]) -> Iterator[bytes]:
        for index, response in together:
            if response.finish_reason:
                self.usage.add(response.usage)
            elif not (response.text or response.transcripts or response.logprobs):
                continue
            first = index not in begun
            logprobs = begun.setdefault(index, Logprobs(self.kind))
            yield self._piece(index, response, logprobs.shape([response.logprobs]), first=first)

    def _piece(self, index: int, response: Response, logprobs: dict[str, Any] | None, *, first: bool) -> bytes:
        """The event of a choice's next piece of text; the last one has the finish reason."""
        choice = self._choice(index, response.text, response.finish_reason, logprobs, "delta")
        if self.kind == "chat" and not first:
            del choice["delta"]["role"]
        chunk = {**self._head(".chunk", response.transcripts), "choices": [choice]}
        return event(chunk | {"usage": None} if self.wants_usage else chunk)

    def _last(self) -> bytes:
        """What follows the last piece."""
        if not self.wants_usage:
            return DONE
        return event({**self._head(".chunk"), "choices": [], "usage": self.usage.shape()}) + DONE

    def _head(self, suffix: str, heard: tuple[str, ...] = ()) -> dict[str, Any]:
        """What all parts of an answer begin with; beyond OpenAI's, what was heard in the request's sound."""
        chat = self.kind == "chat"
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self.id}",
            "object": f"chat.completion{suffix}" if chat else "text_completion",
            "created": self.created,
            "model": self.model,
        }
        return head | {"transcripts": list(heard)} if heard else head

    def _choice(
        self, index: int, text: str, finish_reason: str, logprobs: dict[str, Any] | None, holder: str
    ) -> dict[str, Any]:
        words = {holder: {"role": "assistant", "content": text}} if self.kind == "chat" else {"text": text}
        return {"index": index, **words, "logprobs": logprobs, "finish_reason": finish_reason or None}


def event(content: dict[str, Any]) -> bytes:
    return b"data: " + to_json(content).encode() + b"\n\n"


class EventStream(HttpResponse):
    """Server-sent events, each written when it comes. An error that comes after the first is the last event."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], first: bytes) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._events = events
        self._first = first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            try:
                async for content in self._events:
                    await send({"type": "http.response.body", "body": content, "more_body": True})
            except ApiError as error:
                await send({"type": "http.response.body", "body": event(error.body) + DONE, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
