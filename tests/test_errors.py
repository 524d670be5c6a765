"""Error codes and messages."""

import math
from datetime import date
from typing import Any

import pytest

from autoglm.errors import MAX_SHOWN, ErrorCode, RequestError, Verbatim, invalid, shorten


def test_every_code_has_an_http_status_and_a_triton_code() -> None:
    for code in ErrorCode:
        assert 400 <= code.http_status < 600
        assert code.triton_name.isupper()
    assert (ErrorCode.INVALID_ARGUMENT.http_status, ErrorCode.INVALID_ARGUMENT.triton_name) == (400, "INVALID_ARG")
    assert ErrorCode.CANCELLED.triton_name == "CANCELLED"


def test_the_default_code_is_invalid_argument() -> None:
    assert RequestError("x").code is ErrorCode.INVALID_ARGUMENT
    assert str(RequestError("x", ErrorCode.INTERNAL)) == "x"


def test_a_message_names_field_accepted_values_and_value() -> None:
    assert invalid("top_p", 7, "between 0 and 1").message == "top_p must be between 0 and 1 (got 7)"
    assert invalid("role", "robot", "user").message == "role must be user (got 'robot')"
    assert invalid("IMAGES", Verbatim("3 images"), "at most 2").message == "IMAGES must be at most 2 (got 3 images)"


def test_long_values_are_shortened() -> None:
    assert len(shorten("x" * 10**7)) == MAX_SHOWN
    assert shorten("x" * 10**7).endswith("...")
    assert len(shorten(list(range(1000)))) == MAX_SHOWN
    assert shorten("x" * (MAX_SHOWN - 2)) == f"'{'x' * (MAX_SHOWN - 2)}'"
    circular: list[Any] = []
    circular.append(circular)
    assert shorten(circular) == "[" * (MAX_SHOWN - 3) + "..."


@pytest.mark.parametrize(("value", "shown"), [
    ("it's", "'it's'"), ("a\nb\\n\u2028", r"'a\nb\\n\u2028'"), ("\ud800 \u4f60\u597d", "'\\ud800 \u4f60\u597d'"),
    (b"\x89PNG", "4 bytes"), (True, "true"), (None, "null"), (2.0, "2.0"), (math.nan, "NaN"), (-math.inf, "-Infinity"),
    ([1, None, "x\n"], r'[1, null, "x\n"]'), ({"a": True}, '{"a": true}'), (date(2026, 1, 31), '"2026-01-31"'),
])  # fmt: skip
def test_values_are_shown_as_json_and_text_in_single_quotes(value: object, shown: str) -> None:
    assert shorten(value) == shown
