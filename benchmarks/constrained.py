"""What it costs when a grammar limits answers.

    python -m benchmarks.constrained --checkpoint DIR [--setting int8|bf16]

constrained-16: time per token of 16 answers, each a JSON string that its schema keeps from ending, measured as
decode-16 is (benchmarks.decode), in turns with free answers; medians. Beside it: by how much that is longer than the
free answers' time, and what making the 16 masks takes, which happens while the GPU computes.
"""

import argparse
import json
import statistics
import time

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
    """constrained-16."""
    free, bound = [], []
    for repeat in range(REPEATS + 1):
        prompts = [[random_prompt(engine.checkpoint, prompt) for _ in range(BATCH)] for _ in range(4)]
        times = answer_seconds(engine, prompts[0], tokens + 1) - answer_seconds(engine, prompts[1], 1)
        # One token more: the quotation mark, which no pass brings.
        bounds = answer_seconds(engine, prompts[2], tokens + 2, response_format=FORMAT)
        bounds -= answer_seconds(engine, prompts[3], 2, response_format=FORMAT)
        if repeat:  # what happens once happened before
            free.append(times / tokens)
            bound.append(bounds / tokens)
    step, usual = statistics.median(bound), statistics.median(free)
    also = {"% longer than free": 100 * (step / usual - 1), "us for the masks": 1e6 * mask_seconds(engine, tokens)}
    return make_row(options, f"constrained-{BATCH}", 1e3 * step, "ms", also=also)


def mask_seconds(engine: Engine, repeats: int) -> float:
    """Seconds for the masks of one pass."""
    matchers = [engine.intake.grammars.matcher(FORMAT, TOKENS) for _ in range(BATCH)]
    for matcher in matchers:
        for token in matcher.forced():
            matcher.accept(token)
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        token_masks(matchers, engine.checkpoint.text.vocab_size)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def main() -> None:
    options = read_options(__doc__)
    engine = open_engine(Checkpoint.open(options.checkpoint), options.setting)
    try:
        report(options, "constrained", [constrained(engine, options)])
    finally:
        engine.close()


if __name__ == "__main__":
    main()
