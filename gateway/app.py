"""The application and its endpoints."""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from aiohttp.abc import AbstractResolver
from autoglm_client import __version__
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from autoglm.config import Config
from autoglm.errors import RequestError, invalid, printable
from gateway.auth import ApiKeys
from gateway.backend import TritonBackend
from gateway.body import JsonRoute
from gateway.chat_input import ChatInput, from_messages, from_prompt
from gateway.errors import ApiError, from_exception, from_validation
from gateway.fetch import ImageFetcher
from gateway.generation import ChoiceGenerator
from gateway.health import ReadinessProbe
from gateway.metrics import GatewayMetrics
from gateway.middleware import RequestMiddleware
from gateway.openapi import add_openapi
from gateway.playground import add_playground
from gateway.responses import EventStreamResponse, ResponseBuilder
from gateway.schema import ChatMessage, ChatRequest, CompletionRequest, GenerationRequest, TokenizeRequest


class Endpoints:
    """The request handlers. `open` and `close` must run in the event loop that serves them.

    Args:
        triton: gRPC address of the server.
        resolver: resolves the hosts of images; default: the system's resolver.
    """

    def __init__(self, triton: str, config: Config, resolver: AbstractResolver | None = None) -> None:
        settings = config.gateway
        folder = Path(settings.image_folder) if settings.image_folder else None
        self._triton = triton
        self._settings = settings
        self._max_audio_bytes = config.audio.max_audio_bytes
        self._started = int(time.time())
        self._fetcher = ImageFetcher(config.limits, settings.image_hosts, folder, resolver)
        self.metrics = GatewayMetrics()

    async def open(self) -> None:
        self._backend = TritonBackend(self._triton, self.metrics.stopped)
        self._generator = ChoiceGenerator(self._backend, self.metrics, self._settings.timeout_s)
        self._readiness = ReadinessProbe(self._backend, self._settings.ready_within_s)

    async def close(self) -> None:
        await self._backend.aclose()
        await self._fetcher.aclose()

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        self._check_model(body.model)
        return await self._generate("chat", request, await self._chat_input(body.messages), body)

    async def complete(self, request: Request, body: CompletionRequest) -> Response:
        self._check_model(body.model)
        return await self._generate("text", request, from_prompt(body.prompt), body)

    async def tokenize(self, request: Request, body: TokenizeRequest) -> Response:
        self._check_model(body.model)
        chat = from_prompt(body.prompt or "") if body.messages is None else await self._chat_input(body.messages)
        try:
            tokens = await self._backend.tokenize(chat, request.state.request_id)
        except Exception as error:
            raise from_exception(error, chat.names) from None
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

    async def _chat_input(self, messages: Sequence[ChatMessage]) -> ChatInput:
        return await from_messages(messages, self._fetcher, self._max_audio_bytes)

    async def _generate(
        self, kind: Literal["chat", "text"], request: Request, chat: ChatInput, body: GenerationRequest
    ) -> Response:
        builder = ResponseBuilder(kind, request.state.request_id, self._settings.model_name, body.wants_usage)
        responses = self._generator.responses(chat, body, builder.id)
        if not body.stream:
            return JSONResponse(await builder.whole(responses))
        events = builder.events(responses)
        # Wait for the first event, so that a refused request gets the status of its error.
        return EventStreamResponse(events, await anext(events))

    def _check_model(self, name: str | None) -> None:
        ours = self._settings.model_name
        if name not in (None, ours):
            raise ApiError(404, str(invalid("model", name, ours)), "model_not_found", "model")


def create_app(
    triton: str, config: Config, keys: Path | None = None, resolver: AbstractResolver | None = None
) -> FastAPI:
    """The ASGI application. keys: file of API keys; None: no key is required."""
    endpoints = Endpoints(triton, config, resolver)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await endpoints.open()  # a gRPC channel belongs to the event loop that it is created in
        yield
        await endpoints.close()

    app = FastAPI(title="AutoGLM", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.router.route_class = JsonRoute
    app.add_middleware(RequestMiddleware, keys=ApiKeys(keys), config=config.gateway, metrics=endpoints.metrics)
    app.post("/v1/chat/completions")(endpoints.chat)
    app.post("/v1/completions")(endpoints.complete)
    app.get("/v1/models")(endpoints.models)
    app.post("/tokenize")(endpoints.tokenize)
    app.get("/health")(endpoints.health)
    app.get("/ready")(endpoints.ready)
    app.get("/metrics")(endpoints.show_metrics)
    add_playground(app)
    add_openapi(app, config, keys=keys is not None)

    def respond(request: Request, error: Any) -> Response:
        if isinstance(error, RequestValidationError):
            return from_validation(error.errors(), error.body).response()
        if isinstance(error, HTTPException) and not isinstance(error, ApiError):
            path = printable(request.url.path)
            messages = {404: f"no such path: {path}", 405: f"{path} does not allow {request.method}"}
            return ApiError(error.status_code, messages.get(error.status_code, "the body cannot be read")).response()
        return from_exception(error, {}).response()

    for kind in (RequestError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, respond)
    return app
