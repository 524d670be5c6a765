"""A linear layer that holds its weight in INT8."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from autoglm.quantization.int8 import Int8Weight, empty


@dataclass(frozen=True)
class ForeignLinear:
    """A linear layer that another library computes, bias included. float [T, K] -> [T, N]; shape is (N, K)."""

    compute: Callable[[torch.Tensor], torch.Tensor]
    shape: torch.Size

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(x)


class Int8Linear(nn.Module):
    """Stands where an `nn.Linear` stood: `weight` and `bias` are what the kernels take. It computes nothing itself.

    Casting the module (`.to(dtype)`) would cast its scales: it is made after the model has its dtype.
    """

    values: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None
    bias: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int, bias: torch.dtype | None, symmetric: bool, grouped: bool) -> None:
        super().__init__()
        weight = empty(outputs, inputs, symmetric, grouped)
        self.register_buffer("values", weight.values)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("offsets", weight.offsets)
        made = None if bias is None else nn.Parameter(torch.empty(outputs, dtype=bias), requires_grad=False)
        self.register_parameter("bias", made)

    @property
    def weight(self) -> Int8Weight:
        return Int8Weight(self.values, self.scales, self.offsets)
