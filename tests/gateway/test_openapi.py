"""The OpenAPI document matches the server's checks, and no request, valid or not, makes the gateway fail."""

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from autoglm.errors import RequestError
from autoglm.media.payload import DATA_URL
from autoglm.preprocess.options import options
from autoglm.preprocess.response_format import KINDS
from autoglm.preprocess.sampling_params import MAX_LOGPROBS, MediaOptions, SamplingParams
from autoglm_launcher.server import TritonServer
from gateway.app import create_app
from gateway.openapi import EXAMPLES, WHITE_IMAGE
from tests.gateway.running import configured, serve

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
CHECKS = {each.name: each.kind.check for table in (SamplingParams, MediaOptions) for each in options(table).values()}


def document(*, keys: Path | None = None, **settings: Any) -> dict[str, Any]:
    return create_app("127.0.0.1:1", configured(**settings), keys).openapi()


def ranges() -> Iterator[tuple[str, dict[str, Any]]]:
    """The fields that the server checks, with the document's schemas of their values."""
    for name, field in document()["components"]["schemas"]["ChatRequest"]["properties"].items():
        if name in CHECKS and name != "timeout":  # in seconds, checked by the gateway
            [kind] = [kind for kind in field["anyOf"] if kind.get("type") in ("integer", "number")] or [{}]
            yield name, kind


BOUNDS = [(name, kind, key) for name, kind in ranges() for key in kind if key.lower().endswith(("minimum", "maximum"))]


@pytest.mark.parametrize(("name", "kind", "key"), BOUNDS, ids=[f"{name}-{key}" for name, _, key in BOUNDS])
def test_ranges_are_those_of_the_server(name: str, kind: dict[str, Any], key: str) -> None:
    integer, bound = kind["type"] == "integer", kind[key]
    outwards = -1 if "inimum" in key else 1
    outside = bound + outwards if integer else math.nextafter(bound, outwards * math.inf)
    allowed, refused = (bound, outside) if "exclusive" not in key else (bound - outwards * 1e-9, bound)
    CHECKS[name](name, allowed)
    with pytest.raises(RequestError, match=name):
        CHECKS[name](name, refused)


def test_every_number_has_a_range_and_every_word_is_in_a_list() -> None:
    numbers = {name for name, kind in ranges() if kind}
    assert numbers == {name for name, _, _ in BOUNDS}
    assert {"temperature", "top_p", "top_k", "max_tokens", "seed", "priority", "sparse_ratio"} <= numbers
    fields = document()["components"]["schemas"]["ChatRequest"]["properties"]
    for name, words in (("sparse_mode", "off topk pages prune"), ("audio_mode", "transcript bridge")):
        assert list(fields[name]["anyOf"][0]["enum"]) == words.split()
        for word in words.split():
            CHECKS[name](name, word)
    formats = [each["$ref"].rpartition("/")[2] for each in fields["response_format"]["anyOf"][0]["oneOf"]]
    schemas = document()["components"]["schemas"]
    assert tuple(schemas[name]["properties"]["type"]["const"] for name in formats) == KINDS
    assert fields["top_logprobs"]["anyOf"][0] == {"type": "integer", "minimum": 0, "maximum": MAX_LOGPROBS}
    CHECKS["logprobs"]("logprobs", MAX_LOGPROBS)
    label = schemas["JsonSchema"]["properties"]["name"]["anyOf"][0]["pattern"]
    assert re.search(label, "a-Z_9") and not re.search(label, "a b")
    stop, stops = fields["stop"]["anyOf"][:2]
    CHECKS["stop"]("stop", ["x" * stop["minLength"]] * stops["maxItems"])
    for refused in (["x"] * (stops["maxItems"] + 1), [""]):
        with pytest.raises(RequestError):
            CHECKS["stop"]("stop", refused)


def test_the_document_has_the_limits_of_this_server(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("key")
    open_, closed = document(model_name="phone", max_body_mb=7), document(keys=tmp_path / "keys")
    schemas = open_["components"]["schemas"]
    assert schemas["ChatRequest"]["properties"]["model"]["enum"] == ["phone", None]
    assert schemas["TokenizeRequest"]["properties"]["model"]["enum"] == ["phone", None]
    image = schemas["ImageUrl"]["properties"]["url"]
    assert "at most 10 images" in image["description"]
    assert 33554432 * 4 / 3 < image["maxLength"] < 33554432 * 4 / 3 + 50
    chat, shut = (each["paths"]["/v1/chat/completions"]["post"] for each in (open_, closed))
    assert "7 MiB" in chat["responses"]["413"]["description"]
    assert "422" not in chat["responses"]
    assert ("security" in chat, "401" in chat["responses"]) == (False, False)
    assert shut["security"] == [{"key": []}]
    assert "401" in shut["responses"]
    assert "security" not in closed["paths"]["/health"]["get"]


def test_examples_are_answered(any_http: httpx.Client) -> None:
    served = any_http.get("/openapi.json").json()
    assert DATA_URL.match(WHITE_IMAGE)
    for path, request in zip(("/v1/chat/completions", "/v1/completions", "/tokenize"), EXAMPLES, strict=True):
        content = served["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert content["schema"]["$ref"].endswith(f"/{request.__name__}")
        answer = any_http.post(path, json=content["example"])
        assert answer.status_code == 200, answer.text


@pytest.fixture
def brief(demo_checkpoint: Path, tmp_path: Path) -> Iterator[str]:
    """A gateway to a server with short answers: most random requests would have no other end."""
    environment = {"AUTOGLM_OVERRIDES": "engine: {max_context: 64}"}
    with (
        TritonServer(checkpoint=demo_checkpoint, log_path=tmp_path / "log", environment=environment) as server,
        serve(create_app(server.grpc_url, configured())) as url,
    ):
        yield url


def test_no_request_makes_the_gateway_fail(brief: str, tmp_path: Path) -> None:
    command = [str(SCHEMATHESIS), "run", f"{brief}/openapi.json", "--seed", "1", "--max-examples", "20"]
    command += ["--checks", "not_a_server_error,content_type_conformance,response_schema_conformance"]
    command += ["--phases", "examples,coverage,fuzzing", "--request-timeout", "20", "--workers", "4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
