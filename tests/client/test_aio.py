"""The asyncio client against a fake Triton server."""

import asyncio
import gc
import socket
from collections.abc import Awaitable, Callable

import pytest
from autoglm_client import (
    AsyncClient,
    AutoGLMError,
    Cancelled,
    InvalidRequest,
    Point,
    RequestTimeout,
    ServerUnavailable,
    Tap,
    wire,
)
from autoglm_client.open_call import OpenCall

from tests.client.fake_server import ANSWER, FakeServer
from tests.client.test_client import FAULTS


def with_client(fake: FakeServer, use: Callable[[AsyncClient], Awaitable[None]], **options: float) -> None:
    async def run() -> None:
        async with AsyncClient(fake.url, **options) as client:
            await use(client)

    asyncio.run(run())


async def was_stopped(fake: FakeServer, request_id: str) -> bool:
    return await asyncio.to_thread(fake.was_stopped, request_id)


def test_streams_pieces_and_then_the_result(fake: FakeServer) -> None:
    async def use(client: AsyncClient) -> None:
        async with client.stream(prompt="打开设置") as stream:
            pieces = [piece async for piece in stream]
            result = await stream.result()
        assert [piece.text for piece in pieces] == ANSWER
        assert (result.thought, result.action) == ("点设置", Tap(Point(517, 233)))
        assert result.usage.image_tokens == 32
        assert not fake.stopped[result.request_id].is_set()

    with_client(fake, use)


def test_generate_requests_a_single_response(fake: FakeServer) -> None:
    async def use(client: AsyncClient) -> None:
        assert await client.is_ready()
        result = await client.generate(prompt="打开设置", images=[b"x"], request_id="mine", max_tokens=3)
        assert (result.text, result.request_id) == ("".join(ANSWER), "mine")

    with_client(fake, use)
    assert not fake.requests[0].parameters["stream"].bool_param
    assert fake.requests[0].parameters["max_tokens"].int64_param == 3


@pytest.mark.parametrize(("prompt", "kind", "message"), FAULTS, ids=[prompt[:30] for prompt, _, _ in FAULTS])
def test_failures_raise_their_exceptions(fake: FakeServer, prompt: str, kind: type[AutoGLMError], message: str) -> None:
    async def use(client: AsyncClient) -> None:
        stream = client.stream(prompt=prompt)
        for _ in range(2):
            with pytest.raises(kind, match=message):
                await stream.result()
        with pytest.raises(InvalidRequest):
            await client.generate()
        assert (await client.generate(prompt="still there")).finish_reason == "stop"

    with_client(fake, use)


def test_a_refused_connection_fails_immediately() -> None:
    async def use() -> None:
        async with AsyncClient(server) as client:
            assert not await client.is_ready()
            with pytest.raises(ServerUnavailable, match=rf"^no server at {server} \(Connection refused\)$"):
                await client.generate(prompt="a")

    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        server = f"127.0.0.1:{reserved.getsockname()[1]}"
        asyncio.run(use())


def test_timeouts(fake: FakeServer) -> None:
    async def use(client: AsyncClient) -> None:
        stream = client.stream(prompt="silent", first_piece_timeout=0.1)
        with pytest.raises(
            RequestTimeout, match=r"^first_piece_timeout of 0\.1 s expired before the first piece arrived$"
        ):
            await stream.__anext__()
        assert await was_stopped(fake, stream.request_id)

        stream = client.stream(prompt="endless", first_piece_timeout=0.2)
        assert [(await stream.__anext__()).text for _ in range(20)] == ["字"] * 20  # 0.4 seconds

        stream = client.stream(prompt="endless", timeout=0.2)
        with pytest.raises(RequestTimeout, match="the answer was not complete"):
            await stream.result()
        assert await was_stopped(fake, stream.request_id)
        assert "字" in stream.text

    with_client(fake, use)


def test_cancel_from_another_task(fake: FakeServer) -> None:
    async def use(client: AsyncClient) -> None:
        for prompt in ("endless", "silent"):
            stream = client.stream(prompt=prompt)
            asyncio.get_running_loop().call_later(0.1, stream.cancel)
            with pytest.raises(Cancelled):
                await stream.result()
            assert await was_stopped(fake, stream.request_id)

    with_client(fake, use)


def test_the_call_is_cancelled_if_stop_requests_fail(fake: FakeServer) -> None:
    async def use(client: AsyncClient) -> None:
        stream = client.stream(prompt="deaf", request_id="early")
        while not fake.requests:
            await asyncio.sleep(0.01)
        stream.cancel()
        assert await asyncio.to_thread(fake.was_cancelled, "early")

    with_client(fake, use)


def test_cancelling_the_reading_task_stops_the_request(fake: FakeServer) -> None:
    async def use(client: AsyncClient) -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(client.generate(prompt="silent", request_id="waited"), 0.1)
        assert await was_stopped(fake, "waited")

    with_client(fake, use)


def test_a_call_stays_open_when_its_reading_task_is_cancelled(fake: FakeServer) -> None:
    async def use(client: AsyncClient) -> None:
        for prompt, ends in (("silent", True), ("deaf", False)):
            request = wire.inference_request({}, prompt=prompt, request_id=prompt, stream=True, timeout=10)
            call = OpenCall(client._stub, request, 10)
            reading = asyncio.ensure_future(call.read())
            while request.id not in fake.stopped:
                await asyncio.sleep(0.01)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            assert await call.end() is ends
            assert await was_stopped(fake, request.id)

    with_client(fake, use)


def test_abandoned_streams_stop_their_requests(fake: FakeServer) -> None:
    async def use(client: AsyncClient) -> None:
        async with client.stream(prompt="endless", request_id="block") as stream:
            await stream.__anext__()
        assert await was_stopped(fake, "block")

        async for _ in client.stream(prompt="endless", request_id="loop"):
            break
        gc.collect()
        assert await was_stopped(fake, "loop")
        running = client.stream(prompt="endless", request_id="closed")
        await running.__anext__()
        await client.aclose()
        with pytest.raises(Cancelled):
            await running.__anext__()

    with_client(fake, use)
    assert fake.was_stopped("closed")


def test_one_client_has_many_concurrent_streams(fake: FakeServer) -> None:
    async def use(client: AsyncClient) -> None:
        endless = [client.stream(prompt="endless") for _ in range(8)]
        for stream in endless:
            await stream.__anext__()
        results = await asyncio.gather(*(client.stream(prompt="a", request_id=f"r{n}").result() for n in range(64)))
        assert [r.request_id for r in results] == [f"r{n}" for n in range(64)]
        assert {r.text for r in results} == {"".join(ANSWER)}
        for stream in endless:
            assert (await stream.__anext__()).text == "字"

    with_client(fake, use)
