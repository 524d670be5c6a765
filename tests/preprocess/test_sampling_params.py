"""Options of a request: accepted forms and defaults. What is refused is tested on the real server."""

import pytest

from autoglm.errors import RequestError
from autoglm.preprocess.sampling_params import DEFAULT_PRIORITY, SamplingParams


def test_defaults_are_greedy() -> None:
    params = SamplingParams.from_parameters({}, {"do_sample": False, "temperature": 0.8, "top_p": 0.6})
    assert (params.temperature, params.top_p, params.stream, params.priority) == (0.0, 1.0, True, DEFAULT_PRIORITY)


def test_checkpoints_defaults_hold_where_it_samples() -> None:
    defaults = {"do_sample": True, "temperature": 0.8, "top_p": 0.6, "top_k": 2, "eos_token_id": [1]}
    params = SamplingParams.from_parameters({"top_p": 0.9}, defaults)
    assert (params.temperature, params.top_p, params.top_k) == (0.8, 0.9, 2)


def test_forms() -> None:
    params = SamplingParams.from_parameters(
        {"stop": '["a", "b"]', "stop_token_ids": "[3]", "temperature": 1, "timeout": 5, "request_priority": 2}, {}
    )
    assert params.stop == ("a", "b")
    assert params.stop_token_ids == (3,)
    assert (params.temperature, params.timeout_us, params.priority) == (1.0, 5, 2)
    assert [SamplingParams.from_parameters({"logprobs": n}, {}).logprobs for n in (None, 0, 20)] == [None, 0, 20]
    assert SamplingParams.from_parameters({"stop": "[not json"}, {}).stop == ("[not json",)
    assert SamplingParams.from_parameters({"stop": ["x"], "seed": None, "priority": 0}, {}).stop == ("x",)


def test_deep_nesting_is_text() -> None:
    assert SamplingParams.from_parameters({"stop": "[" * 100_000}, {}).stop == ("[" * 100_000,)


@pytest.mark.parametrize("value", ["", "[1]", '["a", 1]', '[""]', str(list("abcdefghijklmnopq"))])
def test_bad_stops(value: str) -> None:
    with pytest.raises(RequestError, match="stop"):
        SamplingParams.from_parameters({"stop": value.replace("'", '"')}, {})
