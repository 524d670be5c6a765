"""Bodies are read as Python's json reads them, but faster, and into memory that is kept."""

import json
import platform
import subprocess
import sys

import httpx
import pytest

BROKEN = (b"{", b"hello", b'{"prompt": "x",}', b'{"prompt": "\n"}', b'{"prompt": "x"} 1', b'{"a": \xff}', b" ", b"[01]")


@pytest.mark.parametrize("body", BROKEN)
def test_what_is_no_json_is_told_as_python_tells_it(http: httpx.Client, body: bytes) -> None:
    answer = http.post("/tokenize", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    try:
        json.loads(body)
    except json.JSONDecodeError as error:
        assert message == f"the body is not JSON: {error.msg} at character {error.pos}"
    except UnicodeDecodeError:
        assert message == "There was an error parsing the body"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-le"])
def test_encodings(http: httpx.Client, encoding: str) -> None:
    body = json.dumps({"prompt": "“设置”"}, ensure_ascii=False).encode(encoding)
    answer = http.post("/tokenize", content=body, headers={"content-type": "application/json"})
    assert answer.json() == http.post("/tokenize", json={"prompt": "“设置”"}).json()


def test_half_a_surrogate_pair_is_told(http: httpx.Client) -> None:
    answer = http.post("/tokenize", content=rb'{"prompt": "\ud800"}', headers={"content-type": "application/json"})
    assert (answer.status_code, "surrogate pair" in answer.json()["error"]["message"]) == (400, True)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's memory that is kept")
def test_memory_is_kept_for_the_next_request() -> None:
    program = """
from resource import RUSAGE_SELF, getrusage
from gateway.__main__ import keep_memory
def request(): return [bytes([i]) * (1 << 20) for i in range(6)]
keep_memory()
request()
before = getrusage(RUSAGE_SELF).ru_minflt
for _ in range(10): request()
print(getrusage(RUSAGE_SELF).ru_minflt - before)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 100  # new pages; else some 15000
