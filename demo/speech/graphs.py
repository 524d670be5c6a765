"""Training passes as CUDA graphs: a step has a thousand small kernels, which the host launches slower than they run."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from demo.speech.model import Network


class Pass(nn.Module):
    """One shape's way through a model; a graph changes the module that it was made of."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, clips: torch.Tensor, exists: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model(clips, exists)  # type: ignore[no-any-return]


class Graphs:
    """A model's forward and backward passes, captured when a shape comes for the first time. Memory is shared: a pass
    has to be finished, backwards too, before the next one begins."""

    def __init__(self, model: nn.Module) -> None:
        """model: a SpeechModel on a GPU, in training mode."""
        self._model = model
        self._pool = torch.cuda.graph_pool_handle()
        self._known: dict[torch.Size, Network] = {}

    def __call__(self, clips: torch.Tensor, exists: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if clips.shape not in self._known:
            example = torch.randn_like(clips), torch.ones_like(exists)
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                made = torch.cuda.make_graphed_callables(
                    Pass(self._model), example, allow_unused_input=True, pool=self._pool
                )
            self._known[clips.shape] = cast(Network, made)
        return self._known[clips.shape](clips, exists)
