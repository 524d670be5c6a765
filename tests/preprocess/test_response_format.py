"""The option `response_format`: accepted forms and errors."""

import json
from typing import Any

import pytest

from autoglm.errors import RequestError
from autoglm.preprocess.response_format import MAX_CHARACTERS
from autoglm.preprocess.sampling_params import SamplingParams

SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}


def read(value: Any) -> str | None:
    return SamplingParams.from_parameters({"response_format": value}, {}).response_format


def schema(**fields: Any) -> str:
    return json.dumps({"type": "json_schema", "json_schema": {"schema": SCHEMA, **fields}})


def test_forms() -> None:
    assert SamplingParams.from_parameters({}, {}).response_format is None
    assert read('{"type": "text"}') is None
    assert read(' {"type" : "json_object"}') == '{"type":"json_object"}'
    assert read('{"type": "phone_action"}') == '{"type":"phone_action"}'


def test_fields_without_effect_do_not_change_the_grammar() -> None:
    canonical = read(schema())
    assert canonical == read(schema(name="screen-1", description="a screen", strict=True)) == read(schema(name=None))
    assert canonical is not None
    assert json.loads(canonical) == {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    assert canonical.index('"b"') < canonical.index('"a"')  # the order of properties is that of the answer


ANY_TYPE = "response_format must be an object whose type is one of text, json_object, json_schema, phone_action"
REFUSED: list[tuple[Any, str]] = [
    (7, "response_format must be a JSON object as text (got 7)"),
    ("", "response_format must be a JSON object as text (got '')"),
    ("phone_action", "response_format must be a JSON object as text (got 'phone_action')"),
    ("[" * 90_000, "response_format must be a JSON object as text (got '["),
    (
        "x" * (MAX_CHARACTERS + 1),
        f"response_format must be at most {MAX_CHARACTERS} characters long (got {MAX_CHARACTERS + 1} characters)",
    ),
    ("[]", f"{ANY_TYPE} (got '[]')"),
    ('{"type": "grammar"}', f"{ANY_TYPE} (got "),
    ('{"type": ["text"]}', f"{ANY_TYPE} (got "),
    ('{"type": "text", "x": 1}', "response_format.x is not a known field (accepted: type)"),
    (
        '{"type": "phone_action", "json_schema": {}}',
        "response_format.json_schema is not a known field (accepted: type)",
    ),
    ('{"type": "json_schema"}', "response_format.json_schema is missing"),
    ('{"type": "json_schema", "json_schema": 1}', "response_format.json_schema must be a JSON object (got 1)"),
    ('{"type": "json_schema", "json_schema": {}}', "response_format.json_schema.schema is missing"),
    (schema(schema=[]), "response_format.json_schema.schema must be a JSON object (got [])"),
    (schema(name="a b"), "response_format.json_schema.name must be 1 to 64 letters, digits, underscores or hyphens"),
    (schema(name="a\n"), "response_format.json_schema.name must be"),
    (schema(strict=1), "response_format.json_schema.strict must be true or false (got 1)"),
    (schema(description=[]), "response_format.json_schema.description must be a string (got [])"),
    (schema(default=float("nan")), "response_format must be a JSON object as text (got "),
    (
        schema(root=1),
        "response_format.json_schema.root is not a known field (accepted: name, description, schema, strict)",
    ),
]


@pytest.mark.parametrize(("value", "message"), REFUSED, ids=[message[16:60] for _, message in REFUSED])
def test_the_error_names_the_field(value: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        read(value)
    assert caught.value.message.startswith(message)
    assert len(caught.value.message) < 300
