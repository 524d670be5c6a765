"""A request on its way, over asyncio."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc

from autoglm_client import wire

STOP_EVERY = 0.05  # seconds between two stop requests
STOP_SECONDS = 2.0  # how long a request that has been left is told to stop


class OpenCall:
    """One request's gRPC call, which stays open until the server has ended the request.

    An ensemble does not tell its last step that its caller has gone, so that step is told directly (`end`). A call that
    is cancelled while the ensemble is at work can crash Triton before 24.12, so nothing here cancels it before that.
    Messages are taken in as they come, whoever reads them when.

    Args:
        stub: of the server's gRPC service.
        timeout: seconds for the call.
    """

    def __init__(self, stub: Any, request: Any, timeout: float) -> None:
        self._stub = stub
        self._request_id: str = request.id
        self._call = stub.ModelStreamInfer(iter([request]), timeout=timeout)
        self._messages: asyncio.Queue[Any] = asyncio.Queue()
        # In a task of its own, because grpc cancels a call whose reading is cancelled.
        self._receiving = asyncio.ensure_future(self._receive())
        self._receiving.add_done_callback(lambda task: task.cancelled() or task.exception())  # not to be complained of

    async def read(self) -> Any:
        """The next message, None behind the last one. Who is cancelled in here may read on, or `end` the call.

        Raises:
            grpc.RpcError: the call has failed.
            asyncio.CancelledError: the call has been cancelled.
        """
        message = await self._messages.get()
        if message is not None:
            return message
        self._messages.put_nowait(None)  # for who reads on
        return self._receiving.result()

    async def end(self) -> bool:
        """Stop the request, which nobody waits for any more; whether the server has ended it in time."""
        try:
            await asyncio.wait_for(self._stop(), STOP_SECONDS)
        except (TimeoutError, asyncio.TimeoutError, asyncio.CancelledError):
            return False
        finally:
            self._call.cancel()
        return True

    async def _receive(self) -> None:
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                self._messages.put_nowait(message)
        finally:
            self._messages.put_nowait(None)  # who is woken by it finds this task done

    async def _stop(self) -> None:
        # Before the request has reached the last step, that knows of none.
        while not await self._send_stop() and not self._call.done():
            await asyncio.sleep(STOP_EVERY)
        await asyncio.wait([self._receiving])

    async def _send_stop(self) -> bool:
        """Whether the request was there to be stopped."""
        call = self._stub.ModelStreamInfer(iter([wire.stop_request(self._request_id)]), timeout=STOP_SECONDS)
        with contextlib.suppress(grpc.RpcError):  # the server is gone
            return not [message async for message in call if message.error_message]
        return False
