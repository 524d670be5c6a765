"""Layers shared by the vision and the language model. The kernels do the computation."""

import torch
from torch import nn

from autoglm.kernels.base import Activation, Kernels, Weight


class RMSNorm(nn.Module):
    """The weight of a root-mean-square norm over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps


def fit(x: torch.Tensor, weight: Weight, kernels: Kernels) -> Activation:
    """Quantise the activations if the kernel for this weight takes int8."""
    return kernels.quantize(x=x) if kernels.quantizes(weight=weight, rows=x.shape[0]) else Activation(x)
