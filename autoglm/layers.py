"""Layers that the vision and the language model share. What computes with them are the kernels."""

from typing import TypeAlias

import torch
from torch import nn

from autoglm.kernels import Activation, Kernels, Weight
from autoglm.quantization.linear import Int8Linear

Linear: TypeAlias = nn.Linear | Int8Linear


class RMSNorm(nn.Module):
    """The weight of a root-mean-square norm over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps


def fit(x: torch.Tensor, weight: Weight, kernels: Kernels) -> Activation:
    """Rows in the form in which they meet this weight."""
    return kernels.quantize(x) if kernels.quantizes(weight, x.shape[0]) else Activation(x)
