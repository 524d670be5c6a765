"""A gRPC server that speaks as Triton does about an ensemble, with answers told by the prompt.

It imitates what was observed of Triton 24.10: errors as text in the stream, and an ensemble whose last step goes on
after its call was cancelled until a stop request reaches it.
"""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from types import TracebackType
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

ANSWER = ["<think>点", "设置", "</think>", "<answer>", 'do(action="Tap", ', "element=[517,233])"]
LOGPROBS = [
    {
        "token": "do",
        "bytes": [100, 111],
        "logprob": -0.25,
        "top_logprobs": [{"token": "\\xe7", "bytes": [231], "logprob": -0.125}],
    },
    {"token": "<|end|>", "bytes": None, "logprob": -9999.0, "top_logprobs": []},
]
USAGE = {
    "prompt_tokens": 40,
    "image_tokens": 32,
    "completion_tokens": 12,
    "cached_tokens": 8,
    "decode_ms": 1.5,
    "new": 1,
}


class FakeServer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Serves on 127.0.0.1, on a free port unless told which, while its `with` block lasts."""

    def __init__(self, url: str = "127.0.0.1:0") -> None:
        self.requests: list[Any] = []
        self.stopped: dict[str, threading.Event] = {}
        self.cancelled: dict[str, threading.Event] = {}
        self._server = grpc.server(futures.ThreadPoolExecutor(64))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.url = f"127.0.0.1:{self._server.add_insecure_port(url)}"

    def __enter__(self) -> FakeServer:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for event in (*self.stopped.values(), *self.cancelled.values()):
            event.set()
        self._server.stop(0).wait()

    def was_stopped(self, request_id: str) -> bool:
        """Whether a stop request for that id comes within 5 seconds."""
        return self.stopped.setdefault(request_id, threading.Event()).wait(5)

    def was_cancelled(self, request_id: str) -> bool:
        """Whether the call of a "deaf" prompt is cancelled within 5 seconds."""
        return self.cancelled.setdefault(request_id, threading.Event()).wait(5)

    def ModelReady(self, request: Any, context: grpc.ServicerContext) -> Any:
        return service_pb2.ModelReadyResponse(ready=request.name == "ensemble")

    def ModelStreamInfer(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        # With this header Triton 24.10 dies of the first errors.
        assert "triton_grpc_error" not in dict(context.invocation_metadata())
        for request in requests:
            stop = self.stopped.setdefault(request.id, threading.Event())
            if request.model_name == "autoglm_llm":
                assert request.parameters["STOP"].bool_param
                assert [(i.name, i.datatype, list(i.shape)) for i in request.inputs] == [("PROMPT_IDS", "INT32", [0])]
                stop.set()
                if request.id in self.cancelled:  # "deaf": not there yet
                    yield service_pb2.ModelStreamInferResponse(error_message="INVALID_ARGUMENT: id: not running")
                else:
                    yield response(finish_reason="cancelled")
            else:
                self.requests.append(request)
                yield from self._answer(request, stop, context)

    def _answer(self, request: Any, stop: threading.Event, context: grpc.ServicerContext) -> Iterator[Any]:
        prompt = inputs(request).get("PROMPT", [b""])[0].decode()
        verb, _, argument = prompt.partition(":")
        logprobs = json.dumps(LOGPROBS) if "logprobs" in request.parameters else ""
        heard = [f"{len(file)} bytes" for file in inputs(request).get("AUDIO", [])]
        if verb == "abort":
            code, _, details = argument.partition(":")
            yield response("a ")
            context.abort(grpc.StatusCode[code], details)
        elif verb == "error":
            yield response("a ")
            yield service_pb2.ModelStreamInferResponse(error_message=argument)
        elif verb == "deaf":
            over = self.cancelled.setdefault(request.id, threading.Event())
            context.add_callback(over.set)
            over.wait(5.5)
        elif verb == "silent":
            stop.wait(20)
        elif verb == "endless":
            for _ in range(1000):
                yield response("字", [1])
                if stop.wait(0.02):
                    break
        elif verb == "finish":
            yield response("a ")
            yield response(finish_reason=argument, usage="{}")
        elif verb == "unreadable":
            broken = response("a ", logprobs=argument)
            if not argument:
                broken.infer_response.raw_output_contents[0] = b"\x09\0\0\0"
            yield broken
            stop.wait(20)
        elif request.parameters["stream"].bool_param:
            for number, text in enumerate(ANSWER):
                yield response(text, [number, number], heard=heard if number == 0 else (), logprobs=logprobs)
            yield response(finish_reason="stop", usage=json.dumps(USAGE))
        else:
            yield response("".join(ANSWER), list(range(12)), "stop", json.dumps(USAGE), heard, logprobs)


def response(
    text: str = "",
    ids: list[int] | None = None,
    finish_reason: str = "",
    usage: str = "",
    heard: Sequence[str] = (),
    logprobs: str = "",
) -> Any:
    """A response of the ensemble."""
    message = service_pb2.ModelStreamInferResponse()
    ids = ids or []
    for name, datatype, shape, content in (
        ("TEXT", "BYTES", [1], strings(text)),
        ("TOKEN_IDS", "INT32", [len(ids)], struct.pack(f"<{len(ids)}i", *ids)),
        ("LOGPROBS", "BYTES", [1], strings(logprobs)),
        ("TRANSCRIPTS", "BYTES", [len(heard)], b"".join(map(strings, heard))),
        ("FINISH_REASON", "BYTES", [1], strings(finish_reason)),
        ("USAGE", "BYTES", [1], strings(usage)),
    ):
        message.infer_response.outputs.add(name=name, datatype=datatype, shape=shape)
        message.infer_response.raw_output_contents.append(content)
    return message


def strings(text: str) -> bytes:
    """A BYTES tensor of one element."""
    return struct.pack("<I", len(text.encode())) + text.encode()


def inputs(request: Any) -> dict[str, list[bytes]]:
    """The BYTES inputs of a request, decoded."""
    found: dict[str, list[bytes]] = {}
    for tensor, content in zip(request.inputs, request.raw_input_contents, strict=True):
        elements = []
        while content:
            (length,) = struct.unpack_from("<I", content)
            elements.append(content[4 : 4 + length])
            content = content[4 + length :]
        assert list(tensor.shape) == [len(elements)]
        found[tensor.name] = elements
    return found
