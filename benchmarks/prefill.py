"""Prefill: time from the submission of a prompt to its first token.

    python -m benchmarks.prefill --checkpoint DIR [--setting int8|bf16] [--peers]

prefill-3422: a 1080x2400 screenshot whose 3,354 embeddings are given, and 68 tokens of text. prefill-N: N random
tokens. prefill-8x128: eight such prompts together, to the last first token. Every prompt is new; medians. TOPS
(TFLOP/s for bf16) count the linear layers, the head for last tokens, and causal attention.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial

from autoglm.checkpoint import Checkpoint
from autoglm.llm.engine import Engine
from benchmarks import limits, live
from benchmarks.decode import SCREENSHOT, SCREENSHOT_GRID
from benchmarks.engines import BenchmarkPrompt, answer_seconds, image_prompt, open_engine, random_prompt
from benchmarks.report import Row, make_row, read_options, report

TEXTS = ((128, 1), (512, 1), (1024, 1), (128, 8))  # tokens per prompt, prompts per batch
REPEATS = 7


def screenshot(
    engine: Engine, options: argparse.Namespace, length: int = SCREENSHOT, grid: tuple[int, int, int] = SCREENSHOT_GRID
) -> Row:
    """prefill-`length`: one image of this grid, and text."""
    seconds = first_token_seconds(partial(answer_seconds, engine), lambda: [image_prompt(engine, length, grid)])
    return prefill_row(engine.checkpoint, options, [length], seconds)


def text(engine: Engine, options: argparse.Namespace, length: int, count: int = 1) -> Row:
    """prefill-`length`, or prefill-`count`x`length`."""
    new_prompts = partial(text_prompts, engine.checkpoint, length, count)
    seconds = first_token_seconds(partial(answer_seconds, engine), new_prompts)
    return prefill_row(engine.checkpoint, options, [length] * count, seconds)


def text_prompts(checkpoint: Checkpoint, length: int, count: int) -> list[BenchmarkPrompt]:
    return [random_prompt(checkpoint, length) for _ in range(count)]


def first_token_seconds(generate: live.Generate, new_prompts: Callable[[], list[BenchmarkPrompt]]) -> float:
    """Median seconds to the first token of the last prompt of a batch."""
    batches = [new_prompts() for _ in range(REPEATS + 2)]
    return statistics.median([generate(prompts, 1) for prompts in batches][2:])  # the first two are warm-ups


def prefill_row(checkpoint: Checkpoint, options: argparse.Namespace, lengths: Sequence[int], seconds: float) -> Row:
    work = limits.prefill(checkpoint.text, options.setting, lengths)
    limit = limits.milliseconds(work, options.machine, options.setting)
    rate = "TOPS" if options.setting == "int8" else "TFLOP/s"
    also = {rate: work.operations / seconds / 1e12, "tokens/s": sum(lengths) / seconds}
    return make_row(options, row_name(lengths[0], len(lengths)), seconds * 1e3, "ms", limit, also)


def row_name(length: int, count: int = 1) -> str:
    return f"prefill-{length}" if count == 1 else f"prefill-{count}x{length}"


def measure(checkpoint: Checkpoint, options: argparse.Namespace) -> list[Row]:
    with closing(open_engine(checkpoint, options.setting)) as engine:
        return [screenshot(engine, options), *(text(engine, options, *sizes) for sizes in TEXTS)]


def peer_values(checkpoint: Checkpoint, generate: live.Generate) -> dict[str, float]:
    return {
        row_name(*sizes): 1e3 * first_token_seconds(generate, partial(text_prompts, checkpoint, *sizes))
        for sizes in TEXTS
    }


def main() -> None:
    options = read_options(__doc__, peers=True)
    checkpoint = Checkpoint.open(options.checkpoint)
    rows = measure(checkpoint, options)
    if options.peers:
        rows = live.with_peers(rows, checkpoint, options.setting, partial(peer_values, checkpoint))
    report(options, "prefill", rows)


if __name__ == "__main__":
    main()
