"""What an answer is limited to, as a request says it: OpenAI's `response_format`, and `phone_action` beside it."""

import json
import re
from typing import Any, NoReturn

from autoglm.errors import Exact, RequestError, invalid

KINDS = ("text", "json_object", "json_schema", "phone_action")
SCHEMA_FIELDS = ("name", "description", "schema", "strict")
SCHEMA_NAME = "^[a-zA-Z0-9_-]{1,64}$"
MAX_CHARACTERS = 100_000


def read_response_format(name: str, value: Any) -> str | None:
    """Check a request's `response_format`, a JSON object as text: Triton's parameters hold no objects.

    Returns:
        The same in as few words as say it, so that equal grammars are equal texts: {"type":"json_object"},
        {"type":"phone_action"} or {"type":"json_schema","json_schema":{"schema":{...}}}, the schema as it came (the
        order of its properties is that of the answer); None for text, which is free.

    Raises:
        RequestError: not of that form. Whether a grammar can be made of the schema shows when it is made.
    """
    if not isinstance(value, str):
        raise invalid(name, value, "a JSON object as text")
    if len(value) > MAX_CHARACTERS:
        raise invalid(name, Exact(f"{len(value)} characters"), f"at most {MAX_CHARACTERS}")
    try:
        wanted = json.loads(value, parse_constant=_no_number)
        text = json.dumps(wanted, separators=(",", ":"))
    except (ValueError, RecursionError):
        raise invalid(name, value, "a JSON object as text") from None
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise invalid(name, value, f"an object whose type is one of {', '.join(KINDS)}")
    _check_names(name, wanted, ("type", "json_schema") if kind == "json_schema" else ("type",))
    if kind == "json_schema":
        schema = _schema(f"{name}.json_schema", wanted.get("json_schema"))
        text = json.dumps({"type": kind, "json_schema": {"schema": schema}}, separators=(",", ":"))
    return None if kind == "text" else text


def _schema(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise invalid(name, value, "an object with a schema")
    _check_names(name, value, SCHEMA_FIELDS)
    label, schema = value.get("name"), value.get("schema")
    if label is not None and not (isinstance(label, str) and re.fullmatch(SCHEMA_NAME, label)):
        raise invalid(f"{name}.name", label, "1 to 64 letters, digits, _ and -")
    if not isinstance(schema, dict):
        raise invalid(f"{name}.schema", schema, "a JSON schema, an object")
    for field, kind, allowed in (("description", str, "text"), ("strict", bool, "true or false")):
        if not isinstance(value.get(field), (kind, type(None))):
            raise invalid(f"{name}.{field}", value[field], allowed)
    return schema


def _check_names(name: str, value: dict[str, Any], allowed: tuple[str, ...]) -> None:
    for field in value:
        if field not in allowed:
            raise RequestError(f"{name}: got the unknown field {field[:80]!r}; allowed: {', '.join(allowed)}")


def _no_number(text: str) -> NoReturn:
    raise ValueError(text)
