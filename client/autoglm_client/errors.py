"""Exceptions of the client, and their mapping from gRPC statuses and the server's error texts."""

import re

import grpc


class AutoGLMError(Exception):
    """Base class of the client's exceptions. third_party: whether the message is gRPC's or Triton's own text."""

    def __init__(self, message: str, *, third_party: bool = False) -> None:
        super().__init__(message)
        self.third_party = third_party


class InvalidRequest(AutoGLMError):
    """The request is invalid; retrying it fails again."""


class ServerUnavailable(AutoGLMError):
    """The server is unreachable, not ready or overloaded; the same request may succeed later."""


class RequestTimeout(AutoGLMError):
    """The first piece or the end of the answer did not arrive in time."""


class Cancelled(AutoGLMError):
    """The request was cancelled, by this client or by a stop request of another one."""


class ServerError(AutoGLMError):
    """The server failed."""


class MalformedResponse(ServerError):
    """A response cannot be decoded; the server may still be working on the request."""


class ActionError(AutoGLMError, ValueError):
    """A text is not in the action language. `position` is the offset of the error in the text."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(f"{message}, at character {position}")
        self.position = position


TIMED_OUT = "the answer was not complete within the request's timeout"

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
_RETRYABLE = re.compile(r"unknown model|no available versions|not ready|is stopping|Exceeds maximum queue size")

_UNREACHABLE = re.compile(r"failed to connect to|connections to all backends failing|errors resolving", re.I)
_LOST = re.compile(r"socket closed|connection reset|broken pipe|stream removed|endpoint closing|GOAWAY|keepalive", re.I)
# gRPC's reports of a failed connection contain one of these keys.
_REASONS = {
    "Connection refused": "Connection refused",
    "errors resolving": "unknown host",
    "HTTP/2": "not a gRPC port",
    "timed out": "no response",
}


def from_status(code: grpc.StatusCode, details: str | None, server: str) -> AutoGLMError:
    """The exception for a call that ended with this gRPC status. Texts about the connection are replaced."""
    message = details or code.name
    if code is grpc.StatusCode.UNAVAILABLE and _UNREACHABLE.search(message):
        reason = next((reason for key, reason in _REASONS.items() if key in message), "unreachable")
        return ServerUnavailable(f"no server at {server} ({reason})")
    if code is grpc.StatusCode.UNAVAILABLE and _LOST.search(message):
        return ServerUnavailable(f"the connection to {server} was lost")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return RequestTimeout(TIMED_OUT)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ServerError(f"{server} is not a Triton server")
    error = from_text(message)
    return _BY_CODE.get(code.name, ServerError)(message, third_party=True) if error.third_party else error


def from_text(text: str) -> AutoGLMError:
    """The exception for an error text. The models prefix it with a code, which Triton and uncaught exceptions lack."""
    message = _UNCAUGHT.sub("", _DECORATION.sub("", text, count=1), count=1)
    message = message.split("\n\nAt:\n", 1)[0].strip()  # a traceback of the server
    coded = _CODED.match(message)
    if coded:
        return _BY_CODE[coded[1]](message[coded.end() :])
    return (ServerUnavailable if _RETRYABLE.search(message) else ServerError)(message, third_party=True)
