"""Images on the real server: known ones, many at once, resized as asked, and a mix of good and hostile ones."""

import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from tritonclient.utils import InferenceServerException

from autoglm.serving.metrics import INTERVAL
from autoglm_launcher.server import TritonServer
from tests.e2e.conftest import ROOT
from tests.e2e.test_bad_input import bomb, broken_pixels
from tests.e2e.triton import Call, ask, metric
from tests.images import encode, picture

SHORT = {"max_tokens": 2, "ignore_eos": True}
MIB = 2**20


def cache_counters(server: TritonServer) -> tuple[float, float]:
    """Hits and misses of the feature cache after everything before this call has been counted."""
    time.sleep(1.5 * INTERVAL)
    return metric(server, "autoglm_vision_cache_hits_total"), metric(server, "autoglm_vision_cache_misses_total")


def test_a_known_image_is_found(server: TritonServer) -> None:
    file = encode(picture(1080, 1920, seed=301))
    hits, misses = cache_counters(server)
    first = ask(server, {"PROMPT": ["first"], "IMAGES": [file]}, **SHORT)
    assert cache_counters(server) == (hits, misses + 1)
    second = ask(server, {"PROMPT": ["second"], "IMAGES": [file]}, **SHORT)
    assert cache_counters(server) == (hits + 1, misses + 1)
    assert second.usage["vision_ms"] < first.usage["vision_ms"] / 5
    assert metric(server, "autoglm_vision_cache_entries") > 0
    assert metric(server, "autoglm_vision_cache_bytes") > 0


def test_pixel_limits_of_a_request(server: TritonServer) -> None:
    """The same file in another size is another image, for the language model's prefix cache too."""
    inputs: dict[str, list[bytes | str]] = {"PROMPT": ["hi"], "IMAGES": [encode(picture(224, 336, seed=302))]}
    whole = ask(server, inputs, **SHORT)
    small = ask(server, inputs, max_pixels=2 * 112 * 168, **SHORT)
    assert whole.usage["image_tokens"] == 8 * 12
    assert small.usage["image_tokens"] == 4 * 6
    assert small.usage["cached_tokens"] < 16
    assert ask(server, inputs, max_pixels=2 * 112 * 168, **SHORT).token_ids == small.token_ids


def test_one_command_shows_the_batching(server: TritonServer) -> None:
    command = [sys.executable, "-m", "loadtest.batching", "--requests", "32"]
    command += ["--grpc-server", server.grpc_url, "--metrics", server.metrics_url]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    counters = {words[0]: int(words[3]) for words in map(str.split, ran.stdout.splitlines()[1:3])}
    assert counters["nv_inference_count"] == 32
    assert counters["nv_inference_exec_count"] <= 16, ran.stdout


def test_a_hostile_mix_stops_nobody_and_leaks_nothing(server: TritonServer) -> None:
    """Rounds of bombs, truncated and wrong files, tiny ones and a huge one, among good requests; all at once."""
    (encoder,) = [process.pid for process in server.processes() if process.instance.startswith("vit_encoder")]
    truncated_jpeg = encode(picture(600, 600, seed=303), "JPEG")
    tiny = [encode(picture(8, 8, seed=seed)) for seed in range(10)]
    refused = [
        ([tiny[0], bomb()], "IMAGES[1]: got 60000x60000"),
        ([broken_pixels()], "IMAGES[0]: the pixels of this PNG"),
        ([tiny[0], tiny[1], broken_pixels()], "IMAGES[2]: the pixels of this PNG"),
        ([truncated_jpeg[: len(truncated_jpeg) // 2]], "IMAGES[0]: the pixels of this JPEG"),
        ([truncated_jpeg[:40]], "IMAGES[0]: got a truncated JPEG"),
        ([b"neither this nor that"], "IMAGES[0]: got a file that begins with"),
        (tiny * 20, "IMAGES: got 200 images; allowed: at most 10"),
        ([encode(Image.new("1", (20000, 20000)))], "IMAGES[0]: got 20000x20000"),
    ]
    huge = encode(Image.new("L", (8000, 8000), 200))
    held = [resident(encoder)]
    for round_ in range(8):
        good = [[encode(picture(300, 400, seed=1000 * round_ + i))] for i in range(6)]
        good += [[huge + bytes([round_])], [file + bytes([round_]) for file in tiny], [tiny[round_]] * 10]
        bad = [Call(server, {"PROMPT": ["hi"], "IMAGES": files}, SHORT) for files, _ in refused]
        calls = [Call(server, {"PROMPT": ["hi"], "IMAGES": files}, SHORT) for files in good]
        for call, (_, message) in zip(bad, refused, strict=True):
            with pytest.raises(InferenceServerException) as caught:
                call.result()
            assert f"INVALID_ARGUMENT: {message}" in caught.value.message()
        assert [call.result().finish_reason for call in calls] == ["length"] * len(calls)
        held.append(resident(encoder))
    shown = [size // MIB for size in held]
    print("resident MiB before the first and after each round:", shown)
    assert held[-1] - held[0] < 128 * MIB, shown


def resident(pid: int) -> int:
    """Bytes of memory that a process holds, shared memory excluded."""
    _, total, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    return (total - shared) * resource.getpagesize()
