"""Linear layers in float and INT8. Each maps its weight to the checkpoint's tensors."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from autoglm.quantization.int8 import Int8Weight, empty

Tensor: TypeAlias = torch.Tensor | Int8Weight


@dataclass(frozen=True)
class ExternalLinear:
    """A linear layer computed by another library, bias included. float [T, K] -> [T, N]; shape is (N, K)."""

    compute: Callable[[torch.Tensor], torch.Tensor]
    shape: torch.Size

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(x)


class Linear(nn.Linear):
    """`nn.Linear` whose weight may be several of the checkpoint's layers, stacked along the outputs.

    Args:
        parts: the checkpoint's names of these layers and their numbers of outputs, in order; empty for a single layer.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = False, parts: Mapping[str, int] | None = None) -> None:
        super().__init__(inputs, outputs, bias)
        self.parts = dict(parts or {})

    def checkpoint_tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's tensors of this layer, named `name` in its parent: their names and views of their memory."""
        return _split(name, self.parts, self.weight.data, self.bias)

    def to_int8(self, *, symmetric: bool, grouped: bool) -> "Int8Linear":
        """An uninitialised INT8 layer of the same shape."""
        return Int8Linear(self, symmetric=symmetric, grouped=grouped)


class Int8Linear(nn.Module):
    """Replaces a `Linear`. It has no `forward`: the kernels compute with `weight` and `bias`.

    Casting the module (`.to(dtype)`) would cast its scales, so create it after the model has its dtype.
    """

    values: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None
    bias: nn.Parameter | None

    def __init__(self, layer: Linear, *, symmetric: bool, grouped: bool) -> None:
        super().__init__()
        self.parts = layer.parts
        weight = empty(*layer.weight.shape, symmetric=symmetric, grouped=grouped, device=layer.weight.device)
        self.register_buffer("values", weight.values)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("offsets", weight.offsets)
        bias = None if layer.bias is None else nn.Parameter(torch.empty_like(layer.bias), requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Int8Weight:
        return Int8Weight(self.values, self.scales, self.offsets)

    def checkpoint_tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """See `Linear.checkpoint_tensors`."""
        return _split(name, self.parts, self.weight, self.bias)


def _split(
    name: str, parts: Mapping[str, int], weight: Tensor, bias: torch.Tensor | None
) -> Iterator[tuple[str, Tensor]]:
    start = 0
    for part, outputs in (parts or {name: weight.shape[0]}).items():
        rows = slice(start, start + outputs)
        yield f"{part}.weight", weight.rows(rows) if isinstance(weight, Int8Weight) else weight[rows]
        if bias is not None:
            yield f"{part}.bias", bias.data[rows]
        start += outputs
