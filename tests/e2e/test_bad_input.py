"""Invalid requests get INVALID_ARGUMENT and the field's name; the server keeps answering."""

import json
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from PIL import Image
from tritonclient.utils import InferenceServerException

from autoglm_launcher.server import TritonServer
from tests.e2e.ensemble_client import Call, ask
from tests.images import encode, picture, rotated_by_exif

PNG = encode(picture())
USER = {"role": "user", "content": "hello"}
IMAGE = {"type": "image"}


def chat(*content: Any, role: str = "user") -> list[str]:
    return [json.dumps([{"role": role, "content": list(content)}])]


def bomb() -> bytes:
    """A PNG of a few hundred bytes whose header declares 3.6 billion pixels."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def broken_pixels() -> bytes:
    """A PNG with all its chunks, whose compressed pixels end early."""
    at = PNG.index(b"IDAT") - 4
    (length,) = struct.unpack_from(">I", PNG, at)
    data = PNG[at + 8 : at + 8 + length // 2]
    chunk = struct.pack(">I", len(data)) + b"IDAT" + data + struct.pack(">I", zlib.crc32(b"IDAT" + data))
    return PNG[:at] + chunk + PNG[at + 12 + length :]


BAD_INPUTS: dict[str, tuple[Callable[[], dict[str, list[Any]]], str]] = {
    "not JSON": (lambda: {"MESSAGES": ["{not json"]}, "MESSAGES"),
    "empty text": (lambda: {"MESSAGES": [""]}, "MESSAGES"),
    "empty list": (lambda: {"MESSAGES": ["[]"]}, "MESSAGES"),
    "an object": (lambda: {"MESSAGES": ["{}"]}, "MESSAGES"),
    "not UTF-8": (lambda: {"MESSAGES": [b"\xff\xfe"]}, "MESSAGES"),
    "unknown role": (lambda: {"MESSAGES": [json.dumps([{"role": "wizard", "content": "x"}])]}, "MESSAGES[0].role"),
    "no content": (lambda: {"MESSAGES": [json.dumps([{"role": "user"}])]}, "MESSAGES[0].content"),
    "unknown part": (lambda: {"MESSAGES": chat({"type": "video"})}, "MESSAGES[0].content[0].type"),
    "URL": (
        lambda: {"MESSAGES": chat({"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}})},
        "MESSAGES[0].content[0]",
    ),
    "broken base64": (
        lambda: {"MESSAGES": chat({"type": "image_url", "image_url": {"url": "data:image/png;base64,@@"}})},
        "MESSAGES[0].content[0]",
    ),
    "empty prompt": (lambda: {"PROMPT": [""]}, "PROMPT"),
    "both": (lambda: {"PROMPT": ["hi"], "MESSAGES": [json.dumps([USER])]}, "exactly one of MESSAGES and PROMPT"),
    "neither": (lambda: {"IMAGES": [PNG]}, "exactly one of MESSAGES and PROMPT"),
    "nothing at all": (lambda: {}, "exactly one of MESSAGES and PROMPT"),
    "more images than placeholders": (lambda: {"MESSAGES": chat(IMAGE), "IMAGES": [PNG, PNG]}, "IMAGES"),
    "fewer images than placeholders": (lambda: {"MESSAGES": chat(IMAGE, IMAGE), "IMAGES": [PNG]}, "IMAGES"),
    "too many images": (lambda: {"PROMPT": ["hi"], "IMAGES": [PNG] * 11}, "IMAGES"),
    "truncated PNG": (lambda: {"PROMPT": ["hi"], "IMAGES": [PNG, PNG[: len(PNG) // 2]]}, "IMAGES[1]"),
    "PNG with too few pixels": (lambda: {"PROMPT": ["hi"], "IMAGES": [PNG, broken_pixels()]}, "IMAGES[1]"),
    "truncated JPEG header": (lambda: {"PROMPT": ["hi"], "IMAGES": [encode(picture(), "JPEG")[:50]]}, "IMAGES[0]"),
    "text as image": (lambda: {"PROMPT": ["hi"], "IMAGES": [b"this is no image"]}, "IMAGES[0]"),
    "empty image": (lambda: {"PROMPT": ["hi"], "IMAGES": [b""]}, "IMAGES[0]"),
    "huge image": (lambda: {"PROMPT": ["hi"], "IMAGES": [encode(Image.new("1", (20000, 20000)))]}, "IMAGES[0]"),
    "bomb": (lambda: {"PROMPT": ["hi"], "IMAGES": [bomb()]}, "IMAGES[0]"),
    "too long and thin": (lambda: {"PROMPT": ["hi"], "IMAGES": [encode(picture(8000, 30))]}, "IMAGES[0]"),
    "prompt over the context": (lambda: {"PROMPT": ["word 123 " * 20000]}, "prompt"),
    "audio without an encoder": (lambda: {"PROMPT": ["hi"], "AUDIO": [b"RIFF"]}, "AUDIO"),
}

BAD_PARAMETERS: dict[str, dict[str, Any]] = {
    "negative max_tokens": {"max_tokens": -1},
    "zero max_tokens": {"max_tokens": 0},
    "max_tokens as text": {"max_tokens": "ten"},
    "max_tokens as a fraction": {"max_tokens": 1.5},
    "NaN": {"temperature": float("nan")},
    "infinite": {"temperature": float("inf")},
    "negative temperature": {"temperature": -0.1},
    "top_p of zero": {"top_p": 0.0},
    "top_p over one": {"top_p": 1.01},
    "negative top_k": {"top_k": -1},
    "min_p over one": {"min_p": 1.5},
    "frequency_penalty": {"frequency_penalty": 2.5},
    "presence_penalty": {"presence_penalty": "much"},
    "repetition_penalty": {"repetition_penalty": 0.0},
    "seed as a fraction": {"seed": 0.5},
    "empty stop": {"stop": ""},
    "stop of numbers": {"stop": "[1]"},
    "stop_token_ids as text": {"stop_token_ids": "many"},
    "ignore_eos as a number": {"ignore_eos": 1},
    "stream as text": {"stream": "yes"},
    "priority": {"request_priority": 11},
    "max_pixels over the server's": {"max_pixels": 2**40},
    "max_pixels below one token": {"max_pixels": 1000},
    "min_pixels as text": {"min_pixels": "few"},
    "logprobs over 20": {"logprobs": 21},
    "logprobs as true": {"logprobs": True},
    "response_format as a word": {"response_format": "phone_action"},
    "response_format of an unknown type": {"response_format": '{"type": "xml"}'},
    "response_format without a schema": {"response_format": '{"type": "json_schema", "json_schema": {}}'},
    "response_format with an invalid schema": {
        "response_format": '{"type": "json_schema", "json_schema": {"schema": {"type": "wizard"}}}'
    },
    "max_tokens too few for an action": {"max_tokens": 5, "response_format": '{"type": "phone_action"}'},
    "unknown": {"temprature": 0.5},
}


@pytest.fixture(autouse=True)
def still_serving(server: TritonServer) -> Iterator[None]:
    """The server still answers after each of these tests."""
    yield
    assert ask(server, {"PROMPT": ["hello"]}, max_tokens=1, ignore_eos=True).finish_reason == "length"


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input(server: TritonServer, name: str) -> None:
    make, field = BAD_INPUTS[name]
    with pytest.raises(InferenceServerException) as rejected:
        ask(server, make(), max_tokens=2)
    assert f"'ensemble', INVALID_ARGUMENT: {field}" in rejected.value.message()
    assert len(rejected.value.message()) < 400


def test_http_status(server: TritonServer) -> None:
    """HTTP returns the status of the error code, and the same message."""
    body = json.dumps({"PROMPT": "hello", "max_tokens": -1}).encode()
    request = Request(f"{server.http_url}/v2/models/ensemble/generate_stream", body)
    with pytest.raises(HTTPError) as rejected:
        urlopen(request, timeout=30)
    assert rejected.value.code == 400
    assert "INVALID_ARGUMENT: max_tokens must be between 1 and 2147483647 (got -1)" in rejected.value.read().decode()


@pytest.mark.parametrize("name", BAD_PARAMETERS)
def test_bad_parameter(server: TritonServer, name: str) -> None:
    """The message names the invalid parameter, the first of each case."""
    parameter = next(iter(BAD_PARAMETERS[name]))
    with pytest.raises(InferenceServerException) as rejected:
        ask(server, {"PROMPT": ["hello"]}, **BAD_PARAMETERS[name])
    assert "INVALID_ARGUMENT: " in rejected.value.message()
    assert parameter in rejected.value.message()


def test_an_invalid_image_fails_only_its_request(server: TritonServer) -> None:
    """Valid and invalid requests of one batch do not affect each other."""
    files = [encode(picture(seed=i)) if i % 2 else broken_pixels() for i in range(8)]
    options = {"max_tokens": 2, "ignore_eos": True}
    calls = [Call(server, {"PROMPT": ["hi"], "IMAGES": [file]}, options) for file in files]
    for index, call in enumerate(calls):
        if index % 2:
            assert call.result().finish_reason == "length"
        else:
            with pytest.raises(InferenceServerException, match="IMAGES"):
                call.result()


UNUSUAL_IMAGES = {
    "1x1": lambda: encode(picture().resize((1, 1))),
    "CMYK JPEG": lambda: encode(picture().convert("CMYK"), "JPEG"),
    "palette PNG": lambda: encode(picture().convert("P")),
    "alpha PNG": lambda: encode(picture().convert("RGBA")),
    "grey with alpha": lambda: encode(picture().convert("LA")),
    "black and white": lambda: encode(picture().convert("1")),
    "WebP": lambda: encode(picture(), "WEBP"),
    "GIF": lambda: encode(picture().convert("P"), "GIF"),
    "BMP": lambda: encode(picture(), "BMP"),
}


@pytest.mark.parametrize("name", UNUSUAL_IMAGES)
def test_unusual_image_works(server: TritonServer, name: str) -> None:
    reply = ask(server, {"PROMPT": ["hi"], "IMAGES": [UNUSUAL_IMAGES[name]()]}, max_tokens=2, ignore_eos=True)
    assert reply.usage["image_tokens"] > 0


def test_exif_rotation_is_applied(server: TritonServer) -> None:
    """An image rotated by its EXIF orientation gives the same prompt as the upright one."""
    replies = [
        ask(server, {"PROMPT": ["hi"], "IMAGES": [file]}, max_tokens=24, ignore_eos=True)
        for file in (PNG, rotated_by_exif(picture()))
    ]
    assert replies[0].token_ids == replies[1].token_ids
    assert replies[0].usage["image_tokens"] == replies[1].usage["image_tokens"]
