"""The gateway's schema derives the server's options from their table."""

from dataclasses import make_dataclass
from typing import Any

import pytest
from pydantic import ValidationError, create_model

from autoglm.preprocess.options import Boolean, Choice, Integer, Kind, Number, Strings, TokenIds, option, options
from autoglm.preprocess.sampling_params import MediaOptions, SamplingParams
from gateway.schema import CONVERTED, PARAMETERS, ChatRequest, CompletionRequest, RequestModel, option_fields

TABLE = {each.name: each for table in (SamplingParams, MediaOptions) for each in options(table).values()}
KINDS: list[tuple[Kind, list[Any], list[Any]]] = [
    (Integer(1, 5), [1, 5], [0, 6, 10**400, 1.5, True, "1"]),
    (Number(0, 1), [0, 0.5], [2, "1", True, float("nan")]),
    (Boolean(), [True], [1, "true"]),
    (Choice(("a", "b")), ["a", "c"], [1]),
    (Strings(2), ["x", ["x", "y", "z"]], [1, [1]]),
    (TokenIds(), [[1, -1]], [["1"], 1.5]),
]


@pytest.mark.parametrize("request_model", [ChatRequest, CompletionRequest])
def test_every_option_of_the_table_is_a_field(request_model: type[RequestModel]) -> None:
    properties = request_model.model_json_schema()["properties"]
    assert set(PARAMETERS) | set(CONVERTED) == set(TABLE)
    for name in PARAMETERS:
        schema = TABLE[name].kind.schema
        assert properties[name]["anyOf"] == [*schema.get("anyOf", [schema]), {"type": "null"}]
        assert properties[name]["description"] == TABLE[name].description


@pytest.mark.parametrize(("kind", "accepted", "refused"), KINDS, ids=[type(kind).__name__ for kind, _, _ in KINDS])
def test_numbers_are_checked_by_range_and_other_kinds_by_type(
    kind: Kind, accepted: list[Any], refused: list[Any]
) -> None:
    table = make_dataclass("Table", [("new", Any, option(None, kind, "New"))])
    model: Any = create_model("Model", __base__=RequestModel, **option_fields(options(table).values()))
    for value in (None, *accepted):
        assert vars(model(new=value)) == {"new": value}
    for value in refused:
        with pytest.raises(ValidationError):
            model(new=value)
