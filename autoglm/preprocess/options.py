"""The kinds of request options. Each checks values and describes the accepted ones, in words and as JSON Schema.

An option is a dataclass field declared by `option`: name, kind, default and description. The checks, the gateway's
schema, the packed sampling metadata and the table in docs/api.md derive from these declarations.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol

from autoglm.errors import RequestError, invalid, printable
from autoglm.kernels.sampling_metadata import Column


class Kind(Protocol):
    """A type of option. `accepted` describes the accepted values in words, `schema` as JSON Schema."""

    @property
    def accepted(self) -> str: ...
    @property
    def schema(self) -> dict[str, Any]: ...
    def check(self, name: str, value: Any) -> Any:
        """The value in the engine's form. Raises RequestError if it is not accepted."""


@dataclass(frozen=True)
class Number:
    """A finite number. above: `low` itself is excluded."""

    low: float
    high: float
    above: bool = False
    noun: ClassVar[str] = "a number"
    types: ClassVar[tuple[type, ...]] = (int, float)  # accepted; the last one is the engine's

    @property
    def accepted(self) -> str:
        return f"above {self.low} and at most {self.high}" if self.above else f"between {self.low} and {self.high}"

    @property
    def schema(self) -> dict[str, Any]:
        return {
            "type": self.noun.split()[1],
            "exclusiveMinimum" if self.above else "minimum": self.low,
            "maximum": self.high,
        }

    def check(self, name: str, value: Any) -> Any:
        if type(value) not in self.types or value != value:  # NaN
            raise invalid(name, value, f"{self.noun} {self.accepted}")
        if not self.low <= value <= self.high or (self.above and value == self.low):
            raise invalid(name, value, self.accepted)
        return self.types[-1](value)


class Integer(Number):
    """An integer."""

    noun = "an integer"
    types = (int,)


@dataclass(frozen=True)
class Boolean:
    accepted = "true or false"
    schema = {"type": "boolean"}  # noqa: RUF012

    def check(self, name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise invalid(name, value, self.accepted)
        return value


@dataclass(frozen=True)
class Choice:
    values: tuple[str, ...]

    @property
    def accepted(self) -> str:
        return f"one of {', '.join(self.values)}"

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.values)}

    def check(self, name: str, value: Any) -> str:
        if value not in self.values:
            raise invalid(name, value, self.accepted)
        return value  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Strings:
    """A string or a list of at most `most`; a list may be JSON text, because Triton's parameters cannot hold lists."""

    most: int

    @property
    def accepted(self) -> str:
        return f"a non-empty string or a JSON list of at most {self.most} of them"

    @property
    def schema(self) -> dict[str, Any]:
        one = {"type": "string", "minLength": 1}
        return {"anyOf": [one, {"type": "array", "items": one, "maxItems": self.most}]}

    def check(self, name: str, value: Any) -> tuple[str, ...]:
        strings = _parse_list(value)
        strings = [value] if strings is None else strings
        if not all(isinstance(each, str) and each for each in strings) or len(strings) > self.most:
            raise invalid(name, value, self.accepted)
        return tuple(strings)


@dataclass(frozen=True)
class TokenIds:
    """A token id or a list of them; a list may be JSON text."""

    accepted = "a JSON list of token ids such as [1,2]"
    schema = {"type": "array", "items": {"type": "integer", "minimum": 0}}  # noqa: RUF012

    def check(self, name: str, value: Any) -> tuple[int, ...]:
        ids = [value] if type(value) is int else _parse_list(value)
        if ids is None or not all(type(each) is int and each >= 0 for each in ids):
            raise invalid(name, value, self.accepted)
        return tuple(ids)


@dataclass(frozen=True)
class JsonText:
    """JSON text, checked and converted by `read`."""

    read: Callable[[str, Any], str | None]
    accepted = "a JSON object as text"
    schema = {"type": "string"}  # noqa: RUF012

    def check(self, name: str, value: Any) -> str | None:
        return self.read(name, value)


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a request.

    name, aliases: names of the request parameter.
    column: its column in the sampling metadata, if the sampling kernel reads it.
    """

    name: str
    default: Any
    kind: Kind
    description: str
    aliases: tuple[str, ...] = ()
    column: Column | None = None


def option(default: Any, kind: Kind, description: str, **others: Any) -> Any:
    """Declare an `Option` as a dataclass field; its name is the field's unless `others` has another one."""
    return field(default=default, metadata={"kind": kind, "description": description, **others})


def options(table: type[Any]) -> dict[str, Option]:
    """The options of a dataclass, by field name."""
    return {
        each.name: Option(**{"name": each.name, "default": each.default, **each.metadata}) for each in fields(table)
    }


def read_options(table: type[Any], parameters: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the fields set by a request's parameters, checked. None counts as absent; unknown names are skipped.

    Raises:
        RequestError: a value is not accepted.
    """
    for name, each in options(table).items():
        for key in (each.name, *each.aliases):
            if parameters.get(key) is not None:
                yield name, each.kind.check(key, parameters[key])


def check_names(parameters: Mapping[str, Any], *tables: type[Any]) -> None:
    """Raise RequestError for a parameter that is in none of the tables."""
    known = [key for table in tables for each in options(table).values() for key in (each.name, *each.aliases)]
    for name in parameters:
        if name not in known:
            raise RequestError(f"{printable(name)} is not a known parameter (accepted: {', '.join(known)})")


def _parse_list(value: Any) -> list[Any] | None:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, list) else None
