"""How long a token takes, for 1 to 64 sequences; how idle the GPU is; how evenly a stream runs.

    python -m benchmarks.decode --checkpoint DIR [--setting int8|bf16] [--peers]

decode-B: B prompts of 128 random tokens, greedy, end-of-text ignored; time per token is (time of 129 new tokens - time
of 1 new token) / 128, both from submission to the last token of the last sequence, medians.

gpu-idle-share: of the middle of an answer to one prompt, the share of time in which the GPU runs no kernel and no copy,
by the profiler's timeline: the union of all their intervals, kernels that overlap counted once, against the whole span.
Pauses between the kernels of one step count as idle too, and the profiler may make them longer than they are. Beside
it: the share in pauses of more than 5 us; and, without the profiler, 1 - (time of the step's graph when it is replayed
over and over) / (time per token of an answer's second half).

stream-gap-ms: the longest time between two tokens of one running answer, as its sink sees them, from the moment when a
prompt of 3 422 tokens, its image embeddings ready, is submitted beside it until ten tokens after that prompt's first.
"""

import argparse
import statistics
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch._C._autograd import DeviceType

from autoglm.checkpoint import Checkpoint
from autoglm.llm.engine import Engine
from benchmarks import limits, live
from benchmarks.engines import answer_seconds, image_prompt, open_engine, random_prompt, submit
from benchmarks.report import Row, make_row, read_options, report

PROMPT, TOKENS = 128, 128
BATCHES = (1, 4, 16, 64)
REPEATS = 3
SCREENSHOT, SCREENSHOT_GRID = 3422, (1, 172, 78)  # 1080x2400 pixels: 3 354 visual tokens
REPLAYS = 50
LONG = 500  # tokens of the stream that is looked at
PAUSE = 5.0  # us
MIDDLE = (0.3, 0.9)  # of the profiled span: before it the prompt is read, after it the answer ends

Interval = tuple[float, float]


def decode(engine: Engine, options: argparse.Namespace, batch: int, prompt: int = PROMPT, tokens: int = TOKENS) -> Row:
    """decode-`batch`."""
    seconds = token_seconds(partial(answer_seconds, engine), engine.checkpoint, batch, prompt, tokens)
    work = limits.decode_step(engine.checkpoint.text, options.setting, batch, prompt + (tokens + 1) / 2)
    limit = limits.milliseconds(work, options.machine, options.setting)
    also = {"tokens/s": batch / seconds, "GB/s": work.bytes / seconds / 1e9}
    return make_row(options, f"decode-{batch}", seconds * 1e3, "ms", limit, also)


def token_seconds(
    ask: live.Ask, checkpoint: Checkpoint, batch: int, prompt: int = PROMPT, tokens: int = TOKENS
) -> float:
    """Seconds per token of `batch` sequences, from whoever answers."""

    def median(count: int, repeats: int = REPEATS) -> float:
        prompts = [[random_prompt(checkpoint, prompt) for _ in range(batch)] for _ in range(repeats)]
        return statistics.median(ask(fresh, count) for fresh in prompts)

    median(tokens + 1, 1)  # what happens once happens here
    first = median(1)
    return (median(tokens + 1) - first) / tokens


def idle_share(engine: Engine, options: argparse.Namespace, tokens: int = TOKENS) -> Row:
    """gpu-idle-share at batch 1. Needs a CUDA device."""
    answer_seconds(engine, [random_prompt(engine.checkpoint, PROMPT)], tokens)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        answer_seconds(engine, [random_prompt(engine.checkpoint, PROMPT)], tokens)
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == DeviceType.CUDA]
    busy = list(clip(union((event.time_range.start, event.time_range.end) for event in events), *MIDDLE))
    span = busy[-1][1] - busy[0][0]
    pauses = [after[0] - before[1] for before, after in pairwise(busy)]
    step = steady_seconds(engine, tokens)
    also = {
        "% in pauses over 5 us": 100 * sum(pause for pause in pauses if pause > PAUSE) / span,
        "us, the longest pause": max(pauses, default=0.0),
        "% against replays": 100 * (1 - replay_seconds(engine) / step),
    }
    return make_row(options, "gpu-idle-share", 100 * sum(pauses) / span, "%", also=also)


def steady_seconds(engine: Engine, tokens: int) -> float:
    """Seconds per token of the second half of an answer."""
    (stream,) = submit(engine, [random_prompt(engine.checkpoint, PROMPT)], tokens)
    stream.wait()
    times = stream.times[tokens // 2 :]
    return (times[-1] - times[0]) / (len(times) - 1)


def replay_seconds(engine: Engine) -> float:
    """Seconds of the graph of a step at batch 1, replayed behind itself while the engine rests. It writes once more
    what the last step wrote, into blocks that nobody has any more."""
    graph = engine.runner.decode_graphs[1].graph
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    began.record()
    for _ in range(REPLAYS):
        graph.replay()
    ended.record()
    torch.cuda.synchronize()
    milliseconds: float = began.elapsed_time(ended)
    return milliseconds / 1e3 / REPLAYS


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Intervals in order, those that touch or overlap made one."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def clip(intervals: Sequence[Interval], low: float, high: float) -> Iterator[Interval]:
    """Those that lie wholly between two shares of their whole span."""
    begin, end = intervals[0][0], intervals[-1][1]
    first, last = begin + low * (end - begin), begin + high * (end - begin)
    return (interval for interval in intervals if first <= interval[0] and interval[1] <= last)


def stream_gap(
    engine: Engine, options: argparse.Namespace, length: int = SCREENSHOT, grid: tuple[int, int, int] = SCREENSHOT_GRID
) -> Row:
    """stream-gap-ms, and beside it the same stream's median time between tokens."""
    gaps = []
    usual = 0.0
    for _ in range(REPEATS + 1):
        (stream,) = submit(engine, [random_prompt(engine.checkpoint, PROMPT)], LONG)
        stream.wait_for(30)
        prompt = image_prompt(engine, length, grid)
        stream.wait_for(len(stream.times) + 10)
        before = len(stream.times)
        (beside,) = submit(engine, [prompt], 1)
        beside.wait()
        stream.wait_for(len(stream.times) + 10)
        engine.cancel(stream.request_id)
        stream.wait()
        times = stream.times
        gaps.append(max(after - earlier for earlier, after in pairwise(times[before - 1 :])))
        usual = statistics.median(after - earlier for earlier, after in pairwise(times[:before]))
    return make_row(options, "stream-gap-ms", 1e3 * max(gaps[1:]), "ms", also={"ms usually": 1e3 * usual})


def measure(checkpoint: Checkpoint, options: argparse.Namespace) -> list[Row]:
    engine = open_engine(checkpoint, options.setting)
    try:
        rows = [decode(engine, options, batch) for batch in BATCHES]
        if engine.runner.device.type == "cuda":
            rows.append(idle_share(engine, options))
        return [*rows, stream_gap(engine, options)]
    finally:
        engine.close()


def peer_values(checkpoint: Checkpoint, ask: live.Ask) -> dict[str, float]:
    return {f"decode-{batch}": 1e3 * token_seconds(ask, checkpoint, batch) for batch in BATCHES}


def main() -> None:
    options = read_options(__doc__, peers=True)
    checkpoint = Checkpoint.open(options.checkpoint)
    rows = measure(checkpoint, options)
    if options.peers:
        rows = live.beside(rows, checkpoint, options.setting, partial(peer_values, checkpoint))
    report(options, "decode", rows)


if __name__ == "__main__":
    main()
