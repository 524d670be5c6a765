"""Exceptions for gRPC statuses and the server's error texts."""

import grpc
import pytest
from autoglm_client import AutoGLMError, Cancelled, InvalidRequest, RequestTimeout, ServerError, ServerUnavailable
from autoglm_client.errors import from_status, from_text

Status = grpc.StatusCode
TEXTS = [
    ("INVALID_ARGUMENT: max_tokens must be between 1 and 9 (got -1)", InvalidRequest,
     "max_tokens must be between 1 and 9 (got -1)"),
    ("UNAVAILABLE: the queue is full", ServerUnavailable, "the queue is full"),
    ("RESOURCE_EXHAUSTED: no memory", ServerUnavailable, "no memory"),
    ("DEADLINE_EXCEEDED: too late", RequestTimeout, "too late"),
    ("CANCELLED: stopped", Cancelled, "stopped"),
    ("INTERNAL: lost", ServerError, "lost"),
    ("NOT_A_CODE: lost", ServerError, "NOT_A_CODE: lost"),
    ("Request for unknown model: 'ensemble'", ServerUnavailable, "Request for unknown model: 'ensemble'"),
    ("Server is stopping, scheduler", ServerUnavailable, "Server is stopping, scheduler"),
]  # fmt: skip
STATUSES = [
    (Status.UNAVAILABLE, "failed to connect to all addresses; last error: UNKNOWN: ipv4:10.0.0.1:8: connect: "
     "Connection refused (111)", ServerUnavailable, "no server at host:8001 (Connection refused)"),
    (Status.UNAVAILABLE, "errors resolving host:8001: [address lookup failed]", ServerUnavailable,
     "no server at host:8001 (unknown host)"),
    (Status.UNAVAILABLE, "failed to connect to all addresses; last error: UNAVAILABLE: Failed parsing HTTP/2",
     ServerUnavailable, "no server at host:8001 (not a gRPC port)"),
    (Status.UNAVAILABLE, "failed to connect to all addresses; last error: FD Shutdown", ServerUnavailable,
     "no server at host:8001 (unreachable)"),
    (Status.UNAVAILABLE, "recvmsg:Connection reset by peer", ServerUnavailable,
     "the connection to host:8001 was lost"),
    (Status.UNAVAILABLE, "the server is stopping", ServerUnavailable, "the server is stopping"),
    (Status.UNAVAILABLE, "UNAVAILABLE: the queue is full", ServerUnavailable, "the queue is full"),
    (Status.INVALID_ARGUMENT, "INVALID_ARGUMENT: PROMPT must be x", InvalidRequest, "PROMPT must be x"),
    (Status.INVALID_ARGUMENT, "unexpected input", InvalidRequest, "unexpected input"),
    (Status.DEADLINE_EXCEEDED, "Deadline Exceeded", RequestTimeout,
     "the answer was not complete within the request's timeout"),
    (Status.UNIMPLEMENTED, "Method not found!", ServerError, "host:8001 is not a Triton server"),
    (Status.INTERNAL, None, ServerError, "INTERNAL"),
    (Status.UNKNOWN, "lost", ServerError, "lost"),
]  # fmt: skip


@pytest.mark.parametrize("decoration", ["", "in ensemble 'ensemble', ", "in ensemble 'ensemble', [request id: 7f] "])
@pytest.mark.parametrize(("text", "kind", "message"), TEXTS, ids=[text for text, _, _ in TEXTS])
def test_codes_of_texts_select_the_exception(
    decoration: str, text: str, kind: type[AutoGLMError], message: str
) -> None:
    error = from_text(decoration + text)
    assert (type(error), str(error), error.third_party) == (kind, message, message == text)


def test_tracebacks_of_the_server_are_removed() -> None:
    text = "Failed to process the request(s) for model 'm_0_0', message: ValueError: x\n\nAt:\n  /srv/model.py(10): f\n"
    error = from_text(text)
    assert (type(error), str(error), error.third_party) == (ServerError, "ValueError: x", True)


@pytest.mark.parametrize(("code", "details", "kind", "message"), STATUSES, ids=[message for *_, message in STATUSES])
def test_statuses_select_the_exception(
    code: grpc.StatusCode, details: str | None, kind: type[AutoGLMError], message: str
) -> None:
    error = from_status(code, details, "host:8001")
    third_party = message in (details, code.name)
    assert (type(error), str(error), error.third_party) == (kind, message, third_party)
