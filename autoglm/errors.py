"""The one exception for faults of a single request, and the one place that maps its codes to Triton and HTTP."""

from __future__ import annotations

from enum import Enum
from typing import Any

MAX_SHOWN = 80


class ErrorCode(str, Enum):
    """What went wrong with a request. The values are the names of the gRPC status codes."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    UNAVAILABLE = "UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    INTERNAL = "INTERNAL"

    @property
    def http_status(self) -> int:
        return _HTTP_STATUS[self]

    @property
    def triton_name(self) -> str:
        """The attribute of `pb_utils.TritonError` that holds Triton's code."""
        return _TRITON_NAME[self]


_HTTP_STATUS = {
    ErrorCode.INVALID_ARGUMENT: 400,
    ErrorCode.UNAVAILABLE: 503,
    ErrorCode.DEADLINE_EXCEEDED: 504,
    ErrorCode.CANCELLED: 499,
    ErrorCode.RESOURCE_EXHAUSTED: 429,
    ErrorCode.INTERNAL: 500,
}

# Triton has no code for a deadline or for exhausted resources: both are UNAVAILABLE there, which callers may retry.
_TRITON_NAME = {
    ErrorCode.INVALID_ARGUMENT: "INVALID_ARG",
    ErrorCode.UNAVAILABLE: "UNAVAILABLE",
    ErrorCode.DEADLINE_EXCEEDED: "UNAVAILABLE",
    ErrorCode.CANCELLED: "CANCELLED",
    ErrorCode.RESOURCE_EXHAUSTED: "UNAVAILABLE",
    ErrorCode.INTERNAL: "INTERNAL",
}


class RequestError(ValueError):
    """A fault of one request: it is answered to that request's sender and concerns no other request.

    `message` names the field, what came and what is allowed; `code` says which kind of fault it is.
    """

    def __init__(self, message: str, code: ErrorCode = ErrorCode.INVALID_ARGUMENT) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


def shorten(value: Any, limit: int = MAX_SHOWN) -> str:
    """`value` as it is shown in a message: on one line, at most `limit` characters, bytes as their length."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"{len(value)} bytes"
    # Cut first: the repr of a text of 60 MB would cost more than answering it.
    text = repr(value[: limit + 1]) if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


class Exact(str):
    """A description written by the program (not a value of the request), shown in messages without quotes."""


def invalid(field: str, got: Any, allowed: str) -> RequestError:
    """An INVALID_ARGUMENT error: `field: got <got>; allowed: <allowed>`.

    `got` is shown by its repr, except an `Exact` text, which is shown as it is.
    """
    shown = str(got) if isinstance(got, Exact) else shorten(got)
    return RequestError(f"{field}: got {shown}; allowed: {allowed}")
