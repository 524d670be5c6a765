"""Passes as CUDA graphs: hundreds of launches become one, and the host's time for them disappears."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from autoglm.llm.input_batch import Shape
from autoglm.llm.scheduler import MIXED_PROMPTS, decode_room

LARGEST = 1536  # rows of a captured pass with prompts


@dataclass(frozen=True)
class Graph:
    """A captured pass: reads `inputs`, which are its own, and leaves the sampled tokens in `tokens`."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[torch.Tensor, ...]
    tokens: torch.Tensor

    def replay(self) -> torch.Tensor:
        self.graph.replay()
        return self.tokens


def decode_sizes(largest: int) -> list[int]:
    """Numbers of rows for which decoding has a graph; a pass takes the smallest that holds it."""
    steps = (1, 2, 4, 8, 16, 24, 32, 48, *range(64, largest, 32))
    return [*(size for size in steps if size < largest), largest]


def chunk_shapes(most_singles: int, most_tokens: int, most_mixed: int) -> list[Shape]:
    """Passes with prompts that have a graph: those so short that the host's launches would last longer than they.

    Args:
        most_tokens: of prompts alone.
        most_mixed: rows of a pass in which others decode beside prompts, if more than one sequence may run.
    """
    chunks = min(MIXED_PROMPTS, most_singles)
    shapes = [Shape(0, chunks, size) for size in _sizes(most_tokens)]
    if most_singles > 1:
        rooms = {decode_room(1, most_singles), most_singles}
        # The largest first: most passes beside others are as large as they may. In all they have as many rows as the
        # sizes say, which are multiples of the products' tiles.
        mixed = _sizes(most_mixed)[::-2]
        shapes += [Shape(room, chunks, size - room) for size in mixed for room in rooms if size >= 2 * room]
    return shapes


def _sizes(most: int) -> list[int]:
    most = min(most, LARGEST)
    steps = (64, 128, 192, 256, 384, 512, 768, 1024, 1280)
    return [*(size for size in steps if size < most), most]


def capture(passes: Iterable[tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]]) -> list[Graph]:
    """Graphs of functions called with these inputs, whose values must change nothing that matters.

    The one that needs the most memory should come first: all live in the same, as one runs at a time.
    """
    graphs = []
    pool = torch.cuda.graph_pool_handle()
    for run, inputs in passes:
        run(*inputs)  # compiles the kernels, and lets them make what they keep
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            tokens = run(*inputs)
        graphs.append(Graph(graph, inputs, tokens))
    return graphs
