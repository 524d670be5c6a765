"""A running server over gRPC: latency, throughput, and GPU memory by process.

    python -m benchmarks.served [--server 127.0.0.1:8001] [--setting int8|bf16]

Requests pass through the whole ensemble. Every screenshot is a new 1080x2400 PNG (68x150 random pixels, upscaled) with
a short text, 3,422 tokens in total; a text has about 128. Prompts share no prefix but the template's.
screenshot-first-token-grpc, text-first-token-grpc: requests for one token; screenshot-65-grpc, text-65-grpc: to the
last of 65 tokens, end-of-text ignored; screenshot-16-grpc: 16 such requests concurrently, 16 / seconds until the last
one is done. Medians.
"""

import argparse
import itertools
import statistics
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from autoglm_client import Client, Usage

from benchmarks.report import Row, make_row, read_server_options, report
from benchmarks.screens import random_screens

TOKENS = 65
CONCURRENCY = 16
REPEATS = 5


class BenchmarkClient:
    """Sends new prompts over persistent connections."""

    def __init__(self, address: str) -> None:
        self.clients = [Client(address) for _ in range(CONCURRENCY)]
        self.prompt_ids = itertools.count()

    def close(self) -> None:
        for client in self.clients:
            client.close()

    def new_prompts(self, with_image: bool, count: int) -> list[tuple[str, list[bytes]]]:
        """Texts and their images."""
        ids = list(itertools.islice(self.prompt_ids, count))
        if with_image:
            screens = random_screens(ids[0], count)
            return [(f"{id_:03} {'b' * 55}", [screen]) for id_, screen in zip(ids, screens, strict=True)]
        return [(f"{id_:03} {'a' * 120}", []) for id_ in ids]

    def ask(self, client: Client, prompt: tuple[str, list[bytes]], max_tokens: int) -> tuple[float, Usage]:
        """Seconds of one request for exactly `max_tokens` tokens, and its usage."""
        text, images = prompt
        start = time.perf_counter()
        usage = client.generate(prompt=text, images=images, max_tokens=max_tokens, ignore_eos=True).usage
        seconds = time.perf_counter() - start
        if usage.completion_tokens != max_tokens:
            raise RuntimeError(f"the answer must have {max_tokens} tokens (got {usage.completion_tokens})")
        return seconds, usage

    def one(self, with_image: bool, max_tokens: int) -> tuple[float, dict[str, float]]:
        """Median milliseconds of single requests, and the server's median times by stage."""
        prompts = self.new_prompts(with_image, REPEATS + 1)
        runs = [self.ask(self.clients[0], prompt, max_tokens) for prompt in prompts][1:]
        stages = ("preprocess_ms", "vision_ms", "queue_ms", "prefill_ms", "prompt_tokens")
        also = {name.replace("_", " "): statistics.median(getattr(usage, name) for _, usage in runs) for name in stages}
        return statistics.median(seconds for seconds, _ in runs) * 1e3, also

    def concurrent(self) -> float:
        """Seconds until all of CONCURRENCY screenshots are answered."""
        prompts = self.new_prompts(True, len(self.clients))
        start = time.perf_counter()
        with ThreadPoolExecutor(CONCURRENCY) as threads:
            list(threads.map(self.ask, self.clients, prompts, [TOKENS] * CONCURRENCY))
        return time.perf_counter() - start


def measure(client: BenchmarkClient, options: argparse.Namespace) -> Iterator[Row]:
    client.concurrent()  # warm-up
    for name, with_image in (("text", False), ("screenshot", True)):
        for figure, tokens in (("first-token", 1), (str(TOKENS), TOKENS)):
            milliseconds, also = client.one(with_image, tokens)
            yield make_row(options, f"{name}-{figure}-grpc", milliseconds, "ms", also=also)
    seconds = statistics.median(client.concurrent() for _ in range(3))
    yield make_row(options, f"screenshot-{CONCURRENCY}-grpc", CONCURRENCY / seconds, "requests/s")


def gpu_memory(setting: str) -> list[Row]:
    """GPU memory in MiB by process, from nvidia-smi; empty without a GPU."""
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
    """The Triton model that a stub process serves; the executable's name for other processes."""
    arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    model = next((Path(a).parts[-3] for a in arguments if a.endswith("/1/model.py")), "")
    return model or Path(arguments[0]).name


def main() -> None:
    options = read_server_options(__doc__)
    with closing(BenchmarkClient(options.server)) as client:
        rows = list(measure(client, options))
    report(options, "served", rows + gpu_memory(options.setting))


if __name__ == "__main__":
    main()
