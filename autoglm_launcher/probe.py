"""A real request to a running server, which proves that it answers; Triton's own readiness does not.

    python -m autoglm_launcher.probe [--http HOST:PORT] [--timeout SECONDS] [--gateway HOST:PORT]

requests one token for a sample screenshot through the whole ensemble. Exit code 0 if it arrives and the gateway, if
one is named, is ready.
"""

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
from autoglm_launcher.console import LauncherError
from autoglm_launcher.gateway import fault_of
from autoglm_launcher.ports import no_answer

ENSEMBLE = "ensemble"
# Messages of the engine and of Triton about a full queue. The HTTP status is no help: a stream's errors are all 400.
BUSY = re.compile("UNAVAILABLE:|Exceeds maximum queue size|Request timeout expired")
LANGUAGE_MODEL = "autoglm_llm"  # the ensemble's last step
SAMPLES = ROOT / "demo" / "samples"
SPOKEN_SAMPLES = SAMPLES.parent / "speech" / "samples"


class ProbeError(LauncherError):
    """The server did not answer."""

    @property
    def busy(self) -> bool:
        """Whether the server refused the request because its queue is full, so it is healthy."""
        return BUSY.search(str(self)) is not None


@dataclass(frozen=True)
class Sample:
    """A screenshot and a task for it. clip: an audio file with the spoken task; None: the task is sent as text."""

    image: Path
    task: str
    clip: Path | None = None

    @classmethod
    def first(cls, directory: Path | None = None) -> "Sample":
        """The first entry of samples.json, by default in demo/samples. Raises ProbeError if there is none."""
        directory = directory or SAMPLES
        return cls._read(directory, lambda entry: cls(directory / entry["image"], entry["task"]))

    @classmethod
    def spoken(cls) -> "Sample":
        """The first entry of demo/speech/samples. Raises ProbeError if there is none."""
        folder = SPOKEN_SAMPLES
        return cls._read(folder, lambda entry: cls(SAMPLES / entry["image"], entry["text"], folder / entry["audio"]))

    @classmethod
    def _read(cls, directory: Path, make: Callable[[dict[str, Any]], "Sample"]) -> "Sample":
        try:
            sample = make(json.loads((directory / "samples.json").read_text(encoding="utf-8"))[0])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ProbeError(f"{directory / 'samples.json'} is missing or is not a list of samples") from error
        for kind, path in (("screenshot", sample.image), ("clip", sample.clip)):
            if path is not None and not path.is_file():
                raise ProbeError(f"the sample {kind} {path} is missing")
        return sample

    def inputs(self) -> dict[str, Any]:
        """The inputs of the ensemble."""
        images = [_data_url("image/png", self.image)]
        if self.clip is None:
            return {"PROMPT": self.task, "IMAGES": images}
        return {"PROMPT": "", "IMAGES": images, "AUDIO": [_data_url(f"audio/{self.clip.suffix[1:]}", self.clip)]}


def _data_url(media_type: str, path: Path) -> str:
    return f"data:{media_type};base64," + base64.b64encode(path.read_bytes()).decode()


@dataclass(frozen=True)
class ProbeResult:
    """A complete answer. transcript: the text of a spoken task. Times are in seconds since the request."""

    text: str
    transcript: str
    finish_reason: str
    usage: dict[str, Any]
    first_token_s: float
    total_s: float


def ask(http_address: str, sample: Sample, *, max_tokens: int, timeout_s: float) -> ProbeResult:
    """Send a sample through the ensemble, with greedy sampling and high priority, and read the stream to its end.

    timeout_s limits each wait for the next piece. Raises ProbeError if the answer is missing or incomplete.
    """
    body = {**sample.inputs(), "max_tokens": max_tokens, "temperature": 0.0, "priority": 1}
    connection = HTTPConnection(http_address, timeout=timeout_s)
    begin = time.monotonic()
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", f"/v2/models/{ENSEMBLE}/generate_stream", json.dumps(body), headers)
        return _read(connection.getresponse(), begin)
    except (OSError, HTTPException) as error:
        raise ProbeError(no_answer(http_address, error)) from error
    finally:
        connection.close()


def count_responses(http_address: str, timeout_s: float = 5.0) -> int:
    """The number of responses that the language model has sent to any caller; it grows while the server works.

    Raises ProbeError if the server does not report it.
    """
    connection = HTTPConnection(http_address, timeout=timeout_s)
    try:
        connection.request("GET", f"/v2/models/{LANGUAGE_MODEL}/stats")
        (statistics,) = json.loads(connection.getresponse().read())["model_stats"]
        return sum(int(response["success"]["count"]) for response in statistics.get("response_stats", {}).values())
    except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
        raise ProbeError(f"no statistics from {http_address}") from error
    finally:
        connection.close()


def _read(response: HTTPResponse, begin: float) -> ProbeResult:
    if response.status != 200:
        message = response.read().decode(errors="replace").removeprefix("data: ").strip()
        raise ProbeError(f"HTTP {response.status}: {message[:300]}")
    text, transcript, finish_reason, first = "", "", "", 0.0
    usage: dict[str, Any] = {}
    for line in response:
        if not line.startswith(b"data:"):
            continue
        event = json.loads(line[len(b"data:") :])
        if "error" in event:
            raise ProbeError(str(event["error"])[:300])
        first = first or time.monotonic() - begin
        text += event.get("TEXT", "")
        transcript += event.get("TRANSCRIPTS") or ""
        finish_reason = event.get("FINISH_REASON") or finish_reason
        usage = json.loads(event["USAGE"]) if event.get("USAGE") else usage
    if not finish_reason or not usage.get("completion_tokens"):
        raise ProbeError(f"the answer ended without a finish reason or a token: {text[:100]!r}")
    return ProbeResult(text, transcript, finish_reason, usage, first, time.monotonic() - begin)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m autoglm_launcher.probe", description="Request one token.")
    parser.add_argument("--http", default="127.0.0.1:8000", metavar="HOST:PORT")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="SECONDS")
    parser.add_argument("--gateway", metavar="HOST:PORT", help="a gateway that must be ready (default: none)")
    options = parser.parse_args(argv)
    try:
        result = ask(options.http, Sample.first(), max_tokens=1, timeout_s=options.timeout)
        if options.gateway and (fault := fault_of(options.gateway, "/ready")):
            raise ProbeError(f"gateway: {fault}")
    except ProbeError as error:
        print(f"probe: {error}", file=sys.stderr)
        return 0 if error.busy else 1
    print(f"probe: {result.usage['completion_tokens']} token in {result.total_s:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
