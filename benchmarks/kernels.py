"""Time of each kernel, next to its roofline.

    python -m benchmarks.kernels --checkpoint DIR [--setting int8|bf16]

Microseconds per launch: launches over different memory (`benchmarks.cases`) are captured in a CUDA graph, its replays
are timed with events, and the median is divided by the number of launches. Only the checkpoint's config is read. Exits
with status 2 without a CUDA device.
"""

import argparse
import statistics
from collections.abc import Iterable

import torch

from autoglm.checkpoint import Checkpoint
from autoglm.kernels import get_kernels
from benchmarks import limits
from benchmarks.cases import Case, Cases, Launch
from benchmarks.report import Row, make_row, needs_gpu, read_options, report

ROWS = (1, 2, 16, 64, 128, 1024, 3422)
PROMPT_LENGTH = 3422
BATCH_SIZES = (1, 16, 64)
SEQ_LENS = (192, 3600)
REPLAYS = 7


def graph_seconds(launches: list[Launch]) -> float:
    """Seconds per launch in a graph of all launches."""
    for launch in launches:  # compiles
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    times: list[float] = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times) / len(launches)


def kernel_row(case: Case, seconds: float, options: argparse.Namespace) -> Row:
    """The time of a case, with its bytes and operations and their rates."""
    work = case.work
    also = {"MB": work.bytes / 1e6, "GB/s": work.bytes / seconds / 1e9}
    if work.operations:
        also |= {"GOP": work.operations / 1e9, "TOPS": work.operations / seconds / 1e12}
    limit = 1e3 * limits.milliseconds(work, options.machine, options.setting)
    return make_row(options, case.name, seconds * 1e6, "us", limit, also)


@torch.inference_mode()
def measure(cases: Iterable[Case], options: argparse.Namespace) -> list[Row]:
    rows = []
    for case in cases:
        rows.append(kernel_row(case, graph_seconds(case.make()), options))
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    options = read_options(__doc__)
    needs_gpu()
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    text = Checkpoint.open(options.checkpoint).text
    cases = Cases(get_kernels(device), text, device, torch.bfloat16, options.setting)
    report(options, "kernels", measure(cases.all(ROWS, PROMPT_LENGTH, BATCH_SIZES, SEQ_LENS), options))


if __name__ == "__main__":
    main()
