"""The options of a request: accepted forms, defaults and errors."""

import pytest

from autoglm.errors import RequestError
from autoglm.preprocess.sampling_params import DEFAULT_PRIORITY, MediaOptions, SamplingParams


def test_defaults_are_greedy() -> None:
    params = SamplingParams.from_parameters({}, {"do_sample": False, "temperature": 0.8, "top_p": 0.6})
    assert (params.temperature, params.top_p, params.stream, params.priority) == (0.0, 1.0, True, DEFAULT_PRIORITY)


def test_the_defaults_of_the_checkpoint_apply_if_it_samples() -> None:
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


def test_invalid_json_is_a_string() -> None:
    assert SamplingParams.from_parameters({"stop": "[" * 100_000}, {}).stop == ("[" * 100_000,)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be between 1 and 2147483647 (got 0)"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1 (got 0)"),
        ({"request_priority": 11}, "request_priority must be between 0 and 10 (got 11)"),
        ({"sparse_mode": "snap"}, "sparse_mode must be one of off, topk, pages, prune (got 'snap')"),
        ({"top_n": 1}, "top_n is not a known parameter (accepted: max_tokens, temperature, top_p"),
    ],
)
def test_the_error_names_the_parameter(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams.from_parameters(parameters, {})
    assert caught.value.message.startswith(message)


def test_media_options() -> None:
    assert MediaOptions.from_parameters({"top_p": 7}) == MediaOptions()
    parameters = {"max_pixels": 2000, "min_pixels": 1000, "audio_mode": "bridge"}
    assert MediaOptions.from_parameters(parameters) == MediaOptions(2000, 1000, "bridge")
    assert SamplingParams.from_parameters(parameters, {}) == SamplingParams()
    with pytest.raises(RequestError, match=r"audio_mode must be one of transcript, bridge \(got 'words'\)"):
        MediaOptions.from_parameters({"audio_mode": "words"})


@pytest.mark.parametrize("value", ["", "[1]", '["a", 1]', '[""]', str(list("abcdefghijklmnopq"))])
def test_invalid_stop_strings_are_rejected(value: str) -> None:
    with pytest.raises(RequestError, match="stop"):
        SamplingParams.from_parameters({"stop": value.replace("'", '"')}, {})
