"""A gRPC server with the protocol of Triton and its ensemble, whose answers are scripted by the prompt.

It imitates Triton 24.10: errors are texts in the stream, and the last step of an ensemble continues after its call was
cancelled, until it receives a stop request.

A prompt (or the last text of a chat) of the form `verb:argument` selects an answer, any other one gets ANSWER:
    abort:CODE:details, error:text   one response, then a gRPC status or an error in the stream
    fail:CODE:details, refuse:text   the same without a response
    finish:reason                    two responses, the second with a finish reason
    unreadable:logprobs              a response with these LOGPROBS, or without argument a broken TEXT
    parameters                       the request's parameters as JSON
    endless                          a response every 20 ms until the request is stopped
    silent                           no response until the request is stopped
    deaf                             no response; stop requests find no such request
"""

import json
import struct
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from contextlib import suppress
from types import TracebackType
from typing import Any

import grpc
import numpy as np
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
    """Serves on 127.0.0.1, by default on a free port, inside its `with` block."""

    def __init__(self, url: str = "127.0.0.1:0") -> None:
        self.requests: list[Any] = []
        self.stopped: dict[str, threading.Event] = {}
        self.cancelled: dict[str, threading.Event] = {}
        self._server = grpc.server(futures.ThreadPoolExecutor(64))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.url = f"127.0.0.1:{self._server.add_insecure_port(url)}"

    def __enter__(self) -> "FakeServer":
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for event in (*self.stopped.values(), *self.cancelled.values()):
            event.set()
        self._server.stop(0).wait()

    def was_stopped(self, request_id: str) -> bool:
        """Whether a stop request for this id arrives within 5 seconds."""
        return self.stopped.setdefault(request_id, threading.Event()).wait(5)

    def was_cancelled(self, request_id: str) -> bool:
        """Whether the call of a "deaf" prompt is cancelled within 5 seconds."""
        return self.cancelled.setdefault(request_id, threading.Event()).wait(5)

    def ModelReady(self, request: Any, context: grpc.ServicerContext) -> Any:
        return service_pb2.ModelReadyResponse(ready=request.name == "ensemble")

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Of preprocess: PROMPT_IDS are the bytes of the prompt."""
        assert request.model_name == "preprocess"
        self.requests.append(request)
        verb, _, argument = prompt_of(request).partition(":")
        if verb == "fail":
            code, _, details = argument.partition(":")
            context.abort(grpc.StatusCode[code], details)
        answer = service_pb2.ModelInferResponse()
        answer.raw_output_contents.append(np.frombuffer(prompt_of(request).encode(), np.uint8).astype("<i4").tobytes())
        return answer

    def ModelStreamInfer(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        # Triton 24.10 crashes on errors when this header is sent.
        assert "triton_grpc_error" not in dict(context.invocation_metadata())
        for request in requests:
            stop = self.stopped.setdefault(request.id, threading.Event())
            if request.model_name == "autoglm_llm":
                assert request.parameters["STOP"].bool_param
                assert [(i.name, i.datatype, list(i.shape)) for i in request.inputs] == [("PROMPT_IDS", "INT32", [0])]
                stop.set()
                if request.id in self.cancelled:  # "deaf"
                    yield service_pb2.ModelStreamInferResponse(error_message="INVALID_ARGUMENT: id: not running")
                else:
                    yield response(finish_reason="cancelled")
            else:
                self.requests.append(request)
                yield from self._answer(request, stop, context)

    def _answer(self, request: Any, stop: threading.Event, context: grpc.ServicerContext) -> Iterator[Any]:
        verb, _, argument = prompt_of(request).partition(":")
        logprobs = json.dumps(LOGPROBS) if "logprobs" in request.parameters else ""
        transcripts = [f"{len(file)} bytes" for file in inputs(request).get("AUDIO", [])]
        if verb in ("abort", "fail"):
            code, _, details = argument.partition(":")
            if verb == "abort":
                yield response("a ")
            context.abort(grpc.StatusCode[code], details)
        elif verb in ("error", "refuse"):
            if verb == "error":
                yield response("a ")
            yield service_pb2.ModelStreamInferResponse(error_message=argument)
        elif verb == "parameters":
            yield response(json.dumps(parameters(request)), [1], "stop", json.dumps(USAGE))
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
                yield response(
                    text, [number, number], transcripts=transcripts if number == 0 else (), logprobs=logprobs
                )
            yield response(finish_reason="stop", usage=json.dumps(USAGE))
        else:
            yield response("".join(ANSWER), list(range(12)), "stop", json.dumps(USAGE), transcripts, logprobs)


def response(
    text: str = "",
    ids: list[int] | None = None,
    finish_reason: str = "",
    usage: str = "",
    transcripts: Sequence[str] = (),
    logprobs: str = "",
) -> Any:
    """A response of the ensemble."""
    message = service_pb2.ModelStreamInferResponse()
    ids = ids or []
    for name, datatype, shape, content in (
        ("TEXT", "BYTES", [1], strings(text)),
        ("TOKEN_IDS", "INT32", [len(ids)], struct.pack(f"<{len(ids)}i", *ids)),
        ("LOGPROBS", "BYTES", [1], strings(logprobs)),
        ("TRANSCRIPTS", "BYTES", [len(transcripts)], b"".join(map(strings, transcripts))),
        ("FINISH_REASON", "BYTES", [1], strings(finish_reason)),
        ("USAGE", "BYTES", [1], strings(usage)),
    ):
        message.infer_response.outputs.add(name=name, datatype=datatype, shape=shape)
        message.infer_response.raw_output_contents.append(content)
    return message


def strings(text: str) -> bytes:
    """A BYTES tensor of one element."""
    return struct.pack("<I", len(text.encode())) + text.encode()


def parameters(request: Any) -> dict[str, Any]:
    """The parameters of a request by name."""
    return {name: getattr(each, each.WhichOneof("parameter_choice")) for name, each in request.parameters.items()}


def prompt_of(request: Any) -> str:
    """PROMPT, or the last text of MESSAGES."""
    tensors = inputs(request)
    if "PROMPT" in tensors:
        return tensors["PROMPT"][0].decode()
    with suppress(ValueError, LookupError, TypeError):  # not a chat
        content = json.loads(tensors["MESSAGES"][0])[-1]["content"]
        return content if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"][-1]
    return ""


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
