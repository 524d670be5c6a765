"""Calls the ensemble with plain tritonclient, without the project's own client."""

import json
import queue
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.request import urlopen

import numpy as np
import tritonclient.grpc as grpc

from autoglm_launcher.server import TritonServer

TIMEOUT = 60


@dataclass
class Reply:
    """The responses of one request, joined."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    transcripts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)


def bytes_input(name: str, values: Sequence[bytes | str]) -> grpc.InferInput:
    array = np.empty(len(values), np.object_)
    array[:] = [value.encode() if isinstance(value, str) else value for value in values]
    tensor = grpc.InferInput(name, [len(values)], "BYTES")
    tensor.set_data_from_numpy(array)
    return tensor


class Call:
    """One request on its own stream; `result` waits for its end."""

    def __init__(
        self,
        server: TritonServer,
        inputs: Mapping[str, Sequence[bytes | str]] | list[grpc.InferInput],
        parameters: dict[str, Any] | None = None,
        request_id: str = "",
        model: str = "ensemble",
        **options: Any,
    ) -> None:
        self._responses: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client = grpc.InferenceServerClient(server.grpc_url)
        self._client.start_stream(lambda result, error: self._responses.put((result, error)))
        tensors = [bytes_input(k, v) for k, v in inputs.items()] if isinstance(inputs, Mapping) else inputs
        self._client.async_stream_infer(
            model, tensors, request_id=request_id, parameters=parameters, enable_empty_final_response=True, **options
        )

    def next(self) -> tuple[Any, bool]:
        """The next response, None for an empty one, and whether it is the last. Raises the server's errors."""
        result, error = self._responses.get(timeout=TIMEOUT)
        if error is not None:
            self._client.stop_stream()
            raise error
        response = result.get_response()
        return result if response.outputs else None, response.parameters["triton_final_response"].bool_param

    def result(self) -> Reply:
        reply, final = Reply(), False
        while not final:
            piece, final = self.next()
            if piece is not None:
                reply.texts.append(piece.as_numpy("TEXT")[0].decode())
                reply.token_ids += piece.as_numpy("TOKEN_IDS").tolist()
                reply.transcripts += [text.decode() for text in piece.as_numpy("TRANSCRIPTS").tolist()]
                told = piece.as_numpy("LOGPROBS")[0]
                reply.logprobs += json.loads(told) if told else []
                reply.finish_reason = piece.as_numpy("FINISH_REASON")[0].decode()
                usage = piece.as_numpy("USAGE")[0]
                reply.usage = json.loads(usage) if usage else {}
        self.close()
        return reply

    def close(self, cancel: bool = False) -> None:
        self._client.stop_stream(cancel_requests=cancel)
        self._client.close()


def ask(server: TritonServer, inputs: Mapping[str, Sequence[bytes | str]], **parameters: Any) -> Reply:
    """Send one request to the ensemble and wait for its answer."""
    return Call(server, inputs, parameters).result()


def metric(server: TritonServer, name: str) -> float:
    """The current value of one of our metrics, summed over all instances."""
    return sum(metrics(server, name))


def metrics(server: TritonServer, name: str) -> list[float]:
    """The current values of one of our metrics, by instance."""
    with urlopen(server.metrics_url, timeout=10) as page:
        lines = page.read().decode().splitlines()
    values = [float(line.split()[-1]) for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
    assert values, name
    return values
