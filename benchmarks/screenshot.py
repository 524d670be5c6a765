"""One turn of a phone agent in one process: from a 1080x2400 PNG file to the answer.

    python -m benchmarks.screenshot --checkpoint DIR [--setting int8|bf16]

The setting is the dtype of the language model and of the ViT's blocks. Every image is new (68x150 random pixels,
upscaled), with a short text: 3,422 tokens in total. Timed are reading the header, rendering the chat, decoding and
resizing, the ViT, prefill and decoding.

screenshot-first-token: time to first token; screenshot-65: time to the last of 65 tokens; medians. screenshot-16: 16
concurrent requests for 65 tokens, 16 / seconds until the last one is done. The encoder's number of threads bounds the
images in preprocessing; ViT and language model share the GPU.
"""

import argparse
import itertools
import math
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial

from tokenizers import Tokenizer

from autoglm.checkpoint import Checkpoint
from autoglm.config import load_config
from autoglm.device import choose_device
from autoglm.errors import RequestError
from autoglm.preprocess.chat import ChatRenderer
from autoglm.preprocess.messages import read_user_prompt
from autoglm.vision.encoder import VisionEncoder
from benchmarks import limits
from benchmarks.engines import BenchmarkPrompt, Stream, open_engine, submit
from benchmarks.report import Row, make_row, read_options, report
from benchmarks.screens import SIZE, random_screen, random_screens

TEXT = "b" * 59
TOKENS = 65
CONCURRENCY = 16
REPEATS = 7


class Agent:
    """Chat renderer, vision encoder and engine, configured like the server's three models."""

    def __init__(self, checkpoint: Checkpoint, setting: str, **engine_config: int) -> None:
        config = load_config()
        device, dtype = choose_device(config.model)
        self.checkpoint = checkpoint
        self.limits = config.limits
        self.threads = config.vision.decode_threads
        self.engine = open_engine(checkpoint, setting, **engine_config)
        vision = replace(config.vision, int8=setting == "int8")
        self.encoder = VisionEncoder(checkpoint, vision, config.limits, device, dtype)
        self.renderer = ChatRenderer(
            checkpoint,
            Tokenizer.from_file(str(checkpoint.path / "tokenizer.json")),
            config.limits,
            max_context=min(config.engine.max_context, checkpoint.text.max_position_embeddings),
            content_format=config.chat.content_format,
        )

    def close(self) -> None:
        self.engine.close()
        self.encoder.close()

    def prompt(self, data: bytes, text: str = TEXT) -> BenchmarkPrompt:
        """Render the chat and embed the image.

        Raises:
            RequestError: the image is not accepted.
        """
        rendered = self.renderer.render(read_user_prompt(text.encode(), [data], self.limits))
        (image,) = rendered.images
        (features,) = self.encoder.encode([[image]])
        if isinstance(features, RequestError):
            raise features
        return BenchmarkPrompt(rendered.token_ids, image.grid, image.media_hash.encode(), features)

    def ask(self, data: bytes, max_tokens: int) -> Stream:
        (stream,) = submit(self.engine, [self.prompt(data)], max_tokens)
        return stream


def measure(
    agent: Agent,
    options: argparse.Namespace,
    *,
    size: tuple[int, int] = SIZE,
    tokens: int = TOKENS,
    concurrency: int = CONCURRENCY,
    repeats: int = REPEATS,
) -> list[Row]:
    rounds = max(1, repeats // 2)
    screens = random_screens(1, 1 + concurrency + 2 * repeats + concurrency * rounds, size)

    def one(max_tokens: int) -> float:
        data = next(screens)
        start = time.perf_counter()
        stream = agent.ask(data, max_tokens)
        stream.wait()
        return stream.times[-1] - start

    def concurrent() -> float:
        files = list(itertools.islice(screens, concurrency))
        start = time.perf_counter()
        with ThreadPoolExecutor(agent.threads) as threads:
            streams = list(threads.map(lambda data: agent.ask(data, tokens), files))
        for stream in streams:
            stream.wait()
        return max(stream.times[-1] for stream in streams) - start

    one(tokens)  # warm-up
    concurrent()
    first = statistics.median(one(1) for _ in range(repeats))
    last = statistics.median(one(tokens) for _ in range(repeats))
    rate = concurrency / statistics.median(concurrent() for _ in range(rounds))
    rendered = agent.renderer.render(read_user_prompt(TEXT.encode(), [random_screen(0, size)], agent.limits))
    patches, length = math.prod(rendered.images[0].grid), len(rendered.token_ids)
    limit = partial(limit_ms, agent.checkpoint, options, patches=patches, length=length)
    rate_limit = concurrency * 1e3 / limit(turns=concurrency, tokens=tokens)
    also = {"prompt tokens": length}
    return [
        make_row(options, "screenshot-first-token", first * 1e3, "ms", limit(turns=1, tokens=1), also),
        make_row(options, f"screenshot-{tokens}", last * 1e3, "ms", limit(turns=1, tokens=tokens), also),
        make_row(options, f"screenshot-{concurrency}", rate, "requests/s", rate_limit, also),
    ]


def limit_ms(
    checkpoint: Checkpoint, options: argparse.Namespace, *, patches: int, length: int, turns: int, tokens: int
) -> float:
    """The roofline of concurrent turns: images and prompts one after another, then decode steps of all turns."""
    machine, setting, text = options.machine, options.setting, checkpoint.text
    prefill = limits.milliseconds(limits.encode(checkpoint.vision, patches, setting), machine, setting)
    prefill += limits.milliseconds(limits.prefill(text, setting, [length]), machine, setting)
    step = limits.decode_step(text, setting, turns, length + tokens / 2)
    return turns * prefill + (tokens - 1) * limits.milliseconds(step, machine, setting)


def main() -> None:
    options = read_options(__doc__)
    with closing(Agent(Checkpoint.open(options.checkpoint), options.setting)) as agent:
        rows = measure(agent, options)
    report(options, "screenshot", rows)


if __name__ == "__main__":
    main()
