"""The operations of the models: Triton kernels on a GPU, their PyTorch reference elsewhere. `base` declares them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import torch

    from autoglm.kernels.base import Kernels


def get_kernels(device: torch.device) -> Kernels:
    """The implementation for `device`."""
    package = "gpu" if device.type == "cuda" else "reference"
    return cast("Kernels", import_module(f"autoglm.kernels.{package}.dispatch"))
