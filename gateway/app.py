"""The routes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from aiohttp.abc import AbstractResolver
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from autoglm.config import Config
from autoglm.errors import RequestError
from gateway.auth import Keys
from gateway.backend import Ensemble
from gateway.body import JsonRoute
from gateway.chat_input import Content, of_chat, of_prompt
from gateway.errors import ApiError, from_fault, from_validation
from gateway.fetch import Fetcher
from gateway.generation import Generation
from gateway.health import Readiness
from gateway.metrics import Metrics
from gateway.middleware import Gate
from gateway.openapi import describe
from gateway.playground import add_page
from gateway.responses import Answer, EventStream
from gateway.schema import ChatRequest, CompletionRequest, Message, Sampling, TokenizeRequest


class Gateway:
    """What answers requests. `open` and `close` it in the event loop that serves it.

    Args:
        triton: gRPC address of the server.
        resolver: looks up the hosts of images, by default as the system does.
    """

    def __init__(self, triton: str, config: Config, resolver: AbstractResolver | None = None) -> None:
        settings = config.gateway
        folder = Path(settings.image_folder) if settings.image_folder else None
        self._triton = triton
        self._settings = settings
        self._max_audio_bytes = config.audio.max_audio_bytes
        self._started = int(time.time())
        self._fetcher = Fetcher(config.limits, settings.image_hosts, folder, resolver)
        self.metrics = Metrics()

    async def open(self) -> None:
        self._ensemble = Ensemble(self._triton, self.metrics.abandoned)
        self._generation = Generation(self._ensemble, self.metrics, self._settings.timeout_s)
        self._readiness = Readiness(self._ensemble, self._settings.ready_within_s)

    async def close(self) -> None:
        await self._ensemble.aclose()
        await self._fetcher.aclose()

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        self._check_model(body.model)
        return await self._answer("chat", request, await self._read(body.messages), body)

    async def complete(self, request: Request, body: CompletionRequest) -> Response:
        self._check_model(body.model)
        return await self._answer("text", request, of_prompt(body.prompt), body)

    async def tokenize(self, request: Request, body: TokenizeRequest) -> Response:
        self._check_model(body.model)
        content = of_prompt(body.prompt or "") if body.messages is None else await self._read(body.messages)
        try:
            tokens = await self._ensemble.tokenize(content, request.state.request_id)
        except Exception as fault:
            raise from_fault(fault, content.names) from None
        return JSONResponse({"count": len(tokens), "tokens": tokens})

    async def models(self) -> Response:
        name = self._settings.model_name
        model = {"id": name, "object": "model", "created": self._started, "owned_by": "autoglm"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(self) -> Response:
        fault = await self._readiness.fault()
        if fault is not None:
            raise ApiError(503, f"not ready: {fault}", "not_ready")
        return JSONResponse({"status": "ready"})

    async def show_metrics(self) -> Response:
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4")

    async def _read(self, messages: Sequence[Message]) -> Content:
        return await of_chat(messages, self._fetcher, self._max_audio_bytes)

    async def _answer(
        self, kind: Literal["chat", "text"], request: Request, content: Content, body: Sampling
    ) -> Response:
        answer = Answer(kind, request.state.request_id, self._settings.model_name, body.wants_usage)
        pieces = self._generation.pieces(content, body, answer.id)
        if not body.stream:
            return JSONResponse(await answer.gather(pieces))
        events = answer.events(pieces)
        # The first event is waited for, so that a request which is refused gets a status that says so.
        return EventStream(events, await anext(events))

    def _check_model(self, name: str | None) -> None:
        ours = self._settings.model_name
        if name not in (None, ours):
            raise ApiError(404, f"model: got {str(name)[:80]!r}; allowed: {ours}", "model_not_found", "model")


def create_app(
    triton: str, config: Config, keys: Path | None = None, resolver: AbstractResolver | None = None
) -> FastAPI:
    """The application for an ASGI server. `keys` is a file of API keys; without one everybody is let in."""
    gateway = Gateway(triton, config, resolver)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await gateway.open()  # gRPC's connection belongs to the event loop in which it is made
        yield
        await gateway.close()

    app = FastAPI(title="AutoGLM", version="0.1.0", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.router.route_class = JsonRoute
    app.add_middleware(Gate, keys=Keys(keys), config=config.gateway, metrics=gateway.metrics)
    app.post("/v1/chat/completions")(gateway.chat)
    app.post("/v1/completions")(gateway.complete)
    app.get("/v1/models")(gateway.models)
    app.post("/tokenize")(gateway.tokenize)
    app.get("/health")(gateway.health)
    app.get("/ready")(gateway.ready)
    app.get("/metrics")(gateway.show_metrics)
    add_page(app)
    describe(app, config, keys=keys is not None)

    def explain(_: Request, fault: Any) -> Response:
        if isinstance(fault, RequestValidationError):
            return from_validation(fault.errors(), fault.body).response()
        if isinstance(fault, HTTPException):
            return ApiError(fault.status_code, str(fault.detail)).response()
        return from_fault(fault, {}).response()

    for kind in (ApiError, RequestError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, explain)
    return app
