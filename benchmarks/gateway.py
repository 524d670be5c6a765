"""The overhead of the gateway: the same requests over gRPC and through the gateway, alternating.

    python -m benchmarks.gateway --setting fp32 [--server 127.0.0.1:8001] [--gateway 127.0.0.1:8080]

Streams of exactly TOKENS tokens, CONCURRENCY at a time, each with its own screenshot or with text only. Client and
server share the machine, so the gateway's CPU time is part of the overhead. Reported are differences of medians, for
the time to first token and per output token, and the CPU time of the gateway's process per token.

Time per output token is that of the stream whose first token came last: from then on, nothing is prefilled. How long
the other streams decode during prefill depends on when requests arrive, which differs between the two paths.
"""

import argparse
import asyncio
import base64
import json
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any
from urllib.request import urlopen

from autoglm_client import AsyncClient

from benchmarks.report import Row, make_parser, make_row, report
from benchmarks.screens import random_screen

TOKENS = 129  # enough for the last stream to decode together with the others most of the time
CONCURRENCY = 16
ROUNDS = 10
SIZE = (480, 960)  # of noise: 1.2 MB of base64, like a real screenshot
ALONE = 40  # sequential requests for one token
PIXELS = {"max_pixels": 100_352}  # on a CPU, the time for full screenshots would hide the overhead
FIRST_LIMIT_MS, TOKEN_LIMIT_MS = 5.0, 0.2


@dataclass(frozen=True)
class UserPrompt:
    """A new text and its image."""

    text: str
    image: bytes | None


@dataclass(frozen=True)
class Timing:
    """When a request was sent, its first chunk arrived, and its last one, in seconds."""

    sent: float
    first: float
    ended: float

    @property
    def to_first(self) -> float:
        return self.first - self.sent


Ask = Callable[[UserPrompt, int], Awaitable[Timing]]


def ask_grpc(client: AsyncClient) -> Ask:
    async def ask(prompt: UserPrompt, tokens: int) -> Timing:
        sent, first = time.perf_counter(), 0.0
        images = [prompt.image] if prompt.image else []
        options: dict[str, Any] = {"max_tokens": tokens, "ignore_eos": True, **PIXELS}
        async with client.stream(prompt=prompt.text, images=images, **options) as stream:
            async for _ in stream:
                first = first or time.perf_counter()
        return Timing(sent, first, time.perf_counter())

    return ask


def ask_gateway(address: str) -> Ask:
    """Over plain sockets with a prepared body: no HTTP client's overhead is measured as the gateway's."""
    host, _, port = address.rpartition(":")
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(prompt: UserPrompt, tokens: int) -> Timing:
        body = chat(prompt, tokens)
        reader, writer = idle.pop() if idle else await asyncio.open_connection(host, int(port), limit=1 << 20)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        sent, first = time.perf_counter(), 0.0
        writer.write(head.encode() + body)
        status = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in status.split(b"\r\n", 1)[0]:
            raise RuntimeError(f"the gateway answered {status.decode()}")
        while size := int(await reader.readuntil(b"\r\n"), 16):
            await reader.readexactly(size + 2)
            first = first or time.perf_counter()
        await reader.readexactly(2)
        idle.append((reader, writer))
        return Timing(sent, first, time.perf_counter())

    return ask


def chat(prompt: UserPrompt, tokens: int) -> bytes:
    parts: list[dict[str, object]] = [{"type": "text", "text": prompt.text}]
    if prompt.image:
        url = f"data:image/png;base64,{base64.b64encode(prompt.image).decode()}"
        parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
    messages = [{"role": "user", "content": parts}]
    options = {"max_tokens": tokens, "ignore_eos": True, "stream": True, **PIXELS}
    return json.dumps({"messages": messages, **options}).encode()


def new_prompts(with_image: bool) -> Iterator[UserPrompt]:
    screen = random_screen(0, SIZE)
    while True:
        number = f"{time.monotonic_ns():020}"
        # Bytes after a PNG's end change its hash, not its pixels.
        yield UserPrompt(f"{number} {'b' * 60}", screen + number.encode() if with_image else None)


async def concurrent(ask: Ask, prompts: Iterator[UserPrompt]) -> list[Timing]:
    return await asyncio.gather(*(ask(prompt, TOKENS) for prompt in islice(prompts, CONCURRENCY)))


def seconds_per_token(streams: Sequence[Timing]) -> float:
    """Seconds per output token of the stream with the last first token."""
    last = max(streams, key=lambda stream: stream.first)
    return (last.ended - last.first) / (TOKENS - 1)


async def measure(options: argparse.Namespace) -> list[Row]:
    async with AsyncClient(options.server) as client:
        paths = {"grpc": ask_grpc(client), "gateway": ask_gateway(options.gateway)}
        rows = []
        for name, with_image in (("text", False), ("screenshot", True)):
            prompts = new_prompts(with_image)
            for ask in paths.values():
                await concurrent(ask, prompts)  # warm-up
            alone: dict[str, list[float]] = {path: [] for path in paths}
            rounds: dict[str, list[list[Timing]]] = {path: [] for path in paths}
            for _ in range(ALONE):
                for path, ask in paths.items():
                    alone[path].append((await ask(next(prompts), 1)).to_first)
            cpu = -cpu_seconds(options.gateway)
            for _ in range(ROUNDS):
                for path, ask in paths.items():
                    rounds[path].append(await concurrent(ask, prompts))
            cpu += cpu_seconds(options.gateway)
            firsts = {path: [timing.to_first for timing in chain(*each)] for path, each in rounds.items()}
            tokens = {path: [seconds_per_token(streams) for streams in each] for path, each in rounds.items()}
            rows.append(overhead(options, f"{name}-first-token-alone", alone, FIRST_LIMIT_MS))
            rows.append(overhead(options, f"{name}-first-token-{CONCURRENCY}", firsts, FIRST_LIMIT_MS))
            rows.append(overhead(options, f"{name}-token-{CONCURRENCY}", tokens, TOKEN_LIMIT_MS))
            per_token = cpu / (ROUNDS * CONCURRENCY * TOKENS) * 1e3
            rows.append(make_row(options, f"{name}-cpu-per-token", per_token, "ms", TOKEN_LIMIT_MS))
        return rows


def overhead(options: argparse.Namespace, name: str, seconds: Mapping[str, Sequence[float]], limit: float) -> Row:
    """The difference of the medians of the two paths, and both medians."""
    medians = {f"ms {path}": statistics.median(values) * 1e3 for path, values in seconds.items()}
    return make_row(options, f"{name}-added", medians["ms gateway"] - medians["ms grpc"], "ms", limit, medians)


def cpu_seconds(gateway: str) -> float:
    """CPU time of the gateway's process since its start."""
    with urlopen(f"http://{gateway}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("autoglm_gateway_process_cpu_seconds")))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--server", default="127.0.0.1:8001", help="gRPC address (%(default)s)")
    parser.add_argument("--gateway", default="127.0.0.1:8080", help="HTTP address (%(default)s)")
    options = parser.parse_args()
    report(options, "gateway", asyncio.run(measure(options)))


if __name__ == "__main__":
    main()
