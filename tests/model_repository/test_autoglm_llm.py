"""The language model's adapter with a fake pb_utils: streams, stop requests, rejections, metrics."""

import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import Pair
from tests.model_repository.fake_pb_utils import InferenceRequest, MetricFamily, Tensor, bytes_tensor, load_adapter
from tests.prompts import random_prompt, random_text

GRID = (1, 8, 4)


@pytest.fixture(scope="module")
def model(plain: Pair) -> Iterator[Any]:
    MetricFamily.families.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOGLM_CHECKPOINT", str(plain.checkpoint.path))
        patch.delenv("AUTOGLM_CONFIG", raising=False)
        adapter = load_adapter("autoglm_llm").TritonPythonModel()
        adapter.initialize({"model_name": "autoglm_llm", "model_instance_name": "autoglm_llm_0_0"})
        yield adapter
        adapter.finalize()


def make_request(ids: list[int], inputs: list[Tensor] | None = None, **options: Any) -> InferenceRequest:
    parameters = {"ignore_eos": True, "max_tokens": 6, **options.pop("parameters", {})}
    return InferenceRequest([Tensor("PROMPT_IDS", np.array(ids, np.int32)), *(inputs or [])], parameters, **options)


def finished(request: InferenceRequest) -> list[Any]:
    assert request.sender.finished.wait(20)
    return request.sender.responses


def token_ids(responses: list[Any]) -> list[int]:
    return [id_ for response in responses for id_ in response["TOKEN_IDS"].as_numpy().tolist()]


def test_streams_end_with_finish_reason_and_usage(model: Any) -> None:
    requests = [make_request(random_text(9, seed), timeout=20_000_000) for seed in range(5)]
    assert model.execute(requests) is None
    for request in requests:
        responses = finished(request)
        assert len(token_ids(responses)) == 6
        reasons = [response["FINISH_REASON"].as_numpy()[0] for response in responses]
        assert reasons == [b""] * (len(responses) - 1) + [b"length"]
        usage = json.loads(responses[-1]["USAGE"].as_numpy()[0])
        assert usage["prompt_tokens"] == 9 and usage["completion_tokens"] == 6


def test_responses_have_the_log_probabilities_of_their_tokens(model: Any) -> None:
    request = make_request(random_text(9, 7), parameters={"logprobs": 2})
    model.execute([request])
    for response in finished(request):
        logprobs = response["LOGPROBS"].as_numpy()[0]
        items = json.loads(logprobs) if logprobs else []
        assert len(items) == len(response["TOKEN_IDS"].as_numpy())
        assert all(len(item["top_logprobs"]) == 2 for item in items)


def test_images_reach_the_model(model: Any, plain: Pair) -> None:
    """Other embeddings produce other tokens, and the usage has the times of the earlier stages."""
    prompt = random_prompt(plain.checkpoint, [GRID], 1)
    answers = []
    for seed in range(2):
        features = torch.randn(1, 8, plain.checkpoint.text.hidden_size, generator=torch.Generator().manual_seed(seed))
        inputs = [
            Tensor("IMAGE_GRIDS", np.array([[GRID]], np.int32)),
            bytes_tensor("IMAGE_HASHES", [f"hash {seed}"], (1, 1)),
            Tensor.from_dlpack("IMAGE_EMBEDDINGS", features.bfloat16().__dlpack__()),
            Tensor("PREPROCESS_MS", np.array([1.5], np.float32)),
            Tensor("VISION_MS", np.array([[2.5]], np.float32)),
        ]
        request = make_request(prompt, inputs, parameters={"max_tokens": 20})
        model.execute([request])
        responses = finished(request)
        usage = json.loads(responses[-1]["USAGE"].as_numpy()[0])
        assert (usage["preprocess_ms"], usage["vision_ms"], usage["image_tokens"]) == (1.5, 2.5, 8)
        answers.append(token_ids(responses))
    assert answers[0] != answers[1]


def stop_request(request_id: str) -> InferenceRequest:
    return InferenceRequest([Tensor("PROMPT_IDS", np.zeros(0, np.int32))], {"STOP": True}, request_id)


def assert_forgotten(model: Any, request_id: str) -> None:
    """Stop requests for this id are rejected, soon after the request's last response."""
    end = time.monotonic() + 5
    while True:
        stop = stop_request(request_id)
        model.execute([stop])
        (response,) = finished(stop)
        if response.has_error():
            assert response.error().message().startswith("INVALID_ARGUMENT: id")
            return
        assert time.monotonic() < end, f"{request_id} is still registered as running"


def test_a_stop_request_cancels_the_request_with_its_id(model: Any) -> None:
    running = make_request(random_text(5, 1), parameters={"max_tokens": 5000}, request_id="mine")
    model.execute([running])
    while not running.sender.responses:
        time.sleep(0.005)
    stop = stop_request("mine")
    model.execute([stop])
    assert finished(stop)[0]["FINISH_REASON"].as_numpy()[0] == b"cancelled"
    assert finished(running)[-1]["FINISH_REASON"].as_numpy()[0] == b"cancelled"
    assert_forgotten(model, "mine")


def test_a_cancelled_stream_is_noticed(model: Any) -> None:
    request = make_request(random_text(5, 2), parameters={"max_tokens": 5000})
    model.execute([request])
    request.cancelled = True
    assert finished(request)[-1]["FINISH_REASON"].as_numpy()[0] == b"cancelled"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (make_request([1, 2], parameters={"top_p": 3}, request_id="rejected"), "INVALID_ARGUMENT: top_p"),
        (
            make_request([1, 2], parameters={"response_format": "{}"}, request_id="rejected"),
            "INVALID_ARGUMENT: response_format",
        ),
        (make_request([], request_id="rejected"), "INVALID_ARGUMENT: prompt"),
        (make_request([999_999], request_id="rejected"), "INVALID_ARGUMENT: prompt"),
        (make_request([1], cancelled=True, request_id="rejected"), "CANCELLED"),
        (
            make_request([1], [bytes_tensor("IMAGE_HASHES", ["x"], (1, 1))], request_id="rejected"),
            "INVALID_ARGUMENT: IMAGE_HASHES",
        ),
        (stop_request(""), "INVALID_ARGUMENT: id"),
        (stop_request("rejected"), "INVALID_ARGUMENT: id"),
    ],
)
def test_invalid_requests_are_rejected(model: Any, request_: InferenceRequest, message: str) -> None:
    model.execute([request_])
    (response,) = finished(request_)
    assert response.error().message().startswith(message)
    assert_forgotten(model, "rejected")


def test_an_image_without_embeddings_is_rejected(model: Any, plain: Pair) -> None:
    inputs = [Tensor("IMAGE_GRIDS", np.array([[GRID]], np.int32)), bytes_tensor("IMAGE_HASHES", ["x"], (1, 1))]
    request = make_request(random_prompt(plain.checkpoint, [GRID], 1), inputs)
    model.execute([request])
    assert "embeddings must have a row for each of the 8 image tokens (got 0)" in finished(request)[0].error().message()


def test_one_thread_updates_the_metrics(model: Any) -> None:
    request = make_request(random_text(20, 3))
    model.execute([request])
    finished(request)
    time.sleep(1.2)
    metrics = {name: family.metrics[0] for name, family in MetricFamily.families.items()}
    assert metrics["autoglm_generated_tokens_total"].value() >= 6
    assert metrics["autoglm_kv_blocks"].value() > 0
    assert metrics["autoglm_requests_running"].value() == 0
    assert set().union(*(metric.threads for metric in metrics.values())) == {"metrics"}
