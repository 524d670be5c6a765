"""bitsandbytes' INT8 checkpoints, and its linear layers as a reference for comparison.

In addition to an int8 `weight` [out, in] a checkpoint has `SCB`, fp32 [out], the largest magnitude of each row, and
optionally `weight_format`, the memory layout: 0 is row-major (bitsandbytes/nn/modules.py, Linear8bitLt).
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
    """Combine the int8 tensor `name` with its companions, which `read` returns.

    Raises:
        CheckpointError: the scales are missing, or the layout is not row-major.
    """
    scales, layout = (name.removesuffix(".weight") + companion for companion in COMPANIONS)
    if scales not in names:
        raise CheckpointError(f"tensor {scales}, the scales of the int8 tensor {name}, is missing")
    code = int(read(layout)) if layout in names else ROW_MAJOR
    if code != ROW_MAJOR:
        raise CheckpointError(
            f"tensor {layout} must be {ROW_MAJOR}, row-major (got {code}); newer versions of bitsandbytes save that"
        )
    return Int8Weight(values, read(scales).float().unsqueeze(1) / 127)


class BitsandbytesLinear(nn.Module):
    """An INT8 layer computed by bitsandbytes, bias included."""

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
    """Replace every `Int8Linear` of a loaded model by a `BitsandbytesLinear`."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Int8Linear):
                setattr(parent, name, BitsandbytesLinear(child, threshold))


def import_library(device: torch.device) -> Any:
    """Import bitsandbytes.

    Raises:
        ConfigError: it is not installed, or does not support `device`.
    """
    try:
        library = import_module("bitsandbytes")
    except ImportError as error:
        message = "quantization.backend must be native unless the package bitsandbytes can be imported"
        raise ConfigError(f"{message}; pip install bitsandbytes") from error
    if device.type not in library.supported_torch_devices:
        raise ConfigError(
            f"quantization.backend bitsandbytes supports {', '.join(sorted(library.supported_torch_devices))}, "
            f"not {device.type}"
        )
    # It casts its inputs to float16 and warns about that at every call.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return library
