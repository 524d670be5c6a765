"""The request option `response_format`: OpenAI's formats, and `phone_action` in addition."""

import json
import re
from typing import Any, NoReturn

from autoglm.errors import RequestError, Verbatim, invalid, printable

KINDS = ("text", "json_object", "json_schema", "phone_action")
SCHEMA_FIELDS = ("name", "description", "schema", "strict")
SCHEMA_NAME = "^[a-zA-Z0-9_-]{1,64}$"
MAX_CHARACTERS = 100_000


def read_response_format(name: str, value: Any) -> str | None:
    """Check a `response_format`, a JSON object as text because Triton's parameters cannot hold objects.

    Returns:
        Its canonical form, so that equal grammars have equal texts: {"type":"json_object"}, {"type":"phone_action"} or
        {"type":"json_schema","json_schema":{"schema":{...}}} with the schema unchanged, because the order of its
        properties is that of the answer; None for unconstrained text.

    Raises:
        RequestError: it is malformed. Whether the schema can be compiled is checked later.
    """
    if not isinstance(value, str):
        raise invalid(name, value, "a JSON object as text")
    if len(value) > MAX_CHARACTERS:
        raise invalid(name, Verbatim(f"{len(value)} characters"), f"at most {MAX_CHARACTERS} characters long")
    try:
        content = json.loads(value, parse_constant=_reject_constant)
        text = json.dumps(content, separators=(",", ":"))
    except (ValueError, RecursionError):
        raise invalid(name, value, "a JSON object as text") from None
    kind = content.get("type") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise invalid(name, value, f"an object whose type is one of {', '.join(KINDS)}")
    _check_fields(name, content, ("type", "json_schema") if kind == "json_schema" else ("type",))
    if kind == "json_schema":
        schema = _schema(f"{name}.json_schema", content.get("json_schema"))
        text = json.dumps({"type": kind, "json_schema": {"schema": schema}}, separators=(",", ":"))
    return None if kind == "text" else text


def _schema(name: str, value: Any) -> dict[str, Any]:
    _check_object(name, value)
    _check_fields(name, value, SCHEMA_FIELDS)
    label, schema = value.get("name"), value.get("schema")
    if label is not None and not (isinstance(label, str) and re.fullmatch(SCHEMA_NAME, label)):
        raise invalid(f"{name}.name", label, "1 to 64 letters, digits, underscores or hyphens")
    for field, kind, accepted in (("description", str, "a string"), ("strict", bool, "true or false")):
        if not isinstance(value.get(field), (kind, type(None))):
            raise invalid(f"{name}.{field}", value[field], accepted)
    _check_object(f"{name}.schema", schema)
    return schema  # type: ignore[no-any-return]


def _check_object(name: str, value: Any) -> None:
    if value is None:
        raise RequestError(f"{name} is missing")
    if not isinstance(value, dict):
        raise invalid(name, value, "a JSON object")


def _check_fields(name: str, value: dict[str, Any], known: tuple[str, ...]) -> None:
    for field in value:
        if field not in known:
            raise RequestError(f"{name}.{printable(field)} is not a known field (accepted: {', '.join(known)})")


def _reject_constant(text: str) -> NoReturn:
    """NaN and the infinities, which Python's parser accepts."""
    raise ValueError(text)
