"""Shows the server's batching of images: many at once, and how often the vision encoder ran for them.

    python -m loadtest.batching

Prints Triton's counters of vit_encoder before and after: nv_inference_count counts requests,
nv_inference_exec_count how often the model was called for them. Every image is new to the server.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import urlopen

from autoglm_client import Client

from loadtest.samples import SAMPLES, read_samples

MODEL = "vit_encoder"
REQUESTS, EXECUTIONS = "nv_inference_count", "nv_inference_exec_count"


def read_counters(metrics_url: str) -> dict[str, int]:
    """Triton's two counters of the vision encoder, summed over its versions and GPUs."""
    with urlopen(metrics_url, timeout=10) as page:
        text = page.read().decode()
    counters = {}
    for name in (REQUESTS, EXECUTIONS):
        values = re.findall(rf'^{name}{{[^}}]*model="{MODEL}"[^}}]*}} (\S+)$', text, re.MULTILINE)
        counters[name] = round(sum(map(float, values)))
    return counters


def send(server: str, number: int, samples: Path) -> None:
    """Ask about `number` images at once and wait for one token of each answer."""
    screens = itertools.islice(itertools.cycle(read_samples(samples)), number)
    with Client(server) as client, ThreadPoolExecutor(number) as threads:
        # What follows a file's end makes it another file, but not another picture: no cache knows it.
        files = [(screen.task, screen.image + os.urandom(8)) for screen in screens]
        jobs = [threads.submit(client.generate, prompt=task, images=[file], max_tokens=1) for task, file in files]
        for job in jobs:
            job.result()


def main() -> int:
    """The exit code is 1 when every image was encoded by itself."""
    parser = argparse.ArgumentParser(prog="loadtest.batching", description="Shows the server's batching of images.")
    parser.add_argument("--requests", type=int, default=32, metavar="N", help="how many at once (%(default)s)")
    parser.add_argument("--grpc-server", default="127.0.0.1:8001", metavar="HOST:PORT")
    parser.add_argument("--metrics", default="http://127.0.0.1:8002/metrics", metavar="URL")
    parser.add_argument("--samples", type=Path, default=SAMPLES, metavar="DIR", help="screens and tasks (demo/samples)")
    options = parser.parse_args()
    before = read_counters(options.metrics)
    send(options.grpc_server, options.requests, options.samples)
    after = read_counters(options.metrics)
    print(f"{MODEL:<24}{'before':>8}{'after':>8}{'more':>8}")
    for name in (REQUESTS, EXECUTIONS):
        print(f"{name:<24}{before[name]:>8}{after[name]:>8}{after[name] - before[name]:>8}")
    requests, executions = (after[name] - before[name] for name in (REQUESTS, EXECUTIONS))
    print(f"{requests} requests in {executions} calls: {requests / max(1, executions):.1f} at a time")
    return 0 if executions < requests else 1


if __name__ == "__main__":
    sys.exit(main())
