"""What the gateway adds to a running server: the same requests over gRPC and through it, in turns.

    python -m benchmarks.gateway --setting fp32 [--server 127.0.0.1:8001] [--gateway 127.0.0.1:8080]

Streams of exactly TOKENS tokens, AT_ONCE of them together, each with a demo screenshot of its own or with a text alone.
Client and server share the machine, so that what the gateway computes is missing elsewhere. The figures are differences
of medians, to the first piece and for each further token, and what the gateway's process computes.

The time of a token is that of the stream which gets its first piece last of those asked together: from then on no
prompt is computed any more. The others' first tokens come slowly while prompts are, the more of them the further apart
the requests arrive, which is not the same on both ways.
"""

import argparse
import asyncio
import base64
import itertools
import json
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.request import urlopen

from autoglm_client import AsyncClient

from benchmarks.report import Row, make_parser, make_row, report
from benchmarks.screens import random_screen

TOKENS = 129  # enough that decoding outlasts all prompts: the last stream has the others beside it most of its time
AT_ONCE = 16
ROUNDS = 10
SIZE = (480, 960)  # of noise: a PNG of 1.2 MB in base64, as a real screenshot's
ALONE = 40  # requests of one token, one after another
PIXELS = {"max_pixels": 100_352}  # what screenshots are reduced to: on a CPU a whole one hides what is measured here
FIRST_LIMIT_MS, TOKEN_LIMIT_MS = 5.0, 0.2


@dataclass(frozen=True)
class Prompt:
    """A text that no request has had before, and its image."""

    text: str
    image: bytes | None


@dataclass(frozen=True)
class Timing:
    """Of one request the moments, in seconds, at which it was sent, its first piece came, and it ended."""

    begun: float
    first: float
    ended: float

    @property
    def to_first(self) -> float:
        return self.first - self.begun


Ask = Callable[[Prompt, int], Awaitable[Timing]]


def ask_directly(client: AsyncClient) -> Ask:
    async def ask(prompt: Prompt, tokens: int) -> Timing:
        begun, first = time.perf_counter(), 0.0
        images = [prompt.image] if prompt.image else []
        options: dict[str, Any] = {"max_tokens": tokens, "ignore_eos": True, **PIXELS}
        async with client.stream(prompt=prompt.text, images=images, **options) as stream:
            async for _ in stream:
                first = first or time.perf_counter()
        return Timing(begun, first, time.perf_counter())

    return ask


def ask_gateway(address: str) -> Ask:
    """Over a plain socket, with a body that is ready, so that no HTTP client's own work counts as the gateway's."""
    host, _, port = address.rpartition(":")
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(prompt: Prompt, tokens: int) -> Timing:
        body = chat(prompt, tokens)
        reader, writer = idle.pop() if idle else await asyncio.open_connection(host, int(port), limit=1 << 20)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        begun, first = time.perf_counter(), 0.0
        writer.write(head.encode() + body)
        status = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in status.split(b"\r\n", 1)[0]:
            raise RuntimeError(f"the gateway answered {status.decode()}")
        while size := int(await reader.readuntil(b"\r\n"), 16):
            await reader.readexactly(size + 2)
            first = first or time.perf_counter()
        await reader.readexactly(2)
        idle.append((reader, writer))
        return Timing(begun, first, time.perf_counter())

    return ask


def chat(prompt: Prompt, tokens: int) -> bytes:
    parts: list[dict[str, object]] = [{"type": "text", "text": prompt.text}]
    if prompt.image:
        url = f"data:image/png;base64,{base64.b64encode(prompt.image).decode()}"
        parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
    messages = [{"role": "user", "content": parts}]
    options = {"max_tokens": tokens, "ignore_eos": True, "stream": True, **PIXELS}
    return json.dumps({"messages": messages, **options}).encode()


def prompts(with_image: bool) -> Iterator[Prompt]:
    screen = random_screen(0, SIZE)
    for _ in itertools.count():
        number = f"{time.monotonic_ns():020}"
        # What follows a PNG's end changes what it is known by, not its pixels.
        yield Prompt(f"{number} {'b' * 60}", screen + number.encode() if with_image else None)


async def together(ask: Ask, chosen: Sequence[Prompt]) -> list[Timing]:
    return await asyncio.gather(*(ask(prompt, TOKENS) for prompt in chosen))


def seconds_per_token(streams: Sequence[Timing]) -> float:
    """Seconds of a token in streams asked together."""
    last = max(streams, key=lambda stream: stream.first)
    return (last.ended - last.first) / (TOKENS - 1)


async def measure(options: argparse.Namespace) -> list[Row]:
    async with AsyncClient(options.server) as client:
        ways = {"grpc": ask_directly(client), "gateway": ask_gateway(options.gateway)}
        rows = []
        for name, with_image in (("text", False), ("screenshot", True)):
            fresh = prompts(with_image)
            for ask in ways.values():
                await together(ask, list(itertools.islice(fresh, AT_ONCE)))  # what happens once happens here
            alone: dict[str, list[float]] = {way: [] for way in ways}
            crowds: dict[str, list[list[Timing]]] = {way: [] for way in ways}
            for _ in range(ALONE):
                for way, ask in ways.items():
                    alone[way].append((await ask(next(fresh), 1)).to_first)
            spent = -cpu_seconds(options.gateway)
            for _ in range(ROUNDS):
                for way, ask in ways.items():
                    crowds[way].append(await together(ask, list(itertools.islice(fresh, AT_ONCE))))
            spent += cpu_seconds(options.gateway)
            firsts = {way: [stream.to_first for crowd in each for stream in crowd] for way, each in crowds.items()}
            tokens = {way: [seconds_per_token(crowd) for crowd in each] for way, each in crowds.items()}
            rows.append(added(options, f"{name}-first-token-alone", alone, FIRST_LIMIT_MS))
            rows.append(added(options, f"{name}-first-token-{AT_ONCE}", firsts, FIRST_LIMIT_MS))
            rows.append(added(options, f"{name}-token-{AT_ONCE}", tokens, TOKEN_LIMIT_MS))
            per_token = spent / (ROUNDS * AT_ONCE * TOKENS) * 1e3
            rows.append(make_row(options, f"{name}-cpu-per-token", per_token, "ms", TOKEN_LIMIT_MS))
        return rows


def added(options: argparse.Namespace, name: str, seconds: Mapping[str, Sequence[float]], limit: float) -> Row:
    """By how much the median grows on the way through the gateway, beside both medians."""
    medians = {f"ms {way}": statistics.median(values) * 1e3 for way, values in seconds.items()}
    return make_row(options, f"{name}-added", medians["ms gateway"] - medians["ms grpc"], "ms", limit, medians)


def cpu_seconds(gateway: str) -> float:
    """What the gateway's process has computed since its start."""
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
