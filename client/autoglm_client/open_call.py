"""One request over asyncio."""

import asyncio
import contextlib
from typing import Any

import grpc

from autoglm_client import wire

STOP_INTERVAL = 0.05  # seconds between two stop requests
STOP_SECONDS = 2.0  # after which the call of an abandoned request is cancelled


class OpenCall:
    """The gRPC call of one request, kept open until the server has ended the request.

    An ensemble does not propagate cancellation to its last step, so `end` sends that step a stop request. Cancelling a
    call while its ensemble runs can crash Triton before 24.12, so `end` cancels the call only when the request has
    stopped or STOP_SECONDS have passed. Responses are buffered as they arrive.

    Args:
        stub: of the server's gRPC service.
        timeout: seconds for the call.
    """

    def __init__(self, stub: Any, request: Any, timeout: float) -> None:
        self._stub = stub
        self._request_id: str = request.id
        self._call = stub.ModelStreamInfer(iter([request]), timeout=timeout)
        self._responses: asyncio.Queue[Any] = asyncio.Queue()
        # In a separate task: gRPC cancels a call when a pending read is cancelled.
        self._receiving = asyncio.ensure_future(self._receive())
        self._receiving.add_done_callback(lambda task: task.cancelled() or task.exception())  # mark as retrieved

    async def read(self) -> Any:
        """The next response, None after the last one. A cancelled `read` can be repeated.

        Raises:
            grpc.RpcError: the call failed.
            asyncio.CancelledError: the call was cancelled.
        """
        response = await self._responses.get()
        if response is not None:
            return response
        self._responses.put_nowait(None)  # for the next read
        return self._receiving.result()

    async def end(self) -> bool:
        """Stop the request; returns whether the server ended it within STOP_SECONDS."""
        try:
            await asyncio.wait_for(self._stop(), STOP_SECONDS)
        except (TimeoutError, asyncio.TimeoutError, asyncio.CancelledError):
            return False
        finally:
            self._call.cancel()
        return True

    async def _receive(self) -> None:
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:
                self._responses.put_nowait(response)
        finally:
            self._responses.put_nowait(None)  # its reader runs after this task is done

    async def _stop(self) -> None:
        # The last step does not find a request that has not reached it yet.
        while not await self._send_stop() and not self._call.done():
            await asyncio.sleep(STOP_INTERVAL)
        await asyncio.wait([self._receiving])

    async def _send_stop(self) -> bool:
        """Send one stop request; returns whether the server found the request."""
        call = self._stub.ModelStreamInfer(iter([wire.stop_request(self._request_id)]), timeout=STOP_SECONDS)
        with contextlib.suppress(grpc.RpcError):  # the server is unreachable
            return not [response async for response in call if response.error_message]
        return False
