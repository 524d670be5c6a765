"""bitsandbytes' INT8: its checkpoints, and its linear layers as the reference that ours are compared with.

Beside an int8 `weight` [out, in] a checkpoint has `SCB`, fp32 [out], each row's largest magnitude, and sometimes
`weight_format`, how the rows lie: 0 is one after another (bitsandbytes/nn/modules.py, Linear8bitLt).
"""

import logging
from collections.abc import Callable, Collection
from importlib import import_module
from typing import Any

import torch
from torch import nn

from autoglm.checkpoint import CheckpointError
from autoglm.config import ConfigError
from autoglm.quantization.int8 import Int8Weight
from autoglm.quantization.linear import ExternalLinear, Int8Linear

COMPANIONS = (".SCB", ".weight_format")
ROW_MAJOR = 0


def read_int8(
    values: torch.Tensor, name: str, names: Collection[str], read: Callable[[str], torch.Tensor]
) -> Int8Weight:
    """The weight whose int8 tensor is called `name`; `read` gives what lies beside it.

    Raises:
        CheckpointError: its scales are missing, or its rows are laid out for an old GPU.
    """
    scales, layout = (name.removesuffix(".weight") + companion for companion in COMPANIONS)
    if scales not in names:
        raise CheckpointError(f"tensor {name} is int8, but {scales} is not beside it")
    code = int(read(layout)) if layout in names else ROW_MAJOR
    if code != ROW_MAJOR:
        raise CheckpointError(
            f"tensor {layout} is {code}, supported is {ROW_MAJOR} (rows): save the checkpoint with a newer bitsandbytes"
        )
    return Int8Weight(values, read(scales).float().unsqueeze(1) / 127)


class BitsandbytesLinear(nn.Module):
    """An INT8 layer that bitsandbytes computes; its bias is added in there."""

    bias = None

    def __init__(self, layer: Int8Linear, threshold: float) -> None:
        super().__init__()
        library = import_library(layer.values.device)
        outputs, inputs = layer.values.shape
        with torch.device("meta"):
            inner = library.nn.Linear8bitLt(inputs, outputs, layer.bias is not None, False, threshold)
        inner.weight = library.nn.Int8Params(
            layer.values, requires_grad=False, CB=layer.values, SCB=layer.scales.squeeze(1) * 127
        )
        inner.bias = layer.bias
        self.inner = inner.eval()

    @property
    def weight(self) -> ExternalLinear:
        return ExternalLinear(self.inner, self.inner.weight.shape)


def replace_linears(model: nn.Module, threshold: float) -> None:
    """Let bitsandbytes compute every `Int8Linear` of a model that is loaded."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Int8Linear):
                setattr(parent, name, BitsandbytesLinear(child, threshold))


def import_library(device: torch.device) -> Any:
    """The package bitsandbytes, if it is there and computes on `device`.

    Raises:
        ConfigError: it is not, or does not.
    """
    try:
        library = import_module("bitsandbytes")
    except ImportError as error:
        raise ConfigError(
            f"quantization.backend is bitsandbytes, which cannot be imported ({error}): pip install bitsandbytes"
        ) from None
    if device.type not in library.supported_torch_devices:
        raise ConfigError(
            f"quantization.backend is bitsandbytes, which does not compute on {device.type}, "
            f"but on {', '.join(sorted(library.supported_torch_devices))}"
        )
    # It casts its inputs to float16, and says so at every call.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return library
