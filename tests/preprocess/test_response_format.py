"""What a request may limit its answer to, and what it is told when it is not of that form."""

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


def test_what_shapes_no_answer_makes_no_other_grammar() -> None:
    told = read(schema())
    assert told == read(schema(name="screen-1", description="a screen", strict=True)) == read(schema(name=None))
    assert told is not None and json.loads(told) == {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    assert told.index('"b"') < told.index('"a"')  # an answer has its properties in this order


REFUSED: list[tuple[Any, str]] = [
    (7, "response_format: got 7"),
    ("", "response_format: got ''"),
    ("phone_action", "response_format: got 'phone_action'; allowed: a JSON object"),
    ("[" * 90_000, "response_format: got"),
    ("x" * (MAX_CHARACTERS + 1), f"response_format: got {MAX_CHARACTERS + 1} characters"),
    ("[]", "response_format: got '\\[\\]'; allowed: an object whose type is one of text, json_object, json_schema, ph"),
    ('{"type": "grammar"}', "response_format: got .*; allowed: an object whose type"),
    ('{"type": ["text"]}', "response_format: got .*; allowed: an object whose type"),
    ('{"type": "text", "x": 1}', "response_format: got the unknown field 'x'"),
    ('{"type": "phone_action", "json_schema": {}}', "response_format: got the unknown field 'json_schema'"),
    ('{"type": "json_schema"}', "response_format.json_schema: got None"),
    (schema(schema=[]), r"response_format.json_schema.schema: got \[\]"),
    (schema(name="a b"), "response_format.json_schema.name: got 'a b'"),
    (schema(name="a\n"), "response_format.json_schema.name"),
    (schema(strict=1), "response_format.json_schema.strict: got 1"),
    (schema(description=[]), "response_format.json_schema.description"),
    (schema(default=float("nan")), "response_format: got"),
    (schema(root=1), "response_format.json_schema: got the unknown field 'root'"),
]


@pytest.mark.parametrize(("value", "message"), REFUSED, ids=[message[17:60] for _, message in REFUSED])
def test_refusals_name_what_is_wrong(value: Any, message: str) -> None:
    with pytest.raises(RequestError, match=f"^{message}") as caught:
        read(value)
    assert len(caught.value.message) < 300
