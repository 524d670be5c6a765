"""`python -m loadtest.batching`: show how the server batches images of concurrent requests.

Prints Triton's counters of vit_encoder before and after: nv_inference_count is the number of requests,
nv_inference_exec_count the number of executions. None of the images is in the server's cache.
"""

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
    """Triton's two counters of the vision encoder, summed over versions and GPUs."""
    with urlopen(metrics_url, timeout=10) as page:
        text = page.read().decode()
    counters = {}
    for name in (REQUESTS, EXECUTIONS):
        values = re.findall(rf'^{name}{{[^}}]*model="{MODEL}"[^}}]*}} (\S+)$', text, re.MULTILINE)
        counters[name] = round(sum(map(float, values)))
    return counters


def send(server: str, num_requests: int, samples: Path) -> None:
    """Send concurrent requests with one image each, and wait for one token of each answer."""
    screens = itertools.islice(itertools.cycle(read_samples(samples)), num_requests)
    with Client(server) as client, ThreadPoolExecutor(num_requests) as threads:
        # Bytes after the end of a file change its hash, but not the image: every cache misses.
        files = [(screen.task, screen.image + os.urandom(8)) for screen in screens]
        jobs = [threads.submit(client.generate, prompt=task, images=[file], max_tokens=1) for task, file in files]
        for job in jobs:
            job.result()


def main() -> int:
    """Returns the exit code, which is 1 if no two images were batched."""
    parser = argparse.ArgumentParser(prog="loadtest.batching", description="Show how the server batches images.")
    parser.add_argument(
        "--requests", type=int, default=32, metavar="N", help="number of concurrent requests (%(default)s)"
    )
    parser.add_argument("--grpc-server", default="127.0.0.1:8001", metavar="HOST:PORT")
    parser.add_argument("--metrics", default="http://127.0.0.1:8002/metrics", metavar="URL")
    parser.add_argument(
        "--samples", type=Path, default=SAMPLES, metavar="DIR", help="screenshots and tasks (demo/samples)"
    )
    options = parser.parse_args()
    before = read_counters(options.metrics)
    send(options.grpc_server, options.requests, options.samples)
    after = read_counters(options.metrics)
    print(f"{MODEL:<24}{'before':>8}{'after':>8}{'added':>8}")
    for name in (REQUESTS, EXECUTIONS):
        print(f"{name:<24}{before[name]:>8}{after[name]:>8}{after[name] - before[name]:>8}")
    requests, executions = (after[name] - before[name] for name in (REQUESTS, EXECUTIONS))
    print(f"{requests} requests in {executions} executions: {requests / max(1, executions):.1f} per batch")
    return 0 if executions < requests else 1


if __name__ == "__main__":
    sys.exit(main())
