"""The choices of a request, with a backend whose responses are scripted."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from autoglm_client import RequestTimeout, ServerUnavailable
from autoglm_client.result import Response

from gateway.backend import TritonBackend
from gateway.chat_input import ChatInput, from_prompt
from gateway.errors import ApiError
from gateway.generation import ChoiceGenerator
from gateway.metrics import GatewayMetrics
from gateway.schema import CompletionRequest

USAGE = json.dumps({"prompt_tokens": 3, "completion_tokens": 2})
LAST = Response("!", finish_reason="stop", usage=USAGE)
Batches = list[list[tuple[int, Response]]]


@dataclass
class FakeBackend:
    """script: the responses to a seed; an exception is raised, a float is a pause in seconds."""

    script: Callable[[int], list[Response | Exception | float]]
    calls: list[tuple[dict[str, Any], str, float]] = field(default_factory=list)
    closed: list[int] = field(default_factory=list)

    async def generate(
        self, chat: ChatInput, parameters: dict[str, Any], request_id: str, *, stream: bool, timeout: float
    ) -> AsyncGenerator[Response, None]:
        self.calls.append((parameters, request_id, timeout))
        try:
            for step in self.script(parameters["seed"]):
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    yield step
        finally:
            self.closed.append(parameters["seed"])


def run(
    backend: FakeBackend, body: dict[str, Any], metrics: GatewayMetrics | None = None, num_batches: int = 1000
) -> Batches:
    """The first `num_batches` batches of a request with seed 0."""

    async def collect() -> Batches:
        generator = ChoiceGenerator(cast(TritonBackend, backend), metrics or GatewayMetrics(), timeout_s=60)
        request = CompletionRequest(prompt="hello", seed=0, **body)
        batches: Batches = []
        async with aclosing(generator.responses(from_prompt("hello"), request, "id")) as responses:
            async for batch in responses:
                batches.append(batch)
                if len(batches) == num_batches:
                    break
        return batches

    return asyncio.run(collect())


def test_responses_that_are_ready_form_one_batch() -> None:
    backend = FakeBackend(lambda seed: [Response("a"), 0.05 * (seed + 1), LAST])
    first, *others = run(backend, {"n": 2})
    assert first == [(0, Response("a")), (1, Response("a"))]
    assert others == [[(0, LAST)], [(1, LAST)]]
    assert sorted(backend.closed) == [0, 1]


def test_every_choice_has_an_id_and_a_seed_of_its_own() -> None:
    backend = FakeBackend(lambda seed: [LAST])
    for _ in range(2):
        run(backend, {"n": 4})
    assert [parameters["seed"] for parameters, _, _ in backend.calls] == [0, 1, 2, 3] * 2
    ids = [request_id for _, request_id, _ in backend.calls]
    assert len(set(ids)) == 8
    assert all(request_id.startswith("id/") for request_id in ids)


@pytest.mark.parametrize(("timeout", "sent"), [(None, 60), (5, 5), (100, 60)])
def test_the_shorter_timeout_is_sent(timeout: float | None, sent: float) -> None:
    backend = FakeBackend(lambda seed: [LAST])
    run(backend, {"timeout": timeout})
    assert backend.calls[0][2] == sent


def test_closing_stops_every_choice() -> None:
    backend = FakeBackend(lambda seed: [Response("a"), 60.0])
    run(backend, {"n": 3}, num_batches=1)
    assert sorted(backend.closed) == [0, 1, 2]


def test_an_error_follows_the_responses_before_it_and_stops_the_other_choices() -> None:
    backend = FakeBackend(lambda seed: [Response("a"), 60.0] if seed else [Response("b"), ServerUnavailable("full")])
    batches: Batches = []

    async def collect() -> None:
        generator = ChoiceGenerator(cast(TritonBackend, backend), GatewayMetrics(), timeout_s=60)
        request = CompletionRequest(prompt="hello", seed=0, n=2)
        async for batch in generator.responses(from_prompt("hello"), request, "id"):
            batches.append(batch)

    with pytest.raises(ApiError) as caught:
        asyncio.run(collect())
    assert (caught.value.status, caught.value.message) == (503, "full")
    assert batches == [[(0, Response("b")), (1, Response("a"))]]
    assert sorted(backend.closed) == [0, 1]


@pytest.mark.parametrize(("timeout", "status", "param"), [(5, 408, "timeout"), (100, 504, None), (None, 504, None)])
def test_only_the_callers_own_timeout_is_the_callers_error(
    timeout: float | None, status: int, param: str | None
) -> None:
    with pytest.raises(ApiError) as caught:
        run(FakeBackend(lambda seed: [RequestTimeout("late")]), {"timeout": timeout})
    assert (caught.value.status, caught.value.code, caught.value.param) == (status, "timeout", param)


def test_metrics_count_tokens_of_all_choices_and_one_first_token() -> None:
    metrics = GatewayMetrics()
    run(FakeBackend(lambda seed: [Response("a"), 0.0, LAST]), {"n": 2}, metrics)
    page = metrics.page().decode()
    assert "autoglm_gateway_prompt_tokens_total 6.0" in page
    assert "autoglm_gateway_completion_tokens_total 4.0" in page
    assert "autoglm_gateway_first_token_seconds_count 1.0" in page
