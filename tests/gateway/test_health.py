"""Readiness, with a fake server."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import TypeVar

from gateway.backend import TritonBackend
from gateway.chat_input import from_prompt
from gateway.health import ReadinessProbe
from tests.client.fake_server import FakeServer, inputs, parameters

T = TypeVar("T")


def with_backend(address: str, use: Callable[[TritonBackend], Awaitable[T]]) -> T:
    async def run() -> T:
        backend = TritonBackend(address)
        try:
            return await use(backend)
        finally:
            await backend.aclose()

    return asyncio.run(run())


def test_a_probe_generates_one_token(fake: FakeServer) -> None:
    async def probe(backend: TritonBackend) -> None:
        assert await ReadinessProbe(backend, valid_s=60).fault() is None

    with_backend(fake.url, probe)
    sent = fake.requests[-1]
    assert (inputs(sent)["PROMPT"], sent.id[:6]) == ([b"ready"], "ready-")
    assert parameters(sent) == {"stream": False, "timeout": 10_000_000, "max_tokens": 1, "request_priority": 1}


def test_an_answer_proves_readiness_for_a_while(fake: FakeServer) -> None:
    async def count(backend: TritonBackend) -> tuple[int, int, int]:
        first = len(fake.requests)
        async for _ in backend.generate(from_prompt("hello"), {}, "some-id", stream=False, timeout=5):
            pass
        long, short = ReadinessProbe(backend, valid_s=60), ReadinessProbe(backend, valid_s=0.05)
        assert await long.fault() is None
        assert await short.fault() is None
        recent = len(fake.requests) - first
        await asyncio.sleep(0.1)
        assert await long.fault() is None
        still_recent = len(fake.requests) - first
        assert await short.fault() is None
        return recent, still_recent, len(fake.requests) - first

    assert with_backend(fake.url, count) == (1, 1, 2)


def test_concurrent_callers_share_a_probe(fake: FakeServer) -> None:
    async def ask(backend: TritonBackend) -> list[str | None]:
        probe = ReadinessProbe(backend, valid_s=60)
        return await asyncio.gather(*(probe.fault() for _ in range(5)))

    first = len(fake.requests)
    assert with_backend(fake.url, ask) == [None] * 5
    assert len(fake.requests) == first + 1


def test_a_caller_that_is_cancelled_does_not_cancel_the_probe_of_the_others(fake: FakeServer) -> None:
    async def ask(backend: TritonBackend) -> str | None:
        probe = ReadinessProbe(backend, valid_s=60)
        first, second = asyncio.create_task(probe.fault()), asyncio.create_task(probe.fault())
        await asyncio.sleep(0)
        first.cancel()
        return await second

    assert with_backend(fake.url, ask) is None


def test_a_server_that_is_down_and_comes_back() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    async def ask(backend: TritonBackend) -> None:
        probe = ReadinessProbe(backend, valid_s=60)
        fault = await probe.fault()
        assert fault and fault.startswith(f"no server at {address}")
        with FakeServer(address):
            end = asyncio.get_running_loop().time() + 5
            while await probe.fault() is not None:
                assert asyncio.get_running_loop().time() < end
                await asyncio.sleep(0.05)

    with_backend(address, ask)
