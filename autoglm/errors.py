"""Errors of a single request, and the one mapping of their codes to Triton and HTTP."""

import json
from enum import Enum
from itertools import islice
from typing import Any

MAX_SHOWN = 80  # characters of a request's value in a message
# YAML's dates are not JSON, its keys need not be strings, and its aliases can be circular.
_JSON = json.JSONEncoder(skipkeys=True, ensure_ascii=False, check_circular=False, default=str)


class ErrorCode(str, Enum):
    """The kind of error. The values are gRPC's names of its status codes."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    UNAVAILABLE = "UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    INTERNAL = "INTERNAL"

    @property
    def http_status(self) -> int:
        return _CODES[self][0]

    @property
    def triton_name(self) -> str:
        """The attribute of Triton's error class that holds its code."""
        return _CODES[self][1]


# Triton has no code for a deadline: it becomes UNAVAILABLE, which callers may retry.
_CODES = {
    ErrorCode.INVALID_ARGUMENT: (400, "INVALID_ARG"),
    ErrorCode.UNAVAILABLE: (503, "UNAVAILABLE"),
    ErrorCode.DEADLINE_EXCEEDED: (504, "UNAVAILABLE"),
    ErrorCode.CANCELLED: (499, "CANCELLED"),
    ErrorCode.INTERNAL: (500, "INTERNAL"),
}


class RequestError(ValueError):
    """An error of one request. It is returned to that request's caller and affects no other request.

    `message` is one sentence that names the field, what is accepted and the value received.
    """

    def __init__(self, message: str, code: ErrorCode = ErrorCode.INVALID_ARGUMENT) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


class Verbatim(str):
    """A description of a value in our own words, shown in messages without quotes."""


def printable(text: str, limit: int = MAX_SHOWN) -> str:
    """The first `limit` characters of `text`, those that cannot be printed on one line escaped as in JSON."""
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text[:limit])


def shorten(value: Any, limit: int = MAX_SHOWN) -> str:
    """`value` in at most `limit` characters: text in single quotes, bytes as their length, anything else as JSON."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"{len(value)} bytes"
    # Cut first: rendering all of a 60 MB value would cost more than answering it.
    if isinstance(value, str):
        text = f"'{value[:limit]}'".replace("\\", r"\\")
    else:
        text = "".join(islice(_JSON.iterencode(value), limit + 1))
    text = printable(text, limit + 1)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def invalid(field: str, got: Any, accepted: str) -> RequestError:
    """An INVALID_ARGUMENT error: `<field> must be <accepted> (got <got>)`.

    `got` is shown by `shorten`, a `Verbatim` text as it is.
    """
    return RequestError(f"{field} must be {accepted} (got {got if isinstance(got, Verbatim) else shorten(got)})")
