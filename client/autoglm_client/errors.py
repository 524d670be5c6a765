"""What the client raises, and how the faults that the network reports become one of these."""

from __future__ import annotations

import re

import grpc


class AutoGLMError(Exception):
    """Base of everything this package raises on purpose."""


class InvalidRequest(AutoGLMError):
    """The request itself is wrong; sending it again will fail again."""


class ServerUnavailable(AutoGLMError):
    """No server there, not ready, or too busy; the same request may succeed later."""


class RequestTimeout(AutoGLMError):
    """No first piece, or no end, within the time allowed."""


class Cancelled(AutoGLMError):
    """The request was cancelled, here or by a stop request of somebody else."""


class ServerError(AutoGLMError):
    """The server failed."""


class Unreadable(ServerError):
    """The server answered, and goes on answering, what this client cannot read."""


class ActionError(AutoGLMError, ValueError):
    """A text is not in the action language. `position` is the offset of the fault in that text."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(f"{message}, at character {position}")
        self.position = position


_BY_CODE: dict[str, type[AutoGLMError]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "UNAVAILABLE": ServerUnavailable,
    "RESOURCE_EXHAUSTED": ServerUnavailable,
    "NOT_FOUND": ServerUnavailable,
    "DEADLINE_EXCEEDED": RequestTimeout,
    "CANCELLED": Cancelled,
    "INTERNAL": ServerError,
}

_CODED = re.compile(rf"({'|'.join(_BY_CODE)}): ")
_DECORATION = re.compile(r"(?:in ensemble '[^']*', |\[request id: [^\]]*\] )+")
_UNCAUGHT = re.compile(r"Failed to process the request\(s\) for model '[^']*', message: ")
_NOT_NOW = re.compile(r"unknown model|no available versions|not ready|is stopping|Exceeds maximum queue size")
_UNREACHABLE = re.compile(r"failed to connect to|connections to all backends failing", re.I)


def from_status(code: grpc.StatusCode, details: str | None, server: str) -> AutoGLMError:
    """The error for a gRPC status which the call itself ended with."""
    message = details or code.name
    if code is grpc.StatusCode.UNAVAILABLE and _UNREACHABLE.search(message):
        return ServerUnavailable(f"no server at {server} ({_connection_fault(message)})")
    return _BY_CODE.get(code.name, ServerError)(message)


def from_text(text: str) -> AutoGLMError:
    """The error for the text that a stream carries: the models put a code before it, Triton itself does not."""
    message = undecorated(text)
    coded = _CODED.match(message)
    if coded:
        return _BY_CODE[coded[1]](message[coded.end() :])
    return ServerUnavailable(message) if _NOT_NOW.search(message) else ServerError(message)


def undecorated(message: str) -> str:
    """`message` without the names of ensemble, request and model instance, and without a server-side traceback."""
    message = _DECORATION.sub("", message, count=1)
    message = _UNCAUGHT.sub("", message, count=1)
    return message.split("\n\nAt:\n", 1)[0].strip()


def _connection_fault(message: str) -> str:
    """The last and most telling part of gRPC's report, such as "Connection refused"."""
    return re.sub(r"\s*\(\d+\)$", "", message.rsplit(": ", 1)[-1])
