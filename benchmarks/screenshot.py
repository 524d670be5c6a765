"""A whole turn of a phone agent: from the bytes of a 1080x2400 PNG to the answer, ViT and engine in this process.

    python -m benchmarks.screenshot --checkpoint DIR [--setting int8|bf16]

The setting is that of the weights of the language model and of the ViT's blocks. Every image is another one (68x150
random pixels, enlarged), with a short text: 3 422 tokens in all. The image's header is read, the chat rendered, the
file decoded and resized, the ViT run, the prompt read.
screenshot-first-token is the time to the token of a request for one, screenshot-65 to the last token of a request for
65, medians; screenshot-16 are 16 requests for 65 tokens that come at once, 16 / seconds until the last one is done. As
many images as the encoder has threads are in work at a time, and the language model answers beside the ViT on the same
GPU.
"""

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from tokenizers import Tokenizer

from autoglm.checkpoint import Checkpoint
from autoglm.config import load_config
from autoglm.device import choose_device
from autoglm.errors import RequestError
from autoglm.preprocess.chat import ChatRenderer
from autoglm.preprocess.messages import read_prompt
from autoglm.vision.encoder import VisionEncoder
from benchmarks import limits
from benchmarks.engines import Prompt, Stream, open_engine, submit
from benchmarks.report import Row, make_row, read_options, report
from benchmarks.screens import SIZE, random_screen, random_screens

TEXT = "b" * 59
TOKENS = 65
AT_ONCE = 16
REPEATS = 7


class Agent:
    """Renderer, vision encoder and engine, as the server's three models would use them."""

    def __init__(self, checkpoint: Checkpoint, setting: str, **changes: int) -> None:
        config = load_config()
        device, dtype = choose_device(config.model)
        self.checkpoint = checkpoint
        self.limits = config.limits
        self.threads = config.vision.decode_threads
        self.engine = open_engine(checkpoint, setting, **changes)
        vision = replace(config.vision, int8=setting == "int8")
        self.encoder = VisionEncoder(checkpoint, vision, config.limits, device, dtype)
        tokenizer = Tokenizer.from_file(str(checkpoint.path / "tokenizer.json"))
        context = min(config.engine.max_context, checkpoint.text.max_position_embeddings)
        self.renderer = ChatRenderer(checkpoint, tokenizer, config.limits, context, config.chat.content_format)

    def close(self) -> None:
        self.engine.close()
        self.encoder.close()

    def read(self, data: bytes, text: str = TEXT) -> Prompt:
        """Render the chat and embed the image.

        Raises:
            RequestError: the image cannot be used.
        """
        prompt = self.renderer.render(read_prompt(text.encode(), [data], self.limits))
        (image,) = prompt.images
        (features,) = self.encoder.encode([[image]])
        if isinstance(features, RequestError):
            raise features
        return Prompt(prompt.token_ids, image.grid, image.hash.encode(), features)

    def ask(self, data: bytes, max_tokens: int) -> Stream:
        (stream,) = submit(self.engine, [self.read(data)], max_tokens)
        return stream


@contextmanager
def open_agent(checkpoint: Checkpoint, setting: str, **changes: int) -> Iterator[Agent]:
    agent = Agent(checkpoint, setting, **changes)
    try:
        yield agent
    finally:
        agent.close()


def measure(
    agent: Agent,
    options: argparse.Namespace,
    size: tuple[int, int] = SIZE,
    tokens: int = TOKENS,
    at_once: int = AT_ONCE,
    repeats: int = REPEATS,
) -> list[Row]:
    """The three rows, named after `tokens` and `at_once`."""
    rounds = max(1, repeats // 2)
    screens = random_screens(1, 1 + at_once + 2 * repeats + at_once * rounds, size)

    def alone(max_tokens: int) -> float:
        data = next(screens)
        began = time.perf_counter()
        stream = agent.ask(data, max_tokens)
        stream.wait()
        return stream.times[-1] - began

    def together() -> float:
        files = list(itertools.islice(screens, at_once))
        began = time.perf_counter()
        with ThreadPoolExecutor(agent.threads) as threads:
            streams = list(threads.map(lambda data: agent.ask(data, tokens), files))
        for stream in streams:
            stream.wait()
        return max(stream.times[-1] for stream in streams) - began

    alone(tokens)  # what happens once happens here
    together()
    first = statistics.median(alone(1) for _ in range(repeats))
    whole = statistics.median(alone(tokens) for _ in range(repeats))
    rate = at_once / statistics.median(together() for _ in range(rounds))
    prompt = agent.renderer.render(read_prompt(TEXT.encode(), [random_screen(0, size)], agent.limits))
    patches, length = math.prod(prompt.images[0].grid), len(prompt.token_ids)
    least = partial(floor_ms, agent.checkpoint, options, patches, length)
    also = {"prompt tokens": length}
    return [
        make_row(options, "screenshot-first-token", first * 1e3, "ms", least(1, 1), also),
        make_row(options, f"screenshot-{tokens}", whole * 1e3, "ms", least(1, tokens), also),
        make_row(options, f"screenshot-{at_once}", rate, "requests/s", at_once * 1e3 / least(at_once, tokens), also),
    ]


def floor_ms(
    checkpoint: Checkpoint, options: argparse.Namespace, patches: int, length: int, count: int, tokens: int
) -> float:
    """For `count` turns of `tokens` tokens: images and prompts one after another, then the steps of all together."""
    machine, setting, text = options.machine, options.setting, checkpoint.text
    reading = limits.milliseconds(limits.encode(checkpoint.vision, patches, setting), machine, setting)
    reading += limits.milliseconds(limits.prefill(text, setting, [length]), machine, setting)
    step = limits.decode_step(text, setting, count, length + tokens / 2)
    return count * reading + (tokens - 1) * limits.milliseconds(step, machine, setting)


def main() -> None:
    options = read_options(__doc__)
    with open_agent(Checkpoint.open(options.checkpoint), options.setting) as agent:
        rows = measure(agent, options)
    report(options, "screenshot", rows)


if __name__ == "__main__":
    main()
