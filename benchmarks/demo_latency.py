"""How long a demo screenshot takes to be answered by a running server, alone and eight at once.

    python -m benchmarks.demo_latency --setting fp32 [--server 127.0.0.1:8001]

Every request is a sample screen with one pixel changed, so that neither cache knows it; the first round warms up.
"""

import io
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

from autoglm_client import Client
from PIL import Image

from benchmarks.report import Row, read_server_options, report

SAMPLES = Path(__file__).parents[1] / "demo" / "samples"
REPEATS = 6
AT_ONCE = 8


def main() -> None:
    options = read_server_options(__doc__)
    samples = json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8"))
    numbers = count()

    def fresh() -> tuple[str, bytes]:
        number = next(numbers)
        sample = samples[number % len(samples)]
        image = Image.open(SAMPLES / sample["image"]).convert("RGB")
        image.putpixel((number % image.width, 0), (number % 256, number // 256, 7))
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        return sample["task"], buffer.getvalue()

    with Client(options.server) as client, ThreadPoolExecutor(AT_ONCE) as threads:

        def ask(task: str, image: bytes) -> float:
            started = time.perf_counter()
            client.generate(prompt=task, images=[image])
            return time.perf_counter() - started

        def together(requests: list[tuple[str, bytes]]) -> float:
            started = time.perf_counter()
            list(threads.map(lambda request: ask(*request), requests))
            return time.perf_counter() - started

        together([fresh() for _ in range(AT_ONCE)])
        alone = [ask(*fresh()) for _ in range(REPEATS)]
        eight = [together([fresh() for _ in range(AT_ONCE)]) for _ in range(REPEATS)]
    rows = [
        Row(f"{prefix}-{name}", options.setting, round(value(seconds), 3), "s")
        for prefix, seconds in (("demo-1", alone), (f"demo-{AT_ONCE}", eight))
        for name, value in (("median", statistics.median), ("slowest", max))
    ]
    report(options, "demo", rows)


if __name__ == "__main__":
    main()
