"""Requests and responses in the form in which they travel: KServe protobufs of the ensemble's tensors."""

from __future__ import annotations

import json
import struct
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2

from autoglm_client.errors import InvalidRequest, Unreadable, from_text
from autoglm_client.images import ImageSource, image_bytes
from autoglm_client.result import Response
from autoglm_client.sounds import AudioSource, audio_bytes

ENSEMBLE = "ensemble"
LANGUAGE_MODEL = "autoglm_llm"  # the ensemble's last step, which a stop request is sent to

Messages = str | Sequence[Mapping[str, Any]]
SamplingValue = str | int | float | bool | Sequence[str] | Sequence[int] | Mapping[str, Any] | None

# Triton takes a gRPC parameter called `priority` for its own scheduler and hides it from the models.
_SENT_AS = {"priority": "request_priority"}
_RESERVED = {"sequence_id", "sequence_start", "sequence_end", "headers", "binary_data_output"}


def channel_options(connect_timeout: float) -> list[tuple[str, int]]:
    """Options of a channel that carries screenshots, gives up connecting after `connect_timeout` seconds,
    and finds a restarted server again within two seconds."""
    return [
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        ("grpc.min_reconnect_backoff_ms", max(1, round(connect_timeout * 1000))),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2000),
        ("grpc.use_local_subchannel_pool", 1),
    ]


def inference_request(
    messages: Messages | None,
    prompt: str | None,
    images: Iterable[ImageSource],
    audio: Iterable[AudioSource],
    sampling: Mapping[str, SamplingValue],
    request_id: str | None,
    *,
    stream: bool,
    timeout: float,
) -> Any:
    """The ModelInferRequest for one answer. `timeout` is in seconds.

    Raises InvalidRequest for what can be seen from here; the rest is for the server to judge.
    """
    if (messages is None) == (prompt is None):
        raise InvalidRequest("exactly one of messages and prompt must be given")
    request = service_pb2.ModelInferRequest(model_name=ENSEMBLE, id=request_id or uuid.uuid4().hex)
    if messages is not None:
        _add_strings(request, "MESSAGES", [_chat(messages).encode()])
    else:
        _add_strings(request, "PROMPT", [str(prompt).encode()])
    files = [image_bytes(image) for image in images]
    if files:
        _add_strings(request, "IMAGES", files)
    sounds = [audio_bytes(sound) for sound in audio]
    if sounds:
        _add_strings(request, "AUDIO", sounds)
    request.parameters["stream"].bool_param = stream
    request.parameters["timeout"].int64_param = max(1, round(timeout * 1e6))
    for name, value in sampling.items():
        if value is not None:
            _add_parameter(request, name, value)
    return request


def stop_request(request_id: str) -> Any:
    """The ModelInferRequest that ends the running request of that id: a cancelled call does not reach the last step
    of an ensemble, so it is told directly."""
    request = service_pb2.ModelInferRequest(model_name=LANGUAGE_MODEL, id=request_id)
    request.inputs.add(name="PROMPT_IDS", datatype="INT32", shape=[0])
    request.raw_input_contents.append(b"")
    request.parameters["STOP"].bool_param = True
    return request


def read_response(message: Any) -> Response:
    """Decode a ModelStreamInferResponse. Raises the error which it carries.

    Triton can report errors as gRPC statuses instead (header `triton_grpc_error`), but release 24.10 dies of it: after
    some ten errors the whole server ends with a segmentation fault.
    """
    if message.error_message:
        raise from_text(message.error_message)
    response = message.infer_response
    try:
        contents = zip(response.outputs, response.raw_output_contents, strict=True)
        raw = {output.name: content for output, content in contents}
        return Response(
            text=_string(raw.get("TEXT")),
            token_ids=tuple(np.frombuffer(raw.get("TOKEN_IDS", b""), dtype="<i4").tolist()),
            finish_reason=_string(raw.get("FINISH_REASON")),
            usage=_string(raw.get("USAGE")),
            transcripts=tuple(_strings(raw.get("TRANSCRIPTS", b""))),
            logprobs=_string(raw.get("LOGPROBS")),
        )
    except (ValueError, struct.error) as error:
        raise Unreadable(f"a response cannot be read: {error}") from None


def _chat(messages: Messages) -> str:
    if isinstance(messages, str):
        return messages
    try:
        return json.dumps(messages, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"messages: {error}") from None


def _add_strings(request: Any, name: str, values: list[bytes]) -> None:
    request.inputs.add(name=name, datatype="BYTES", shape=[len(values)])
    request.raw_input_contents.append(b"".join(struct.pack("<I", len(value)) + value for value in values))


def _string(raw: bytes | None) -> str:
    """The only element of a BYTES tensor."""
    if not raw:
        return ""
    elements = _strings(raw)
    if len(elements) != 1:
        raise ValueError("a string tensor of more than one element")
    return elements[0]


def _strings(raw: bytes) -> list[str]:
    """The elements of a BYTES tensor: of each its length in 4 bytes, then UTF-8."""
    elements = []
    while raw:
        (length,) = struct.unpack_from("<I", raw)
        if length + 4 > len(raw):
            raise ValueError("a string tensor that ends early")
        elements.append(raw[4 : 4 + length].decode("utf-8"))
        raw = raw[4 + length :]
    return elements


def _add_parameter(request: Any, name: str, value: SamplingValue) -> None:
    if name in _RESERVED or name.startswith("triton_"):
        raise InvalidRequest(f"{name}: not a sampling option")
    parameter = request.parameters[_SENT_AS.get(name, name)]
    try:
        if isinstance(value, bool):
            parameter.bool_param = value
        elif isinstance(value, int):
            parameter.int64_param = value
        elif isinstance(value, float):
            parameter.double_param = value
        elif isinstance(value, str):
            parameter.string_param = value
        else:  # parameters are scalars: an object or a list travels as JSON
            plain = dict(value) if isinstance(value, Mapping) else list(value or ())
            parameter.string_param = json.dumps(plain, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{name}: {str(value)[:80]} given; {error}") from None
