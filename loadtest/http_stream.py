"""The ensemble over HTTP: `/generate_stream`, whose server-sent events are JSON objects."""

import base64
import json
from collections.abc import Iterable, Iterator
from typing import Any

import requests


class StreamError(Exception):
    """The server rejected the request, failed, or ended the stream early."""


def body(task: str, image: bytes, **options: Any) -> dict[str, Any]:
    """The JSON body of a request with one PNG file."""
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": task}]
    return {"MESSAGES": json.dumps([{"role": "user", "content": content}], ensure_ascii=False), **options}


def stream(session: requests.Session, server: str, request: dict[str, Any], timeout: float) -> Iterator[list[int]]:
    """Yield the token ids of each piece. `timeout`: seconds between two pieces.

    Raises StreamError, ValueError or requests.RequestException.
    """
    url = f"{server}/v2/models/ensemble/generate_stream"
    with session.post(url, json=request, stream=True, timeout=timeout) as response:
        finished = False
        for event in events(response.iter_content(chunk_size=None)):  # None: yield data on arrival
            if "error" in event:
                raise StreamError(event["error"])
            finished = finished or bool(event["FINISH_REASON"])
            ids = event["TOKEN_IDS"]
            ids = ids if isinstance(ids, list) else [ids]  # Triton writes a one-element tensor as a scalar
            if ids or event["TEXT"]:
                yield ids
        if not response.ok:
            raise StreamError(f"HTTP status {response.status_code}")
        if not finished:
            raise StreamError("the stream ended without a finish reason")


def events(chunks: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The objects of a server-sent event stream, or the single object of an error response. Raises ValueError."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from filter(None, map(_event, lines))
    yield from filter(None, [_event(rest)])


def _event(line: bytes) -> dict[str, Any] | None:
    data = line.removeprefix(b"data:").strip()
    event: dict[str, Any] | None = json.loads(data) if data else None
    return event
