"""Training passes as CUDA graphs: a step has a thousand small kernels, whose launches take longer than they run."""

from typing import cast

import torch
from torch import nn

from demo.speech.model import Network


class _Wrapper(nn.Module):
    """A module to capture for one shape: capturing replaces the forward method of its module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, samples: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model(samples, mask)  # type: ignore[no-any-return]


class Graphs:
    """Captures a model's passes at the first use of each input shape. The graphs share memory, so a backward pass must
    have run before the next forward pass."""

    def __init__(self, model: nn.Module) -> None:
        """model: a SpeechModel on a GPU, in training mode."""
        self._model = model
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[torch.Size, Network] = {}

    def __call__(self, samples: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if samples.shape not in self._captured:
            example = torch.randn_like(samples), torch.ones_like(mask)
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                graphed = torch.cuda.make_graphed_callables(
                    _Wrapper(self._model), example, allow_unused_input=True, pool=self._pool
                )
            self._captured[samples.shape] = cast(Network, graphed)
        return self._captured[samples.shape](samples, mask)
