"""How long it takes to read a prompt: from submission to its first token.

    python -m benchmarks.prefill --checkpoint DIR [--setting int8|bf16] [--peers]

prefill-3422 is a 1080x2400 screenshot whose 3 354 embeddings are ready, with 68 tokens of text around it; prefill-N
are N random tokens; prefill-8x128 are eight such prompts together, to the last one's token. Never the same prompt
twice; medians. TOPS (TFLOP/s for bf16) count the layers' products, the head's for the last token, and causal attention.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial

from autoglm.checkpoint import Checkpoint
from autoglm.llm.engine import Engine
from benchmarks import limits, live
from benchmarks.decode import SCREENSHOT, SCREENSHOT_GRID
from benchmarks.engines import Prompt, answer_seconds, image_prompt, open_engine, random_prompt
from benchmarks.report import Row, make_row, read_options, report

TEXTS = ((128, 1), (512, 1), (1024, 1), (128, 8))  # tokens of a prompt, prompts together
REPEATS = 7


def screenshot(
    engine: Engine, options: argparse.Namespace, length: int = SCREENSHOT, grid: tuple[int, int, int] = SCREENSHOT_GRID
) -> Row:
    """prefill-`length`: the image of this grid, and text."""
    seconds = first_token_seconds(partial(answer_seconds, engine), lambda: [image_prompt(engine, length, grid)])
    return prefill_row(engine.checkpoint, options, [length], seconds)


def text(engine: Engine, options: argparse.Namespace, length: int, count: int = 1) -> Row:
    """prefill-`length`, or prefill-`count`x`length`."""
    fresh = partial(text_prompts, engine.checkpoint, length, count)
    seconds = first_token_seconds(partial(answer_seconds, engine), fresh)
    return prefill_row(engine.checkpoint, options, [length] * count, seconds)


def text_prompts(checkpoint: Checkpoint, length: int, count: int) -> list[Prompt]:
    return [random_prompt(checkpoint, length) for _ in range(count)]


def first_token_seconds(ask: live.Ask, fresh: Callable[[], list[Prompt]]) -> float:
    """Median seconds to the last prompt's first token, from whoever answers, after two rounds that do not count."""
    rounds = [fresh() for _ in range(REPEATS + 2)]
    return statistics.median([ask(prompts, 1) for prompts in rounds][2:])


def prefill_row(checkpoint: Checkpoint, options: argparse.Namespace, lengths: Sequence[int], seconds: float) -> Row:
    work = limits.prefill(checkpoint.text, options.setting, lengths)
    limit = limits.milliseconds(work, options.machine, options.setting)
    rate = "TOPS" if options.setting == "int8" else "TFLOP/s"
    also = {rate: work.operations / seconds / 1e12, "tokens/s": sum(lengths) / seconds}
    return make_row(options, name_of(lengths[0], len(lengths)), seconds * 1e3, "ms", limit, also)


def name_of(length: int, count: int = 1) -> str:
    return f"prefill-{length}" if count == 1 else f"prefill-{count}x{length}"


def measure(checkpoint: Checkpoint, options: argparse.Namespace) -> list[Row]:
    engine = open_engine(checkpoint, options.setting)
    try:
        return [screenshot(engine, options), *(text(engine, options, *sizes) for sizes in TEXTS)]
    finally:
        engine.close()


def peer_values(checkpoint: Checkpoint, ask: live.Ask) -> dict[str, float]:
    return {
        name_of(*sizes): 1e3 * first_token_seconds(ask, partial(text_prompts, checkpoint, *sizes)) for sizes in TEXTS
    }


def main() -> None:
    options = read_options(__doc__, peers=True)
    checkpoint = Checkpoint.open(options.checkpoint)
    rows = measure(checkpoint, options)
    if options.peers:
        rows = live.beside(rows, checkpoint, options.setting, partial(peer_values, checkpoint))
    report(options, "prefill", rows)


if __name__ == "__main__":
    main()
