"""A real request to a running server: the proof that it answers, which Triton's own readiness is not.

    python -m autoglm_launcher.probe [--http HOST:PORT] [--timeout SECONDS] [--gateway HOST:PORT]

asks for one token about a sample screenshot through the whole ensemble; exit code 0 when it comes, and when
the gateway is ready too, where one is named.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

from autoglm_launcher import ROOT
from autoglm_launcher.gateway import fault_of

ENSEMBLE = "ensemble"
# How the engine and Triton say that too much waits already. The HTTP status does not tell: a stream's errors are 400.
BUSY = re.compile("UNAVAILABLE:|RESOURCE_EXHAUSTED:|Exceeds maximum queue size|Request timeout expired")
LANGUAGE_MODEL = "autoglm_llm"  # its last step
SAMPLES = ROOT / "demo" / "samples"
SPOKEN_SAMPLES = SAMPLES.parent / "speech" / "samples"


class ProbeError(Exception):
    """The server did not answer. busy: it refused the request because it has too many, so it is well."""

    @property
    def busy(self) -> bool:
        return BUSY.search(str(self)) is not None


@dataclass(frozen=True)
class Sample:
    """A screenshot and a task for it, which is typed, or spoken in a file."""

    image: Path
    task: str
    sound: Path | None = None

    @classmethod
    def first(cls, directory: Path | None = None) -> Sample:
        """The first of samples.json, by default of demo/samples. Raises ProbeError when there is none."""
        directory = directory or SAMPLES
        return cls._read(directory, lambda entry: cls(directory / entry["image"], entry["task"]))

    @classmethod
    def spoken(cls) -> Sample:
        """The first of demo/speech/samples. Raises ProbeError when there is none."""
        place = SPOKEN_SAMPLES
        return cls._read(place, lambda entry: cls(SAMPLES / entry["image"], entry["text"], place / entry["sound"]))

    @classmethod
    def _read(cls, directory: Path, make: Callable[[dict[str, Any]], Sample]) -> Sample:
        try:
            sample = make(json.loads((directory / "samples.json").read_text(encoding="utf-8"))[0])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ProbeError(f"{directory / 'samples.json'} cannot be read: {error}") from None
        for kind, path in (("screenshot", sample.image), ("sound", sample.sound)):
            if path is not None and not path.is_file():
                raise ProbeError(f"the sample {kind} {path} is missing")
        return sample

    def inputs(self) -> dict[str, Any]:
        """As the ensemble's inputs."""
        if self.sound is None:
            return {"PROMPT": self.task, "IMAGES": [_data_url("image/png", self.image)]}
        sound = _data_url(f"audio/{self.sound.suffix[1:]}", self.sound)
        return {"PROMPT": "", "IMAGES": [_data_url("image/png", self.image)], "AUDIO": [sound]}


def _data_url(media_type: str, path: Path) -> str:
    return f"data:{media_type};base64," + base64.b64encode(path.read_bytes()).decode()


@dataclass(frozen=True)
class Answer:
    """What came, and how long it took. Times in seconds from the request. heard: of a spoken task, in words."""

    text: str
    heard: str
    finish_reason: str
    usage: dict[str, Any]
    first_token_s: float
    total_s: float


def ask(http_address: str, sample: Sample, *, max_tokens: int, timeout_s: float) -> Answer:
    """Send a sample through the ensemble and read the stream to its end. Greedy, before other requests.

    timeout_s bounds each wait for the next piece. Raises ProbeError when anything is not as it must be.
    """
    body = {**sample.inputs(), "max_tokens": max_tokens, "temperature": 0.0, "priority": 1}
    connection = HTTPConnection(http_address, timeout=timeout_s)
    begin = time.monotonic()
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", f"/v2/models/{ENSEMBLE}/generate_stream", json.dumps(body), headers)
        return _read(connection.getresponse(), begin)
    except TimeoutError:
        raise ProbeError(f"no answer in {timeout_s:.0f} s") from None
    except (OSError, HTTPException) as error:
        raise ProbeError(f"no answer from {http_address}: {error or type(error).__name__}") from None
    finally:
        connection.close()


def responses_so_far(http_address: str, timeout_s: float = 5.0) -> int:
    """How many responses the language model has sent to anybody; it grows while the server works.

    Raises ProbeError when the server does not say.
    """
    connection = HTTPConnection(http_address, timeout=timeout_s)
    try:
        connection.request("GET", f"/v2/models/{LANGUAGE_MODEL}/stats")
        (statistics,) = json.loads(connection.getresponse().read())["model_stats"]
        return sum(int(response["success"]["count"]) for response in statistics.get("response_stats", {}).values())
    except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
        raise ProbeError(f"no statistics from {http_address}: {error}") from None
    finally:
        connection.close()


def _read(response: HTTPResponse, begin: float) -> Answer:
    if response.status != 200:
        message = response.read().decode(errors="replace").removeprefix("data: ").strip()
        raise ProbeError(f"HTTP {response.status}: {message[:300]}")
    text, heard, finish_reason, first = "", "", "", 0.0
    usage: dict[str, Any] = {}
    for line in response:
        if not line.startswith(b"data:"):
            continue
        event = json.loads(line[len(b"data:") :])
        if "error" in event:
            raise ProbeError(str(event["error"])[:300])
        first = first or time.monotonic() - begin
        text += event.get("TEXT", "")
        heard += event.get("TRANSCRIPTS") or ""
        finish_reason = event.get("FINISH_REASON") or finish_reason
        usage = json.loads(event["USAGE"]) if event.get("USAGE") else usage
    if not finish_reason or not usage.get("completion_tokens"):
        raise ProbeError(f"the answer ended without a finish reason or a token: {text[:100]!r}")
    return Answer(text, heard, finish_reason, usage, first, time.monotonic() - begin)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m autoglm_launcher.probe", description="Ask the server one token.")
    parser.add_argument("--http", default="127.0.0.1:8000", metavar="HOST:PORT")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="SECONDS")
    parser.add_argument("--gateway", metavar="HOST:PORT", help="a gateway that must be ready (default: none)")
    options = parser.parse_args(argv)
    try:
        answer = ask(options.http, Sample.first(), max_tokens=1, timeout_s=options.timeout)
        if options.gateway and (fault := fault_of(options.gateway, "/ready")):
            raise ProbeError(f"gateway: {fault}")
    except ProbeError as error:
        print(f"probe: {error}", file=sys.stderr)
        return 0 if error.busy else 1
    print(f"probe: {answer.usage['completion_tokens']} token in {answer.total_s:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
