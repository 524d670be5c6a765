"""Responses in OpenAI's format: whole, or as a stream of server-sent events."""

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
from gateway.logprobs import OpenAILogprobs

DONE = b"data: [DONE]\n\n"
STAGES = ("queue_ms", "preprocess_ms", "vision_ms", "audio_ms", "prefill_ms", "decode_ms")

Responses = AsyncGenerator[list[tuple[int, Response]], None]

to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass
class CompletionUsage:
    """Token counts of all choices of one request. `timings` (milliseconds) are those of the first finished choice."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    image_tokens: int = 0
    audio_tokens: int = 0
    timings: dict[str, float] = field(default_factory=dict)

    def add(self, usage: str) -> None:
        """Add USAGE of a choice's last response. The choices share one prompt."""
        values = json.loads(usage)
        self.prompt_tokens = values["prompt_tokens"]
        self.completion_tokens += values["completion_tokens"]
        self.cached_tokens = max(self.cached_tokens, values["cached_tokens"])
        self.image_tokens = values.get("image_tokens", 0)
        self.audio_tokens = values.get("audio_tokens", 0)
        self.timings = self.timings or {stage: values[stage] for stage in STAGES if stage in values}

    def to_dict(self) -> dict[str, Any]:
        details = {name: getattr(self, name) for name in ("cached_tokens", "image_tokens", "audio_tokens")}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": details,
            "timings": self.timings,
        }


@dataclass
class ResponseBuilder:
    """Builds the response to one request. `kind` is "chat" for messages and deltas, "text" for plain completions."""

    kind: Literal["chat", "text"]
    id: str
    model: str
    wants_usage: bool = False
    usage: CompletionUsage = field(default_factory=CompletionUsage)
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self, responses: Responses) -> dict[str, Any]:
        """The complete response, after the last of `responses`: batches of (index of the choice, response)."""
        texts: dict[int, str] = {}
        logprobs: defaultdict[int, list[str]] = defaultdict(list)
        finish_reasons: dict[int, str] = {}
        transcripts: tuple[str, ...] = ()
        async with aclosing(responses):
            async for batch in responses:
                for index, response in batch:
                    texts[index] = texts.get(index, "") + response.text
                    logprobs[index].append(response.logprobs)
                    transcripts = transcripts or response.transcripts
                    if response.finish_reason:
                        finish_reasons[index] = response.finish_reason
                        self.usage.add(response.usage)
        choices = [
            self._choice(i, texts[i], finish_reasons[i], OpenAILogprobs(self.kind).format(logprobs[i]), "message")
            for i in sorted(texts)
        ]
        return {**self._head("", transcripts), "choices": choices, "usage": self.usage.to_dict()}

    async def events(self, responses: Responses) -> AsyncGenerator[bytes, None]:
        """Yield the events of the stream; those of one batch are joined."""
        begun: dict[int, OpenAILogprobs] = {}
        async with aclosing(responses):
            async for batch in responses:
                if content := b"".join(self._events(batch, begun)):
                    yield content
        yield self._last()

    def _events(self, batch: list[tuple[int, Response]], begun: dict[int, OpenAILogprobs]) -> Iterator[bytes]:
        for index, response in batch:
            if response.finish_reason:
                self.usage.add(response.usage)
            elif not (response.text or response.transcripts or response.logprobs):
                continue
            first = index not in begun
            logprobs = begun.setdefault(index, OpenAILogprobs(self.kind))
            yield self._chunk(index, response, logprobs.format([response.logprobs]), first=first)

    def _chunk(self, index: int, response: Response, logprobs: dict[str, Any] | None, *, first: bool) -> bytes:
        """The event of a choice's next text; the last one has the finish reason."""
        choice = self._choice(index, response.text, response.finish_reason, logprobs, "delta")
        if self.kind == "chat" and not first:
            del choice["delta"]["role"]
        chunk = {**self._head(".chunk", response.transcripts), "choices": [choice]}
        return event(chunk | {"usage": None} if self.wants_usage else chunk)

    def _last(self) -> bytes:
        """The end of the stream."""
        if not self.wants_usage:
            return DONE
        return event({**self._head(".chunk"), "choices": [], "usage": self.usage.to_dict()}) + DONE

    def _head(self, suffix: str, transcripts: tuple[str, ...] = ()) -> dict[str, Any]:
        """The common fields. `transcripts` of the request's audio are an extension of OpenAI's format."""
        chat = self.kind == "chat"
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self.id}",
            "object": f"chat.completion{suffix}" if chat else "text_completion",
            "created": self.created,
            "model": self.model,
        }
        return head | {"transcripts": list(transcripts)} if transcripts else head

    def _choice(
        self, index: int, text: str, finish_reason: str, logprobs: dict[str, Any] | None, key: str
    ) -> dict[str, Any]:
        content = {key: {"role": "assistant", "content": text}} if self.kind == "chat" else {"text": text}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason or None}


def event(content: dict[str, Any]) -> bytes:
    return b"data: " + to_json(content).encode() + b"\n\n"


class EventStreamResponse(HttpResponse):
    """Server-sent events, written as they arrive. An error after the first event becomes the last event."""

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
