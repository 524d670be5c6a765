"""Reading bodies of JSON: nearly all of a large one is a screenshot in base64, one string."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic_core import from_json


class JsonRoute(APIRoute):
    """A route whose body is read by pydantic's parser, which copies a long string once and is much faster than json."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return answer


class _JsonRequest(Request):
    async def json(self) -> Any:
        try:
            return from_json(await self.body())
        except ValueError:
            return await super().json()  # takes more, such as UTF-16, and says what is wrong at which character
