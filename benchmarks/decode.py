"""Decoding: time per output token at batch 1 to 64, idle time of the GPU, and inter-token latency under load.

    python -m benchmarks.decode --checkpoint DIR [--setting int8|bf16] [--peers]

decode-B: time per output token of B prompts of 128 random tokens, greedy, end-of-text ignored: (time for 129 tokens -
time for 1 token) / 128, each from submission to the last token of the last sequence; medians.

gpu-idle-share: share of time without a running kernel or copy in the middle of an answer at batch 1, from the
profiler's timeline (overlapping intervals are merged). Gaps between the kernels of one step count as idle, and the
profiler may widen them. Also reported: the share of gaps over 5 us; and, without the profiler, 1 - (time of one replay
of the step's CUDA graph, in a loop) / (time per output token in the second half of an answer).

stream-gap-ms: longest inter-token latency of a running stream while a prompt of 3,422 tokens with image embeddings is
prefilled: from the submission of that prompt until ten tokens after its first.
"""

import argparse
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
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
SCREENSHOT, SCREENSHOT_GRID = 3422, (1, 172, 78)  # 1080x2400 pixels: 3,354 image tokens
REPLAYS = 50
STREAM_TOKENS = 500
LONG_GAP_US = 5.0
MIDDLE = (0.3, 0.9)  # of the profiled span: excludes the prefill and the end of the answer

Interval = tuple[float, float]


def decode(engine: Engine, options: argparse.Namespace, batch: int, prompt: int = PROMPT, tokens: int = TOKENS) -> Row:
    """decode-`batch`."""
    seconds = token_seconds(partial(answer_seconds, engine), engine.checkpoint, batch, prompt=prompt, tokens=tokens)
    work = limits.decode_step(engine.checkpoint.text, options.setting, batch, prompt + (tokens + 1) / 2)
    limit = limits.milliseconds(work, options.machine, options.setting)
    also = {"tokens/s": batch / seconds, "GB/s": work.bytes / seconds / 1e9}
    return make_row(options, f"decode-{batch}", seconds * 1e3, "ms", limit, also)


def token_seconds(
    generate: live.Generate, checkpoint: Checkpoint, batch: int, *, prompt: int = PROMPT, tokens: int = TOKENS
) -> float:
    """Seconds per output token of `batch` sequences."""

    def median(num_tokens: int, repeats: int = REPEATS) -> float:
        prompts = [[random_prompt(checkpoint, prompt) for _ in range(batch)] for _ in range(repeats)]
        return statistics.median(generate(batched, num_tokens) for batched in prompts)

    median(tokens + 1, 1)  # warm-up
    first = median(1)
    return (median(tokens + 1) - first) / tokens


def idle_share(engine: Engine, options: argparse.Namespace, tokens: int = TOKENS) -> Row:
    """gpu-idle-share. Needs a CUDA device."""
    answer_seconds(engine, [random_prompt(engine.checkpoint, PROMPT)], tokens)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        answer_seconds(engine, [random_prompt(engine.checkpoint, PROMPT)], tokens)
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == DeviceType.CUDA]
    busy = list(within(union((event.time_range.start, event.time_range.end) for event in events), *MIDDLE))
    span = busy[-1][1] - busy[0][0]
    gaps = [after[0] - before[1] for before, after in pairwise(busy)]
    step = steady_seconds(engine, tokens)
    also = {
        "% in gaps over 5 us": 100 * sum(gap for gap in gaps if gap > LONG_GAP_US) / span,
        "us longest gap": max(gaps, default=0.0),
        "% vs graph replay": 100 * (1 - replay_seconds(engine) / step),
    }
    return make_row(options, "gpu-idle-share", 100 * sum(gaps) / span, "%", also=also)


def steady_seconds(engine: Engine, tokens: int) -> float:
    """Seconds per output token in the second half of an answer."""
    (stream,) = submit(engine, [random_prompt(engine.checkpoint, PROMPT)], tokens)
    stream.wait()
    times = stream.times[tokens // 2 :]
    return (times[-1] - times[0]) / (len(times) - 1)


def replay_seconds(engine: Engine) -> float:
    """Seconds of one replay of the decode graph at batch 1, in a loop on an idle engine. Each replay repeats the last
    step's writes, to blocks that no sequence references."""
    graph = engine.model_runner.decode_graphs[1].graph
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3 / REPLAYS


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The intervals in order, overlapping and adjacent ones merged."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def within(intervals: Sequence[Interval], low: float, high: float) -> Iterator[Interval]:
    """The intervals that are entirely between two fractions of the whole span."""
    start, end = intervals[0][0], intervals[-1][1]
    first, last = start + low * (end - start), start + high * (end - start)
    return (interval for interval in intervals if first <= interval[0] and interval[1] <= last)


def stream_gap(
    engine: Engine, options: argparse.Namespace, length: int = SCREENSHOT, grid: tuple[int, int, int] = SCREENSHOT_GRID
) -> Row:
    """stream-gap-ms, and the stream's median inter-token latency without load."""
    gaps = []
    median = 0.0
    for _ in range(REPEATS + 1):
        (stream,) = submit(engine, [random_prompt(engine.checkpoint, PROMPT)], STREAM_TOKENS)
        stream.wait_for(30)
        prompt = image_prompt(engine, length, grid)
        stream.wait_for(len(stream.times) + 10)
        before = len(stream.times)
        (load,) = submit(engine, [prompt], 1)
        load.wait()
        stream.wait_for(len(stream.times) + 10)
        engine.cancel(stream.request_id)
        stream.wait()
        times = stream.times
        gaps.append(max(after - earlier for earlier, after in pairwise(times[before - 1 :])))
        median = statistics.median(after - earlier for earlier, after in pairwise(times[:before]))
    return make_row(options, "stream-gap-ms", 1e3 * max(gaps[1:]), "ms", also={"ms median gap": 1e3 * median})


def measure(checkpoint: Checkpoint, options: argparse.Namespace) -> list[Row]:
    with closing(open_engine(checkpoint, options.setting)) as engine:
        rows = [decode(engine, options, batch) for batch in BATCHES]
        if engine.model_runner.device.type == "cuda":
            rows.append(idle_share(engine, options))
        return [*rows, stream_gap(engine, options)]


def peer_values(checkpoint: Checkpoint, generate: live.Generate) -> dict[str, float]:
    return {f"decode-{batch}": 1e3 * token_seconds(generate, checkpoint, batch) for batch in BATCHES}


def main() -> None:
    options = read_options(__doc__, peers=True)
    checkpoint = Checkpoint.open(options.checkpoint)
    rows = measure(checkpoint, options)
    if options.peers:
        rows = live.with_peers(rows, checkpoint, options.setting, partial(peer_values, checkpoint))
    report(options, "decode", rows)


if __name__ == "__main__":
    main()
