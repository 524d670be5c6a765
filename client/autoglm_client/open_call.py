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

    Args:
        stub: of the server's gRPC service.
        timeout: seconds for the call.
    """

    def __init__(self, stub: Any, request: Any, timeout: float) -> None:
        self._stub = stub
        self._request_id: str = request.id
        self._call = stub.ModelStreamInfer(iter([request]), timeout=timeout)
        self._reading = asyncio.Lock()

    async def read(self) -> Any:
        """The next message, None behind the last one. Who is cancelled in here may read on, or `end` the call.

        Raises:
            grpc.RpcError: the call has failed.
            asyncio.CancelledError: the call has been cancelled.
        """
        # Shielded, because grpc cancels a call whose reading is cancelled.
        return await asyncio.shield(self._read())

    async def end(self) -> bool:
        """Stop the request, which nobody waits for any more; whether the server has ended it in time."""
        try:
            await asyncio.wait_for(self._stop_and_read(), STOP_SECONDS)
        except (TimeoutError, asyncio.TimeoutError, asyncio.CancelledError):
            return False
        finally:
            self._call.cancel()
        return True

    async def _read(self) -> Any:
        async with self._reading:
            message = await self._call.read()
        return None if message is grpc.aio.EOF else message

    async def _stop_and_read(self) -> None:
        # Before the request has reached the last step, that knows of none.
        while not await self._send_stop() and not self._call.done():
            await asyncio.sleep(STOP_EVERY)
        with contextlib.suppress(grpc.RpcError):  # an end too
            while await self._read() is not None:
                pass

    async def _send_stop(self) -> bool:
        """Whether the request was there to be stopped."""
        call = self._stub.ModelStreamInfer(iter([wire.stop_request(self._request_id)]), timeout=STOP_SECONDS)
        with contextlib.suppress(grpc.RpcError):  # the server is gone
            return not [message async for message in call if message.error_message]
        return False
