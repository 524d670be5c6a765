"""Bodies are parsed as Python's json parses them, but faster, and into memory that glibc retains."""

import json
import platform
import subprocess
import sys

import httpx
import pytest

INVALID = (
    b"{",
    b"hello",
    b'{"prompt": "x",}',
    b'{"prompt": "\n"}',
    b'{"prompt": "x"} 1',
    b'{"a": \xff}',
    b" ",
    b"[01]",
)


@pytest.mark.parametrize("body", INVALID)
def test_errors_have_the_position_that_python_reports(any_http: httpx.Client, body: bytes) -> None:
    answer = any_http.post("/tokenize", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "not_json"
    message = answer.json()["error"]["message"]
    try:
        json.loads(body)
    except json.JSONDecodeError as error:
        assert message == f"the body is not valid JSON: error at character {error.pos}"
    except UnicodeDecodeError as error:
        assert message == f"the body is not valid JSON: invalid utf-8 at byte {error.start}"


def test_values_that_cannot_be_parsed(any_http: httpx.Client) -> None:
    body = b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    answer = any_http.post("/tokenize", content=body, headers={"content-type": "application/json"})
    message = "the body is not valid JSON: a number is too long, or values are nested too deeply"
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, message)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-le"])
def test_encodings(any_http: httpx.Client, encoding: str) -> None:
    body = json.dumps({"prompt": "“设置”"}, ensure_ascii=False).encode(encoding)
    answer = any_http.post("/tokenize", content=body, headers={"content-type": "application/json"})
    assert answer.json() == any_http.post("/tokenize", json={"prompt": "“设置”"}).json()


def test_half_a_surrogate_pair(any_http: httpx.Client) -> None:
    answer = any_http.post("/tokenize", content=rb'{"prompt": "\ud800"}', headers={"content-type": "application/json"})
    assert (answer.status_code, "surrogate pair" in answer.json()["error"]["message"]) == (400, True)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="uses mallopt of glibc")
def test_freed_memory_is_retained_for_the_next_request() -> None:
    program = """
from resource import RUSAGE_SELF, getrusage
from gateway.__main__ import retain_freed_memory
def request(): return [bytes([i]) * (1 << 20) for i in range(6)]
retain_freed_memory()
request()
before = getrusage(RUSAGE_SELF).ru_minflt
for _ in range(10): request()
print(getrusage(RUSAGE_SELF).ru_minflt - before)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 100  # page faults; about 15000 without it
