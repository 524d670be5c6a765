"""Passes as CUDA graphs: hundreds of launches become one, and the host's time for them disappears."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from autoglm.llm.batch import Shape
from autoglm.llm.scheduler import MIXED_PROMPTS

LARGEST = 1024  # tokens of prompts in a captured pass


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


def chunk_shapes(most_singles: int, most_tokens: int) -> list[Shape]:
    """Passes with prompts that have a graph: those so short that the host's launches would last longer than they.

    Others decode beside a prompt only where more than one sequence may run.
    """
    most_tokens = min(most_tokens, LARGEST)
    steps = (64, 128, 192, 256, 384, 512, 768)
    tokens = [*(size for size in steps if size < most_tokens), most_tokens]
    singles = sorted({0, min(16, most_singles), most_singles} if most_singles > 1 else {0})
    chunks = min(MIXED_PROMPTS, most_singles)
    return [Shape(rows, chunks, size) for size in tokens for rows in singles if rows == 0 or size in tokens[1::2]]


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
