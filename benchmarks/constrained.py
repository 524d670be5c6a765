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
from collections.abc import Sequence
from dataclasses import replace

from autoglm.checkpoint import Checkpoint
from autoglm.llm.engine import Engine
from autoglm.llm.grammar import token_masks
from benchmarks.decode import PROMPT, TOKENS
from benchmarks.engines import Prompt, Stream, answer_seconds, open_engine, random_prompt
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
        bounds = constrained_seconds(engine, prompts[2], tokens + 1) - constrained_seconds(engine, prompts[3], 1)
        if repeat:  # what happens once happened before
            free.append(times / tokens)
            bound.append(bounds / tokens)
    step, usual = statistics.median(bound), statistics.median(free)
    also = {"% longer than free": 100 * (step / usual - 1), "us for the masks": 1e6 * mask_seconds(engine, tokens)}
    return make_row(options, f"constrained-{BATCH}", 1e3 * step, "ms", also=also)


def constrained_seconds(engine: Engine, prompts: Sequence[Prompt], max_tokens: int) -> float:
    """`answer_seconds` of constrained answers."""
    began = time.perf_counter()
    streams = [Stream() for _ in prompts]
    for prompt, stream in zip(prompts, streams, strict=True):
        request = prompt.request(stream, max_tokens)
        engine.submit(replace(request, sampling=replace(request.sampling, response_format=FORMAT)))
    for stream in streams:
        stream.wait()
        if len(stream.times) != max_tokens:
            raise RuntimeError(f"an answer of {max_tokens} tokens ended after {len(stream.times)}")
    return max(stream.times[-1] for stream in streams) - began


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
