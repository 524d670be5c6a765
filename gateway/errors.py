"""What a caller is told when a request fails: OpenAI's error shape, and the HTTP status for every kind of fault."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from autoglm_client import AutoGLMError, Cancelled, InvalidRequest, RequestTimeout, ServerUnavailable
from starlette.responses import Response

from autoglm.errors import RequestError, shorten

log = logging.getLogger(__name__)

RETRY_AFTER = 1  # seconds: what is full now has usually room again when one answer has ended

_FIELD = re.compile(r"([\w.\[\]]+): ")


class ApiError(Exception):
    """A request's end: its HTTP status, and what its caller reads."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        headers = {"retry-after": str(RETRY_AFTER)} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        # In ASCII: what is wrong with a text may be that it cannot be encoded.
        return Response(json.dumps(self.body), self.status, headers, "application/json")


def refused(message: str) -> ApiError:
    """400 for a message that begins with the field it is about, as all of the project's do."""
    field = _FIELD.match(message)
    return ApiError(400, message, "invalid_value", field[1] if field and field[1] != "body" else None)


def from_fault(fault: Exception, names: Mapping[str, str]) -> ApiError:
    """The error for what the library or the client raised.

    names: what the fields that the server names are called in the caller's request, such as IMAGES[0].
    """
    if isinstance(fault, ApiError):
        return fault
    message = str(fault)
    if isinstance(fault, (RequestError, InvalidRequest)):
        return refused(_renamed(message, names))
    if isinstance(fault, UnicodeEncodeError):
        return ApiError(400, "body: got half of a surrogate pair; allowed: text in whole characters", "invalid_value")
    if isinstance(fault, ServerUnavailable):
        return ApiError(503, message, "unavailable")
    if isinstance(fault, RequestTimeout):
        return ApiError(504, message, "timeout")
    if isinstance(fault, Cancelled):
        return ApiError(503, message, "cancelled")
    if isinstance(fault, AutoGLMError):
        return ApiError(502, message, "server_error")
    log.error("a request failed", exc_info=fault)
    return ApiError(500, f"internal error ({type(fault).__name__}); the gateway's log has the details", "internal")


def from_validation(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """400 for a body that is not of its form. Of a union's faults the deepest counts: its form came nearest."""
    error = max(errors, key=lambda error: len(error["loc"]))
    if error["type"] == "json_invalid":
        message = f"the body is not JSON: {error['ctx']['error']} at character {error['loc'][-1]}"
        return ApiError(400, message, "not_json")
    if isinstance(body, bytes):
        return ApiError(400, "the body is not sent as JSON; allowed: Content-Type: application/json", "not_json")
    field = _path(error["loc"][1:], body, error["type"])
    if error["type"] == "extra_forbidden":
        where, _, name = field.rpartition(".")
        message = f"{where + ': ' if where else ''}got the unknown field {name[:80]!r}; allowed: those of /openapi.json"
        return ApiError(400, message, "unknown_field", field)
    if error["type"] == "missing":
        return ApiError(400, f"{field or 'body'}: missing", "missing", field)
    if error["type"] == "union_tag_invalid":
        return refused(f"{field}.type: got {shorten(error['ctx']['tag'])}; allowed: {error['ctx']['expected_tags']}")
    expected = str(error["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    return refused(f"{field or 'body'}: got {shorten(error['input'])}; allowed: {expected}")


def _renamed(message: str, names: Mapping[str, str]) -> str:
    """The message with the server's name of a field, at its beginning, replaced by the caller's."""
    field = _FIELD.match(message)
    for theirs in sorted(names, key=len, reverse=True):
        if field and (field[1] == theirs or field[1].startswith((f"{theirs}.", f"{theirs}["))):
            return names[theirs] + message[len(theirs) :]
    return message


def _path(location: Sequence[int | str], body: Any, kind: str) -> str:
    """`messages[0].content`: of the validator's location, what is in the body; the rest are names of alternatives."""
    path, value = "", body
    for i, step in enumerate(location):
        if isinstance(value, list) and isinstance(step, int):
            path, value = f"{path}[{step}]", value[step]
        elif isinstance(value, dict) and step in value:
            path, value = f"{path}.{step}" if path else str(step), value[step]
        elif isinstance(value, dict) and kind == "missing" and i == len(location) - 1:
            path = f"{path}.{step}" if path else str(step)
    return path
