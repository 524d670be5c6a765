"""Sampling options of one request: what they are called, which values they take, what is the default."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from autoglm.errors import RequestError, invalid
from autoglm.preprocess.response_format import read_response_format

DEFAULT_PRIORITY = 5
LOWEST_PRIORITY = 10
MAX_STOPS = 16
MAX_LOGPROBS = 20
LEAST_SPARSE_RATIO = 0.01

# What preprocess reads of a request: how images are resized, how sound is heard.
MEDIA_PARAMETERS = ("max_pixels", "min_pixels", "audio_mode")

SparseMode = Literal["off", "topk", "pages", "snap", "prune"]


@dataclass(frozen=True)
class SamplingParams:
    """Checked options. Temperature 0 is greedy; `top_k` 0 keeps all; `max_tokens` None takes the server's default.

    Penalties follow their usual definitions: frequency and presence count the answer's tokens, repetition the
    prompt's too. `priority` 1 is the most urgent, 10 the least. `timeout_us` counts from the request's arrival.
    `sparse_mode` and `sparse_ratio` None take the server's (see `autoglm.llm.sparse.policy`). `response_format` is what
    `read_response_format` returns. `logprobs` is how many alternatives come with each token's log probability; None:
    not even that.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    stream: bool = True
    priority: int = DEFAULT_PRIORITY
    timeout_us: int | None = None
    sparse_mode: SparseMode | None = None
    sparse_ratio: float | None = None
    response_format: str | None = None
    logprobs: int | None = None

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any], defaults: Mapping[str, Any]) -> "SamplingParams":
        """Check a request's parameters.

        Args:
            parameters: as they came, by name. None counts as absent; those of MEDIA_PARAMETERS are passed over.
            defaults: the checkpoint's generation_config.json; its sampling values hold if it asks for sampling.

        Raises:
            RequestError: an unknown name, a wrong type or a value out of range.
        """
        values: dict[str, Any] = {}
        if defaults.get("do_sample"):
            values = {key: defaults[key] for key in ("temperature", "top_p", "top_k") if defaults.get(key) is not None}
        if defaults.get("repetition_penalty") is not None:
            values["repetition_penalty"] = defaults["repetition_penalty"]
        for name, value in parameters.items():
            if name in MEDIA_PARAMETERS:
                continue
            if name not in CHECKS:
                allowed = ", ".join((*CHECKS, *MEDIA_PARAMETERS))
                raise RequestError(f"parameter {name!r} is unknown, allowed are {allowed}")
            if value is None:
                continue
            values[FIELDS.get(name, name)] = CHECKS[name](name, value)
        return cls(**values)


def _integer(low: int, high: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise invalid(name, value, f"an integer from {low} to {high}")
        return value

    return check


def _number(low: float, high: float, above: bool = False) -> Callable[[str, Any], float]:
    allowed = f"a number {'above' if above else 'from'} {low} {'up ' if above else ''}to {high}"

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise invalid(name, value, allowed)
        if not low <= value <= high or (above and value == low):
            raise invalid(name, value, allowed)
        return float(value)

    return check


def _priority(name: str, value: Any) -> int:
    """Triton's 0 stands for no choice."""
    return _integer(0, LOWEST_PRIORITY)(name, value) or DEFAULT_PRIORITY


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise invalid(name, value, "true or false")
    return value


def _sparse_mode(name: str, value: Any) -> SparseMode:
    allowed = get_args(SparseMode)
    if value not in allowed:
        raise invalid(name, value, f"one of {', '.join(allowed)}")
    return value  # type: ignore[no-any-return]


def _stops(name: str, value: Any) -> tuple[str, ...]:
    """A string, or a list of strings; Triton's parameters cannot hold lists, so a list also comes as JSON text."""
    stops = _parse_list(value)
    stops = [value] if stops is None else stops
    if not all(isinstance(stop, str) and stop for stop in stops) or len(stops) > MAX_STOPS:
        raise invalid(name, value, f"a non-empty string or a JSON list of at most {MAX_STOPS} of them")
    return tuple(stops)


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    ids = [value] if type(value) is int else _parse_list(value)
    if ids is None or not all(type(i) is int and i >= 0 for i in ids):
        raise invalid(name, value, "a JSON list of token ids such as [1,2]")
    return tuple(ids)


def _parse_list(value: Any) -> list[Any] | None:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, list) else None


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "max_tokens": _integer(1, 2**31 - 1),
    "temperature": _number(0.0, 10.0),
    "top_p": _number(0.0, 1.0, above=True),
    "top_k": _integer(0, 2**31 - 1),
    "min_p": _number(0.0, 1.0),
    "frequency_penalty": _number(-2.0, 2.0),
    "presence_penalty": _number(-2.0, 2.0),
    "repetition_penalty": _number(0.0, 10.0, above=True),
    "seed": _integer(0, 2**63 - 1),
    "stop": _stops,
    "stop_token_ids": _token_ids,
    "ignore_eos": _boolean,
    "stream": _boolean,
    "priority": _priority,
    "request_priority": _priority,
    "timeout": _integer(1, 2**63 - 1),
    "sparse_mode": _sparse_mode,
    "sparse_ratio": _number(LEAST_SPARSE_RATIO, 1.0),
    "response_format": read_response_format,
    "logprobs": _integer(0, MAX_LOGPROBS),
}

# Over gRPC Triton takes a parameter called `priority` for its own scheduler and hides it: hence the second name.
FIELDS = {"request_priority": "priority", "timeout": "timeout_us"}
