"""Forward passes as CUDA graphs: one launch instead of hundreds, without the host's time for them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from autoglm.llm.input_batch import BatchShape
from autoglm.llm.scheduler import MAX_MIXED_PROMPTS, decode_capacity

MAX_CAPTURED_ROWS = 1536  # of a pass with prompts


@dataclass(frozen=True)
class CapturedPass:
    """A captured pass: reads its own `inputs` and writes the sampled tokens to `tokens`."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[torch.Tensor, ...]
    tokens: torch.Tensor

    def replay(self) -> torch.Tensor:
        self.graph.replay()
        return self.tokens


def decode_sizes(max_batch_size: int) -> list[int]:
    """Batch sizes that have a decode graph; a batch is padded to the next one."""
    sizes = (1, 2, 4, 8, 16, 24, 32, 48, *range(64, max_batch_size, 32))
    return [*(size for size in sizes if size < max_batch_size), max_batch_size]


def mixed_shapes(*, max_batch_size: int, max_tokens: int, max_mixed_tokens: int) -> list[BatchShape]:
    """The shapes of passes with prompts that have a graph: the short ones, whose launches would take longest.

    Args:
        max_tokens: of a pass of prompts alone.
        max_mixed_tokens: rows of a pass of prompts and decoding sequences.
    """
    chunks = min(MAX_MIXED_PROMPTS, max_batch_size)
    shapes = [BatchShape(0, chunks, size) for size in _row_sizes(max_tokens)]
    if max_batch_size > 1:
        capacities = {decode_capacity(1, max_batch_size), max_batch_size}
        # The largest is always captured: most mixed passes are as large as allowed. The sizes count all rows, which
        # makes these multiples of the GEMMs' tiles.
        mixed = _row_sizes(max_mixed_tokens)[::-2]
        shapes += [BatchShape(c, chunks, size - c) for size in mixed for c in capacities if size >= 2 * c]
    return shapes


def _row_sizes(max_rows: int) -> list[int]:
    max_rows = min(max_rows, MAX_CAPTURED_ROWS)
    sizes = (64, 128, 192, 256, 384, 512, 768, 1024, 1280)
    return [*(size for size in sizes if size < max_rows), max_rows]


def capture(passes: Iterable[tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]]) -> list[CapturedPass]:
    """Capture functions called with these inputs. Running them on the inputs must have no lasting effect.

    The one that needs the most memory should come first: all graphs share one pool, since one runs at a time.
    """
    captured = []
    pool = torch.cuda.graph_pool_handle()
    for run, inputs in passes:
        run(*inputs)  # compiles the kernels and fills their caches
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            tokens = run(*inputs)
        captured.append(CapturedPass(graph, inputs, tokens))
    return captured
