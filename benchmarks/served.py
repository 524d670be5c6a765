"""What a running server takes: time to the first token, time per token, memory by process.

    python -m benchmarks.served [--server 127.0.0.1:8001] [--setting int8|bf16]

Workloads: `text` is a prompt of about 128 tokens; `screenshot` is a 1080x2400 image, another one each time, made by
enlarging 68x150 random pixels, with about 70 tokens of text. No two prompts begin alike, so that the prefix cache holds
nothing of them but the template. Each is asked for 65 tokens, end-of-text ignored; medians.
"""

import statistics
import subprocess
import time
from pathlib import Path

from autoglm_client import Client

from benchmarks.report import Row, read_server_options, report
from benchmarks.screens import random_screen

TOKENS = 65
REPEATS = 5


def measure(client: Client, prompt: str, images: list[bytes]) -> dict[str, float]:
    """Milliseconds of one request as its caller sees them, the server's own by stage, and the length of its prompt."""
    started = time.perf_counter()
    arrivals: list[float] = []
    stream = client.stream(prompt=prompt, images=images, max_tokens=TOKENS, ignore_eos=True)
    for piece in stream:
        arrivals += [time.perf_counter()] * len(piece.token_ids)
    usage = stream.result().usage
    return {
        "first-token": (arrivals[0] - started) * 1e3,
        "per-token": (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1) * 1e3,
        "total": (arrivals[-1] - started) * 1e3,
        "preprocess": usage.preprocess_ms,
        "vision": usage.vision_ms,
        "queue": usage.queue_ms,
        "prefill": usage.prefill_ms,
        "prompt-tokens": usage.prompt_tokens,
    }


def gpu_memory(setting: str) -> list[Row]:
    """Memory on the GPU by process, MiB, as nvidia-smi reports it; empty without one."""
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []
    rows = []
    for line in lines:
        pid, used = (part.strip() for part in line.split(","))
        rows.append(Row(f"served-memory-{process_name(int(pid))}", setting, float(used), "MiB"))
    return rows


def process_name(pid: int) -> str:
    """The Triton model that a stub process serves, or the program's name."""
    arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    model = next((Path(a).parts[-3] for a in arguments if a.endswith("/1/model.py")), "")
    return model or Path(arguments[0]).name


def main() -> None:
    options = read_server_options(__doc__)
    rows: list[Row] = []
    with Client(options.server) as client:
        for name, images, text in (("text", 0, "a" * 120), ("screenshot", 1, "b" * 64)):
            runs = [
                measure(client, f"{repeat}{i} {text}", [random_screen(1000 * repeat + i)] * images)
                for repeat in range(2)
                for i in range(REPEATS)
            ][REPEATS:]  # the first round warms up
            for key in runs[0]:
                value = statistics.median(run[key] for run in runs)
                unit = "tokens" if key == "prompt-tokens" else "ms"
                rows.append(Row(f"served-{name}-{key}", options.setting, round(value, 2), unit))
    report(options, "served", rows + gpu_memory(options.setting))


if __name__ == "__main__":
    main()
