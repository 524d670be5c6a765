"""What a running server takes: time to the first token and to the last, requests per second, memory by process.

    python -m benchmarks.served [--server 127.0.0.1:8001] [--setting int8|bf16]

All through the ensemble over gRPC, as the client sees it. Every screenshot is another 1080x2400 PNG (68x150 random
pixels, enlarged) with a short text, 3 422 tokens in all; a text has about 128. No two prompts begin alike, so that the
prefix cache holds nothing of them but the template. screenshot-first-token-grpc and text-first-token-grpc: requests for
one token; screenshot-65-grpc and text-65-grpc: to the last of 65, end-of-text ignored; screenshot-16-grpc: 16 such
requests at once, 16 / seconds until the last one is done. Medians.
"""

import argparse
import itertools
import statistics
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from autoglm_client import Client, Usage

from benchmarks.report import Row, make_row, read_server_options, report
from benchmarks.screens import random_screens

TOKENS = 65
AT_ONCE = 16
REPEATS = 5


class Server:
    """Prompts that no request has had before, sent over connections that stay open."""

    def __init__(self, address: str) -> None:
        self.clients = [Client(address) for _ in range(AT_ONCE)]
        self.numbers = itertools.count()

    def close(self) -> None:
        for client in self.clients:
            client.close()

    def fresh(self, with_image: bool, count: int) -> list[tuple[str, list[bytes]]]:
        """Texts with their images."""
        numbers = list(itertools.islice(self.numbers, count))
        if with_image:
            screens = random_screens(numbers[0], count)
            return [(f"{number:03} {'b' * 55}", [screen]) for number, screen in zip(numbers, screens, strict=True)]
        return [(f"{number:03} {'a' * 120}", []) for number in numbers]

    def ask(self, client: Client, prompt: tuple[str, list[bytes]], max_tokens: int) -> tuple[float, Usage]:
        """Seconds of one request for exactly so many tokens, and the server's account of it."""
        text, images = prompt
        began = time.perf_counter()
        usage = client.generate(prompt=text, images=images, max_tokens=max_tokens, ignore_eos=True).usage
        seconds = time.perf_counter() - began
        if usage.completion_tokens != max_tokens:
            raise RuntimeError(f"asked for {max_tokens} tokens, got {usage.completion_tokens}")
        return seconds, usage

    def alone(self, with_image: bool, max_tokens: int) -> tuple[float, dict[str, float]]:
        """Medians of milliseconds, as the client sees them, and by stage as the server does."""
        prompts = self.fresh(with_image, REPEATS + 1)
        runs = [self.ask(self.clients[0], prompt, max_tokens) for prompt in prompts][1:]
        stages = ("preprocess_ms", "vision_ms", "queue_ms", "prefill_ms", "prompt_tokens")
        also = {name.replace("_", " "): statistics.median(getattr(usage, name) for _, usage in runs) for name in stages}
        return statistics.median(seconds for seconds, _ in runs) * 1e3, also

    def together(self) -> float:
        """Seconds until so many screenshots that come at once are answered."""
        prompts = self.fresh(True, len(self.clients))
        began = time.perf_counter()
        with ThreadPoolExecutor(AT_ONCE) as threads:
            list(threads.map(self.ask, self.clients, prompts, [TOKENS] * AT_ONCE))
        return time.perf_counter() - began


def measure(server: Server, options: argparse.Namespace) -> Iterator[Row]:
    server.together()  # what happens once happens here
    for name, with_image in (("text", False), ("screenshot", True)):
        for what, tokens in (("first-token", 1), (str(TOKENS), TOKENS)):
            milliseconds, also = server.alone(with_image, tokens)
            yield make_row(options, f"{name}-{what}-grpc", milliseconds, "ms", also=also)
    seconds = statistics.median(server.together() for _ in range(3))
    yield make_row(options, f"screenshot-{AT_ONCE}-grpc", AT_ONCE / seconds, "requests/s")


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
    server = Server(options.server)
    try:
        rows = list(measure(server, options))
    finally:
        server.close()
    report(options, "served", rows + gpu_memory(options.setting))


if __name__ == "__main__":
    main()
