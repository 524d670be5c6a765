"""CUDA graphs of the passes over one image of a common size: one launch instead of hundreds."""

import logging
import math
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autoglm.vision.vit import Grid, Layout, VisionTransformer

log = logging.getLogger(__name__)

MIB = 2**20


@dataclass(frozen=True)
class _Graph:
    """A captured pass. It reads the layout, which must outlive it, and writes `features`."""

    graph: torch.cuda.CUDAGraph
    layout: Layout
    features: torch.Tensor


class GraphedTransformer:
    """A ViT with CUDA graphs for some grids.

    Safe to call from several threads that use the same stream; the graphs share their input and their memory.
    """

    def __init__(self, model: VisionTransformer) -> None:
        self.model = model
        self._graphs: dict[Grid, _Graph] = {}
        self._lock = threading.Lock()
        weight = model.patch_embed.proj.weight
        self._patches = weight.new_empty(0, weight[0].numel())  # the input of all graphs

    @torch.inference_mode()
    def __call__(self, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """See `VisionTransformer.forward`; the result is a copy."""
        graph = self._graphs.get(grids[0]) if len(grids) == 1 else None
        if graph is None:
            return self.model(patches, grids)  # type: ignore[no-any-return]
        with self._lock:
            self._patches[: patches.shape[0]].copy_(patches)
            graph.graph.replay()
            return graph.features.clone()

    @torch.inference_mode()
    def capture(self, grids: Iterable[Grid]) -> None:
        """Capture a graph of the pass over one image of each grid. The model must be on a CUDA device.

        If memory runs out, the remaining grids run without graphs.
        """
        ordered = sorted(set(grids), key=math.prod, reverse=True)  # largest first: the others reuse its memory
        if not ordered:
            return
        begin = time.perf_counter()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self._patches.device)
        try:
            self._patches = self._patches.new_zeros(math.prod(ordered[0]), self._patches.shape[1])
            pool = torch.cuda.graph_pool_handle()
            for grid in ordered:
                self._graphs[grid] = self._capture(grid, pool)
        except RuntimeError as error:  # torch's OutOfMemoryError, or the error of the capture that it interrupted
            remaining = ordered[len(self._graphs) :]
            log.warning("images of the grids %s run without CUDA graphs: %s", remaining, error)
        torch.cuda.empty_cache()
        size = torch.cuda.memory_reserved(self._patches.device) - before
        seconds = time.perf_counter() - begin
        log.info("captured %d CUDA graphs in %.1f s, %d MiB", len(self._graphs), seconds, size // MIB)

    def _capture(self, grid: Grid, pool: Any) -> _Graph:
        patches = self._patches[: math.prod(grid)]
        for _ in range(2):  # compiles the kernels; cuDNN is planned at the second occurrence of a length
            self.model(patches, [grid])
        layout = self.model.layout([grid])
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        with (
            torch.cuda.stream(stream),  # restored even if the end of a failed capture does not
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
            features = self.model.embed(patches, layout)
        return _Graph(graph, layout, features)
