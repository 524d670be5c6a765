"""Requests and responses as KServe protobufs of the ensemble's tensors."""

import json
import struct
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2

from autoglm_client.errors import TIMED_OUT, Cancelled, InvalidRequest, MalformedResponse, RequestTimeout, from_text
from autoglm_client.media import AudioSource, ImageSource, audio_bytes, image_bytes
from autoglm_client.result import Response

ENSEMBLE = "ensemble"
LANGUAGE_MODEL = "autoglm_llm"  # the last step of the ensemble, which handles stop requests

Messages = str | Sequence[Mapping[str, Any]]
SamplingValue = str | int | float | bool | Sequence[str] | Sequence[int] | Mapping[str, Any] | None

# Triton consumes a gRPC parameter called `priority` in its own scheduler and hides it from the models.
_SENT_AS = {"priority": "request_priority"}
_RESERVED = {"sequence_id", "sequence_start", "sequence_end", "headers", "binary_data_output"}


def channel_options(connect_timeout: float) -> list[tuple[str, int]]:
    """gRPC channel options: messages of any size, `connect_timeout` in seconds, and reconnection to a restarted server
    within two seconds."""
    return [
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        ("grpc.min_reconnect_backoff_ms", max(1, round(connect_timeout * 1000))),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2000),
        ("grpc.use_local_subchannel_pool", 1),
    ]


def inference_request(
    options: Mapping[str, SamplingValue],
    *,
    messages: Messages | None = None,
    prompt: str | None = None,
    images: Iterable[ImageSource] = (),
    audio: Iterable[AudioSource] = (),
    request_id: str | None = None,
    stream: bool,
    timeout: float,
) -> Any:
    """The ModelInferRequest for one answer. `timeout` is in seconds.

    Raises InvalidRequest if the request cannot be encoded; the server validates the rest.
    """
    if (messages is None) == (prompt is None):
        got = "neither" if messages is None else "both"
        raise InvalidRequest(f"exactly one of messages and prompt must be given (got {got})")
    request = service_pb2.ModelInferRequest(model_name=ENSEMBLE, id=request_id or uuid.uuid4().hex)
    if messages is not None:
        text = messages if isinstance(messages, str) else _json("messages", messages)
        _add_strings(request, "MESSAGES", [_utf8("messages", text)])
    else:
        _add_strings(request, "PROMPT", [_utf8("prompt", str(prompt))])
    for name, files in (("IMAGES", list(map(image_bytes, images))), ("AUDIO", list(map(audio_bytes, audio)))):
        if files:
            _add_strings(request, name, files)
    request.parameters["stream"].bool_param = stream
    request.parameters["timeout"].int64_param = max(1, round(timeout * 1e6))
    for name, value in options.items():
        if value is not None:
            _add_parameter(request, name, value)
    return request


def stop_request(request_id: str) -> Any:
    """The ModelInferRequest that stops a running request. It is for the last step of the ensemble, which the
    cancellation of a call does not reach."""
    request = service_pb2.ModelInferRequest(model_name=LANGUAGE_MODEL, id=request_id)
    request.inputs.add(name="PROMPT_IDS", datatype="INT32", shape=[0])
    request.raw_input_contents.append(b"")
    request.parameters["STOP"].bool_param = True
    return request


def read_response(message: Any) -> Response:
    """Decode a ModelStreamInferResponse. Raises the AutoGLMError that it carries, or MalformedResponse. The finish
    reasons "cancelled" and "timeout" are errors, too.

    Triton can report errors as gRPC statuses instead (header `triton_grpc_error`), but release 24.10 crashes with a
    segmentation fault after about ten such errors.
    """
    if message.error_message:
        raise from_text(message.error_message)
    response = message.infer_response
    try:
        contents = zip(response.outputs, response.raw_output_contents, strict=True)
        raw = {output.name: content for output, content in contents}
        decoded = Response(
            text=_string(raw.get("TEXT")),
            token_ids=tuple(np.frombuffer(raw.get("TOKEN_IDS", b""), dtype="<i4").tolist()),
            finish_reason=_string(raw.get("FINISH_REASON")),
            usage=_string(raw.get("USAGE")),
            transcripts=tuple(_strings(raw.get("TRANSCRIPTS", b""))),
            logprobs=_string(raw.get("LOGPROBS")),
        )
    except (ValueError, struct.error) as error:
        raise MalformedResponse("the server sent a response that cannot be decoded") from error
    if decoded.finish_reason == "cancelled":
        raise Cancelled("the request was cancelled on the server")
    if decoded.finish_reason == "timeout":
        raise RequestTimeout(TIMED_OUT)
    return decoded


def _json(field: str, value: Any) -> str:
    def refuse(part: Any) -> Any:
        raise InvalidRequest(f"{field} must consist of JSON values (got {type(part).__name__})")

    try:
        return json.dumps(value, ensure_ascii=False, default=refuse)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{field} must consist of JSON values without cycles, with strings as keys") from error


def _utf8(field: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{field} must be valid Unicode text (got half of a surrogate pair)") from error


def _add_strings(request: Any, name: str, values: list[bytes]) -> None:
    request.inputs.add(name=name, datatype="BYTES", shape=[len(values)])
    request.raw_input_contents.append(b"".join(struct.pack("<I", len(value)) + value for value in values))


def _string(raw: bytes | None) -> str:
    """The only element of a BYTES tensor."""
    if not raw:
        return ""
    (element,) = _strings(raw)
    return element


def _strings(raw: bytes) -> list[str]:
    """The elements of a BYTES tensor: for each its length in 4 bytes, then UTF-8."""
    elements = []
    while raw:
        (length,) = struct.unpack_from("<I", raw)
        if length + 4 > len(raw):
            raise ValueError("truncated BYTES tensor")
        elements.append(raw[4 : 4 + length].decode("utf-8"))
        raw = raw[4 + length :]
    return elements


def _add_parameter(request: Any, name: str, value: SamplingValue) -> None:
    if name in _RESERVED or name.startswith("triton_"):
        raise InvalidRequest(f"{name} is not a sampling option")
    parameter = request.parameters[_SENT_AS.get(name, name)]
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise InvalidRequest(f"{name} must be a 64-bit integer (got {value})")
        parameter.int64_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    elif isinstance(value, str):
        parameter.string_param = _utf8(name, value)
    else:  # parameters are scalars: objects and lists are sent as JSON
        plain = dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, Iterable) else value
        parameter.string_param = _utf8(name, _json(name, plain))
