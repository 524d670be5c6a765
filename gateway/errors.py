"""Errors in OpenAI's format. `autoglm.errors.ErrorCode` defines their HTTP statuses."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from autoglm_client import AutoGLMError, Cancelled, InvalidRequest, RequestTimeout, ServerUnavailable
from starlette.exceptions import HTTPException
from starlette.responses import Response

from autoglm.errors import ErrorCode, RequestError, Verbatim, invalid
from gateway.schema import FIELDS, UNKNOWN_FIELD

log = logging.getLogger(__name__)

RETRY_AFTER = 1  # seconds: by then one of the running answers has usually ended
BAD_REQUEST = ErrorCode.INVALID_ARGUMENT.http_status

# The first match wins. Cancelled means that another client sent STOP: the caller may retry.
_CODES: tuple[tuple[type[Exception], ErrorCode, str], ...] = (
    (InvalidRequest, ErrorCode.INVALID_ARGUMENT, "invalid_value"),
    (ServerUnavailable, ErrorCode.UNAVAILABLE, "unavailable"),
    (RequestTimeout, ErrorCode.DEADLINE_EXCEEDED, "timeout"),
    (Cancelled, ErrorCode.UNAVAILABLE, "cancelled"),
    (AutoGLMError, ErrorCode.INTERNAL, "server_error"),
)

# Replace the texts of gRPC and Triton; the log has them.
_REPLACED = {
    ErrorCode.INVALID_ARGUMENT: "the server rejected the request",
    ErrorCode.UNAVAILABLE: "the server is starting, stopping or full",
    ErrorCode.INTERNAL: "the server failed",
}

# Accepted values by pydantic's type of error.
_ACCEPTED = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "int_type": "an integer",
    "list_type": "a list",
    "model_attributes_type": "an object",
    "model_type": "an object",
    "none_required": "null",
    "string_type": "a string",
    "string_unicode": "a string without surrogates",
    "too_short": "a non-empty list",
}
_PATH = re.compile(r"((\w+)[\w.\[\]]*):? ")


class ApiError(HTTPException):
    """An error response: its HTTP status and the fields of its body. `param` is the path of the invalid field."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(status, message)
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
        # In ASCII: the message may quote text that cannot be encoded as UTF-8.
        return Response(json.dumps(self.body), self.status, headers, "application/json")


def from_exception(error: Exception, names: Mapping[str, str]) -> ApiError:
    """The response to an error of the library or the client.

    names: the caller's names of fields that the server names differently, such as IMAGES[0].
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnicodeEncodeError):
        return ApiError(BAD_REQUEST, "the body must not contain half of a surrogate pair", "invalid_value")
    own_code = error.code if isinstance(error, RequestError) else None
    for kind, code, name in _CODES:
        if isinstance(error, kind) or code is own_code:
            if getattr(error, "third_party", False):
                log.warning("%s: %s", name, error)
                return ApiError(code.http_status, _REPLACED[code], name)
            message = _with_callers_name(str(error), names)
            param = _param(message) if code is ErrorCode.INVALID_ARGUMENT else None
            return ApiError(code.http_status, message, name, param)
    log.error("request failed", exc_info=error)
    message = f"internal error ({type(error).__name__}); see the gateway's log"
    return ApiError(ErrorCode.INTERNAL.http_status, message, "internal")


def from_validation(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """The response to a body that pydantic rejects, without pydantic's messages.

    Only the deepest error is reported: of a union's members, that one came closest.
    """
    error = max(errors, key=lambda error: len(error["loc"]))
    if isinstance(body, bytes):
        return ApiError(BAD_REQUEST, "the body must be sent with Content-Type: application/json", "not_json")
    path = _path(error["loc"][1:], body, error["type"])
    if error["type"] in ("missing", "union_tag_not_found"):
        path = path if error["type"] == "missing" else f"{path}.type"
        return ApiError(BAD_REQUEST, f"{path or 'the body'} is missing", "missing", path or None)
    if error["type"] == "value_error":  # a sentence of one of our validators about a field of its model
        message = str(error["ctx"]["error"])
        if path and not message.startswith(f"{path} "):  # the path of the model, not of its field
            message = f"{path}.{message}"
        name, unknown, _ = message.partition(UNKNOWN_FIELD)
        if unknown:
            return ApiError(BAD_REQUEST, message, "unknown_field", name)
        return ApiError(BAD_REQUEST, message, "invalid_value", _param(message))
    got = error["input"]
    # Each member of a union refuses a value that fits none of them.
    same_field = [each for each in errors if _path(each["loc"][1:], body, each["type"]) == path]
    accepted = " or ".join(dict.fromkeys(map(_accepted, same_field)))
    if error["type"] == "union_tag_invalid":
        path, got = f"{path}.type", error["input"]["type"]
    return ApiError(BAD_REQUEST, str(invalid(path or "the body", _shown(got), accepted)), "invalid_value", path or None)


def _accepted(error: Mapping[str, Any]) -> str:
    """The values that a field accepts, by the error that another value has caused."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in ("literal_error", "union_tag_invalid"):
        expected = context["expected" if kind == "literal_error" else "expected_tags"]
        values = [value.strip("'") for value in re.split(", | or ", expected)]
        return f"one of {', '.join(values)}" if len(values) > 1 else values[0].replace("False", "false")
    if kind == "too_long":
        return f"a list of at most {context['max_length']}" if context["max_length"] else "empty"
    return _ACCEPTED.get(kind, "a valid value")


def _shown(value: Any) -> Any:
    """A value of the body for a message. Lists and objects are not quoted: they can hold megabytes of base64."""
    if isinstance(value, list):
        return Verbatim(f"a list of {len(value)}" if value else "an empty list")
    if isinstance(value, dict):
        return Verbatim("an object")
    return value


def _param(message: str) -> str | None:
    """The path of a field that a message begins with."""
    path = _PATH.match(message)
    return path[1] if path and path[2] in FIELDS else None


def _with_callers_name(message: str, names: Mapping[str, str]) -> str:
    """Replace the server's name of a field, at the beginning of a message, by the caller's."""
    path = _PATH.match(message)
    for name in sorted(names, key=len, reverse=True):
        if path and (path[1] == name or path[1].startswith((f"{name}.", f"{name}["))):
            return names[name] + message[len(name) :]
    return message


def _path(location: Sequence[int | str], body: Any, kind: str) -> str:
    """`messages[0].content`. Steps of pydantic's location that are not in the body name members of unions."""
    path, value = "", body
    for i, step in enumerate(location):
        if isinstance(value, list) and isinstance(step, int):
            path, value = f"{path}[{step}]", value[step]
        elif isinstance(value, dict) and step in value:
            path, value = f"{path}.{step}" if path else str(step), value[step]
        elif isinstance(value, dict) and kind == "missing" and i == len(location) - 1:
            path = f"{path}.{step}" if path else str(step)
    return path
