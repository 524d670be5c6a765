"""The overhead of constrained decoding.

    python -m benchmarks.constrained --checkpoint DIR [--setting int8|bf16]

constrained-16: time per output token of 16 answers, each a JSON string whose schema's minLength keeps it from ending.
Measured like decode-16 (see benchmarks.decode), alternating with unconstrained answers; medians. Also reported: the
overhead over the unconstrained answers, and the time to compute the 16 masks, which overlaps with the GPU's work.
"""

import argparse
import json
import statistics
import time
from contextlib import closing

from autoglm.checkpoint import Checkpoint
from autoglm.llm.engine import Engine
from autoglm.llm.structured_output.grammar import token_masks
from benchmarks.decode import PROMPT, TOKENS
from benchmarks.engines import answer_seconds, open_engine, random_prompt
from benchmarks.report import Row, make_row, read_options, report

BATCH = 16
REPEATS = 5
SCHEMA = {"type": "string", "minLength": 20_000}
FORMAT = json.dumps({"type": "json_schema", "json_schema": {"schema": SCHEMA}})


def constrained(engine: Engine, options: argparse.Namespace, prompt: int = PROMPT, tokens: int = TOKENS) -> Row:
    free, limited = [], []
    for repeat in range(REPEATS + 1):
        prompts = [[random_prompt(engine.checkpoint, prompt) for _ in range(BATCH)] for _ in range(4)]
        free_seconds = answer_seconds(engine, prompts[0], tokens + 1) - answer_seconds(engine, prompts[1], 1)
        # One token more: the opening quotation mark is forced, so no pass computes it.
        seconds = answer_seconds(engine, prompts[2], tokens + 2, response_format=FORMAT)
        seconds -= answer_seconds(engine, prompts[3], 2, response_format=FORMAT)
        if repeat:  # the first is a warm-up
            free.append(free_seconds / tokens)
            limited.append(seconds / tokens)
    step, free_step = statistics.median(limited), statistics.median(free)
    overhead = 100 * (step / free_step - 1)
    also = {"% over unconstrained": overhead, "us computing masks": 1e6 * mask_seconds(engine, tokens)}
    return make_row(options, f"constrained-{BATCH}", 1e3 * step, "ms", also=also)


def mask_seconds(engine: Engine, repeats: int) -> float:
    """Median seconds to compute the masks of one pass."""
    matchers = [engine.input_processor.grammars.matcher(FORMAT, TOKENS) for _ in range(BATCH)]
    for matcher in matchers:
        for token in matcher.forced():
            matcher.accept(token)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        token_masks(matchers, engine.checkpoint.text.vocab_size)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    options = read_options(__doc__)
    with closing(open_engine(Checkpoint.open(options.checkpoint), options.setting)) as engine:
        report(options, "constrained", [constrained(engine, options)])


if __name__ == "__main__":
    main()
