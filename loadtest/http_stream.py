"""The ensemble over HTTP: `/generate_stream`, server-sent events with a JSON object each."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from typing import Any

import requests


class StreamError(Exception):
    """The server refused the request, failed, or ended the stream early."""


def body(task: str, image: bytes, **options: Any) -> dict[str, Any]:
    """The JSON body that asks about one PNG: inputs and options side by side."""
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": task}]
    return {"MESSAGES": json.dumps([{"role": "user", "content": content}], ensure_ascii=False), **options}


def stream(session: requests.Session, server: str, request: dict[str, Any], timeout: float) -> Iterator[list[int]]:
    """The token ids of each piece as it comes; `timeout` seconds may pass between two.

    Raises StreamError, or what requests raises.
    """
    url = f"{server}/v2/models/ensemble/generate_stream"
    with session.post(url, json=request, stream=True, timeout=timeout) as response:
        finished = False
        for event in events(response.iter_content(chunk_size=None)):  # None: hand on at once what has come
            if "error" in event:
                raise StreamError(event["error"])
            finished = finished or bool(event["FINISH_REASON"])
            ids = event["TOKEN_IDS"]
            ids = ids if isinstance(ids, list) else [ids]  # Triton writes a tensor of one element without brackets
            if ids or event["TEXT"]:
                yield ids
        if not response.ok:
            raise StreamError(f"HTTP status {response.status_code}")
        if not finished:
            raise StreamError("the stream ended without a finish reason")


def events(chunks: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The objects of a server-sent event stream, or the one object of an error answer. Raises ValueError."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from filter(None, map(_event, lines))
    yield from filter(None, [_event(rest)])


def _event(line: bytes) -> dict[str, Any] | None:
    data = line.removeprefix(b"data:").strip()
    event: dict[str, Any] | None = json.loads(data) if data else None
    return event
