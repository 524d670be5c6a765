"""/openapi.json: the fields and their ranges, this server's limits, and all error responses."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from autoglm.config import Config
from gateway.schema import ChatRequest, CompletionRequest, TokenizeRequest

REFERENCE = "#/components/schemas/{model}"
WHITE_IMAGE = (  # 28x28 pixels
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAABwAAAAcAQAAAABaduI5AAAAFElEQVR42mP8z8DwkYmBgYFh4AkAGmgCKKMUpJsAAAAASUVO"
    "RK5CYII="
)
SCREEN = [{"type": "image_url", "image_url": {"url": WHITE_IMAGE}}, {"type": "text", "text": "go back"}]
EXAMPLES: dict[type[BaseModel], dict[str, Any]] = {
    ChatRequest: {"messages": [{"role": "user", "content": SCREEN}], "max_tokens": 32, "temperature": 0},
    CompletionRequest: {"prompt": "go back", "max_tokens": 32, "temperature": 0, "stop": ["."]},
    TokenizeRequest: {"prompt": "go back"},
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": ["invalid_request_error", "server_error"]},
                "param": {"type": ["string", "null"], "description": "path of the invalid field"},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def add_openapi(app: FastAPI, config: Config, *, keys: bool) -> None:
    """Make `app.openapi()` return the document. keys: an API key is required."""
    document: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not document:
            document.update(_document(app, config, keys))
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI, config: Config, keys: bool) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    examples = {model.__name__: example for model, example in EXAMPLES.items()}
    # Not FastAPI's schemas: it converts bounds to floats, which cannot represent the largest seed.
    _, definitions = models_json_schema([(model, "validation") for model in EXAMPLES], ref_template=REFERENCE)
    schemas = definitions["$defs"] | {"Error": ERROR}
    _add_limits(schemas, config)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            errors = _errors(
                config, method, ready=path == "/ready", keys=keys and path.startswith(("/v1/", "/tokenize"))
            )
            operation["responses"] = _success(path) | {status: _error(text) for status, text in errors.items()}
            if method == "post":
                content = operation["requestBody"]["content"]["application/json"]
                content["example"] = examples[content["schema"]["$ref"].rpartition("/")[2]]
            if "401" in errors:
                operation["security"] = [{"key": []}]
    document["components"] = {"schemas": schemas}
    if keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _add_limits(schemas: dict[str, Any], config: Config) -> None:
    """Limits that depend on the configuration."""
    limits, name = config.limits, config.gateway.model_name
    for request in EXAMPLES:
        schemas[request.__name__]["properties"]["model"] = {
            "enum": [name, None],
            "description": "optional: the server has only one model",
        }
    image = schemas["ImageUrl"]["properties"]["url"]
    image["description"] = (
        f"at most {limits.max_images} images per request, {limits.max_image_bytes} bytes and "
        f"{limits.max_image_pixels} pixels each"
    )
    image["maxLength"] = _base64_length(limits.max_image_bytes) + len("data:image/jpeg;base64,")
    schemas["InputAudio"]["properties"]["data"]["maxLength"] = _base64_length(config.audio.max_audio_bytes)
    schemas["InputAudio"]["description"] += f" At most {config.audio.max_audio_files} per request."
    if limits.max_pixels:
        for request in (ChatRequest, CompletionRequest):
            for field in ("max_pixels", "min_pixels"):
                schemas[request.__name__]["properties"][field]["anyOf"][0]["maximum"] = limits.max_pixels


def _base64_length(size: int) -> int:
    return (size + 2) // 3 * 4


def _success(path: str) -> dict[str, Any]:
    kinds = ["text/plain"] if path == "/metrics" else ["application/json"]
    if path in ("/v1/chat/completions", "/v1/completions"):
        kinds.append("text/event-stream")
    return {"200": {"description": "success", "content": {kind: {} for kind in kinds}}}


def _errors(config: Config, method: str, *, ready: bool, keys: bool) -> dict[str, str]:
    """Descriptions of the error responses by HTTP status."""
    errors = {}
    if method == "post":
        errors = {
            "400": "a field is missing, unknown, of a wrong type or out of range; the message names it",
            "404": "unknown model",
            "408": "the request's own timeout expired, or the body arrived too slowly",
            "413": f"the body is larger than {config.gateway.max_body_mb} MiB",
            "429": f"{config.gateway.max_requests} requests are already being answered; retry after Retry-After",
            "500": "the server failed",
            "503": "the server is full, starting or unreachable; retry after Retry-After",
            "504": f"the answer was not complete within {config.gateway.timeout_s} s",
        }
    if ready:
        errors["503"] = "not ready"
    if keys:
        errors["401"] = "the API key is missing or invalid"
    return errors


def _error(text: str) -> dict[str, Any]:
    schema = {"$ref": REFERENCE.format(model="Error")}
    return {"description": text, "content": {"application/json": {"schema": schema}}}
