"""The kinds of options: accepted values, errors, and their descriptions."""

from dataclasses import dataclass
from typing import Any

import pytest

from autoglm.errors import RequestError
from autoglm.preprocess.options import (
    Boolean,
    Choice,
    Integer,
    JsonText,
    Kind,
    Number,
    Strings,
    TokenIds,
    check_names,
    option,
    options,
    read_options,
)


@pytest.mark.parametrize(("kind", "value", "expected"), [
    (Integer(1, 9), 9, 9),
    (Number(0, 2), 0, 0.0),
    (Number(0, 2, above=True), 0.5, 0.5),
    (Boolean(), False, False),
    (Choice(("a", "b")), "b", "b"),
    (Strings(2), "[x", ("[x",)),
    (Strings(2), ["x", "y"], ("x", "y")),
    (Strings(2), ' ["x", "y"]', ("x", "y")),
    (TokenIds(), 7, (7,)),
    (TokenIds(), "[7, 0]", (7, 0)),
    (JsonText(lambda name, value: f"{name}={value}"), "{}", "x={}"),
])  # fmt: skip
def test_accepted_values(kind: Kind, value: Any, expected: Any) -> None:
    checked = kind.check("x", value)
    assert checked == expected and type(checked) is type(expected)


@pytest.mark.parametrize(("kind", "value", "message"), [
    (Integer(1, 9), 0, "x must be between 1 and 9 (got 0)"),
    (Integer(1, 9), 10, "x must be between 1 and 9 (got 10)"),
    (Integer(1, 9), True, "x must be an integer between 1 and 9 (got true)"),
    (Integer(1, 9), 2.0, "x must be an integer between 1 and 9 (got 2.0)"),
    (Number(0, 2), 2.1, "x must be between 0 and 2 (got 2.1)"),
    (Number(0, 2, above=True), 0, "x must be above 0 and at most 2 (got 0)"),
    (Number(0, 2), "1", "x must be a number between 0 and 2 (got '1')"),
    (Number(0, 2), float("nan"), "x must be a number between 0 and 2 (got NaN)"),
    (Boolean(), 1, "x must be true or false (got 1)"),
    (Choice(("a", "b")), "c", "x must be one of a, b (got 'c')"),
    (Choice(("a", "b")), ["a"], 'x must be one of a, b (got ["a"])'),
    (Strings(2), "", "x must be a non-empty string or a JSON list of at most 2 of them (got '')"),
    (Strings(2), list("abc"), 'x must be a non-empty string or a JSON list of at most 2 of them (got ["a", "b", "c"])'),
    (TokenIds(), [-1], "x must be a JSON list of token ids such as [1,2] (got [-1])"),
    (TokenIds(), [1, None], "x must be a JSON list of token ids such as [1,2] (got [1, null])"),
    (TokenIds(), "7", "x must be a JSON list of token ids such as [1,2] (got '7')"),
])  # fmt: skip
def test_rejected_values(kind: Kind, value: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        kind.check("x", value)
    assert caught.value.message == message


@dataclass(frozen=True)
class Table:
    first: int = option(3, Integer(1, 9), "The first", aliases=("primary",))
    second_us: float | None = option(None, Number(0, 2, above=True), "The second", name="second")


def test_options_are_listed_by_field() -> None:
    first, second = options(Table).values()
    assert list(options(Table)) == ["first", "second_us"]
    assert (first.name, first.aliases, first.default, first.description) == ("first", ("primary",), 3, "The first")
    assert (second.name, second.default, second.column) == ("second", None, None)
    assert first.kind.schema == {"type": "integer", "minimum": 1, "maximum": 9}
    assert second.kind.schema == {"type": "number", "exclusiveMinimum": 0, "maximum": 2}


def test_parameters_are_read_by_name_and_alias() -> None:
    assert dict(read_options(Table, {})) == {}
    assert Table(**dict(read_options(Table, {"second": 1, "first": None, "other": "x"}))) == Table(3, 1.0)
    assert dict(read_options(Table, {"primary": 4})) == {"first": 4}
    with pytest.raises(RequestError, match=r"^primary must be between 1 and 9 \(got 0\)"):
        dict(read_options(Table, {"primary": 0}))


def test_unknown_parameters_are_rejected_with_the_known_ones() -> None:
    check_names({"first": 1, "primary": 1, "second": 1}, Table)
    with pytest.raises(RequestError) as caught:
        check_names({"second_us": 1}, Table)
    assert caught.value.message == "second_us is not a known parameter (accepted: first, primary, second)"
