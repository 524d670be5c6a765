"""The Python client and the command line against the real server with the demo checkpoint.

The fixture `server` has `grpc_url` (host:port) and `http_url` (with http://).
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from autoglm_client import AsyncClient, Cancelled, Client, InvalidRequest, RequestTimeout, Result
from autoglm_client.cli import main
from PIL import Image

from loadtest.samples import Sample, read_samples

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "demo" / "samples"
LONG: dict[str, Any] = {"ignore_eos": True, "max_tokens": 200}  # runs until stopped


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return read_samples(SAMPLES)


@pytest.fixture
def client(server: Any) -> Iterator[Client]:
    with Client(server.grpc_url) as client:
        yield client


def test_streams_a_thought_and_an_action(client: Client, samples: list[Sample]) -> None:
    assert client.is_ready()
    for task, image in samples:
        with client.stream(prompt=task, images=[image], temperature=0.0) as stream:
            pieces = list(stream)
            result = stream.result()
        assert len(pieces) > 1
        assert "".join(piece.text for piece in pieces) == result.text
        assert "</answer>" not in result.text
        assert result.thought
        assert result.action, result.action_error
        assert result.finish_reason == "stop"
        usage = result.usage
        assert usage.prompt_tokens > usage.image_tokens > 0
        assert usage.completion_tokens >= len(result.token_ids) - 1  # the end-of-text token may count
        assert usage.decode_ms > 0


def test_all_entry_points_give_the_same_answer(client: Client, samples: list[Sample]) -> None:
    task, image = samples[0]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": task}]}]
    streamed = client.stream(prompt=task, images=[image], temperature=0.0).result()
    whole = client.generate(prompt=task, images=[image], temperature=0.0)
    as_chat = client.generate(messages=chat, images=[image], temperature=0.0)
    assert streamed.text == whole.text == as_chat.text
    assert streamed.token_ids == whole.token_ids == as_chat.token_ids


def test_sampling_options_are_applied(client: Client, samples: list[Sample]) -> None:
    task, image = samples[0]
    plain = client.generate(prompt=task, images=[image], temperature=0.0)
    short = client.generate(prompt=task, images=[image], temperature=0.0, max_tokens=3)
    assert (short.finish_reason, short.token_ids) == ("length", plain.token_ids[:3])
    half = len(plain.text) // 2
    mark = plain.text[half : half + 4]
    stopped = client.generate(prompt=task, images=[image], temperature=0.0, stop=["never", mark])
    assert (stopped.finish_reason, stopped.text) == ("stop", plain.text.partition(mark)[0])

    def seeded(seed: int) -> str:
        return client.generate(prompt=task, images=[image], temperature=2.0, seed=seed, max_tokens=40).text

    assert seeded(1) == seeded(1)
    assert len({seeded(seed) for seed in range(4)}) > 1


def test_concurrent_answers_equal_sequential_ones(server: Any, client: Client, samples: list[Sample]) -> None:
    chosen = (samples * 8)[:8]
    alone = [client.generate(prompt=task, images=[image], temperature=0.0).text for task, image in chosen]

    async def together() -> list[Result]:
        async with AsyncClient(server.grpc_url) as aio:
            return await asyncio.gather(
                *(aio.stream(prompt=task, images=[image], temperature=0.0).result() for task, image in chosen)
            )

    assert [result.text for result in asyncio.run(together())] == alone


def test_invalid_requests_raise_their_own_errors(client: Client, samples: list[Sample]) -> None:
    task, image = samples[0]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"prompt": task, "images": [b"no image"]}, "IMAGES"),
        ({"messages": "not JSON"}, "MESSAGES"),
        ({"prompt": ""}, "PROMPT"),
        ({"prompt": task, "images": [image], "max_tokens": -1}, "max_tokens"),
        ({"prompt": task, "images": [image], "temperature": float("nan")}, "temperature"),
        ({"prompt": task, "images": [image], "tempperature": 1.0}, "tempperature"),
        ({"prompt": task, "images": [image], "priority": 11}, "priority"),  # received unchanged
    ]
    for arguments, field in wrong:
        with pytest.raises(InvalidRequest, match=field) as caught:
            client.generate(**arguments)
        assert "in ensemble" not in str(caught.value)
        assert "Traceback" not in str(caught.value)
    assert client.generate(prompt=task, images=[image]).text


def test_the_server_survives_cancelled_and_timed_out_requests(client: Client, samples: list[Sample]) -> None:
    task, image = samples[0]
    with client.stream(prompt=task, images=[image], **LONG) as stream:
        next(stream)
        stream.cancel()
        with pytest.raises(Cancelled):
            stream.result()
    for _ in range(10):
        client.stream(prompt=task, images=[image], **LONG).cancel()
    with pytest.raises(RequestTimeout):
        client.generate(prompt=task, images=[image], timeout=0.05, **LONG)
    assert client.generate(prompt=task, images=[image]).text


def test_a_stop_request_of_another_client_ends_the_stream(server: Any, client: Client, samples: list[Sample]) -> None:
    task, image = samples[0]
    with Client(server.grpc_url) as other:
        stream = client.stream(prompt=task, images=[image], request_id="to-be-stopped", **LONG)
        next(stream)
        assert other._send_stop("to-be-stopped")
        with pytest.raises(Cancelled, match="cancelled on the server"):
            stream.result()
        assert not other._send_stop("to-be-stopped")


def test_command_line(server: Any, samples: list[Sample], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    task, image = samples[0]
    screen, drawn = tmp_path / "screen.png", tmp_path / "out.png"
    screen.write_bytes(image)
    asked = ["ask", task, "--image", str(screen), "--server", server.grpc_url, "--temperature", "0"]
    assert main([*asked, "--draw", str(drawn)]) == 0
    output = capfd.readouterr()
    thought, _, action = output.out.rstrip("\n").rpartition("\n")
    assert thought
    assert action.startswith(("do(", "finish("))
    assert "first piece" in output.err
    with Image.open(screen) as before, Image.open(drawn) as after:
        assert before.size == after.size
        assert before.convert("RGB").tobytes() != after.tobytes()
    assert main([*asked, "--json"]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert answer["thought"] == thought
    assert answer["usage"]["image_tokens"] > 0


def test_load_test_runs_without_failures(server: Any) -> None:
    command = [sys.executable, "-m", "loadtest", "--users", "2", "--duration", "4", "--max-tokens", "16"]
    command += ["--grpc-server", server.grpc_url, "--http-server", server.http_url]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    for protocol in ("grpc", "http"):
        assert f"{protocol}     time to first token" in done.stdout
