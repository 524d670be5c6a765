"""Images on the real server: the feature cache, batching, pixel limits, and a mix of valid and hostile files."""

import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from tritonclient.utils import InferenceServerException

from autoglm.serving.metrics import UPDATE_INTERVAL_S
from autoglm_launcher.server import TritonServer
from tests.e2e.conftest import ROOT
from tests.e2e.ensemble_client import Call, ask, metric
from tests.e2e.test_bad_input import bomb, broken_pixels
from tests.images import encode, picture

SHORT = {"max_tokens": 2, "ignore_eos": True}
MIB = 2**20


def cache_counters(server: TritonServer) -> tuple[float, float]:
    """Hits and misses of the feature cache, once all earlier requests have been counted."""
    time.sleep(1.5 * UPDATE_INTERVAL_S)
    return metric(server, "autoglm_vision_cache_hits_total"), metric(server, "autoglm_vision_cache_misses_total")


def test_a_cached_image_is_not_encoded_again(server: TritonServer) -> None:
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
    """The same file at another size is another image, for the prefix cache too."""
    inputs: dict[str, list[bytes | str]] = {"PROMPT": ["hi"], "IMAGES": [encode(picture(224, 336, seed=302))]}
    whole = ask(server, inputs, **SHORT)
    small = ask(server, inputs, max_pixels=2 * 112 * 168, **SHORT)
    assert whole.usage["image_tokens"] == 8 * 12
    assert small.usage["image_tokens"] == 4 * 6
    assert small.usage["cached_tokens"] < 16
    assert ask(server, inputs, max_pixels=2 * 112 * 168, **SHORT).token_ids == small.token_ids


def test_the_batching_command(server: TritonServer) -> None:
    command = [sys.executable, "-m", "loadtest.batching", "--requests", "32"]
    command += ["--grpc-server", server.grpc_url, "--metrics", server.metrics_url]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    counters = {words[0]: int(words[3]) for words in map(str.split, ran.stdout.splitlines()[1:3])}
    assert counters["nv_inference_count"] == 32
    assert counters["nv_inference_exec_count"] <= 16, ran.stdout


def test_hostile_files_harm_no_other_request_and_leak_no_memory(server: TritonServer) -> None:
    """Rounds of bombs, truncated and invalid files, tiny images and a huge one, concurrent with valid requests."""
    (encoder,) = [process.pid for process in server.processes() if process.instance.startswith("vit_encoder")]
    truncated_jpeg = encode(picture(600, 600, seed=303), "JPEG")
    tiny = [encode(picture(8, 8, seed=seed)) for seed in range(10)]
    rejected = [
        ([tiny[0], bomb()], "IMAGES[1] must be an image of at most 67108864 pixels (got 60000x60000"),
        ([broken_pixels()], "IMAGES[0] is a damaged PNG"),
        ([tiny[0], tiny[1], broken_pixels()], "IMAGES[2] is a damaged PNG"),
        ([truncated_jpeg[: len(truncated_jpeg) // 2]], "IMAGES[0] is a damaged JPEG"),
        ([truncated_jpeg[:40]], "IMAGES[0] is a truncated JPEG file"),
        ([b"neither this nor that"], "IMAGES[0] must be a "),
        (tiny * 20, "IMAGES must be at most 10 per request (got 200)"),
        ([encode(Image.new("1", (20000, 20000)))], "IMAGES[0] must be an image of at most 67108864 pixels"),
    ]
    huge = encode(Image.new("L", (8000, 8000), 200))
    sizes = [resident(encoder)]
    for round_ in range(8):
        good = [[encode(picture(300, 400, seed=1000 * round_ + i))] for i in range(6)]
        good += [[huge + bytes([round_])], [file + bytes([round_]) for file in tiny], [tiny[round_]] * 10]
        bad = [Call(server, {"PROMPT": ["hi"], "IMAGES": files}, SHORT) for files, _ in rejected]
        calls = [Call(server, {"PROMPT": ["hi"], "IMAGES": files}, SHORT) for files in good]
        for call, (_, message) in zip(bad, rejected, strict=True):
            with pytest.raises(InferenceServerException) as caught:
                call.result()
            assert f"INVALID_ARGUMENT: {message}" in caught.value.message()
        assert [call.result().finish_reason for call in calls] == ["length"] * len(calls)
        sizes.append(resident(encoder))
    in_mib = [size // MIB for size in sizes]
    print("resident MiB before the first and after each round:", in_mib)
    assert sizes[-1] - sizes[0] < 128 * MIB, in_mib


def resident(pid: int) -> int:
    """Resident bytes of a process, without shared memory."""
    _, total, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    return (total - shared) * resource.getpagesize()
