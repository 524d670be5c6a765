"""The operations as kernels for CUDA devices, under the names of `Kernels`."""

import torch

from autoglm.kernels.base import WEIGHT_ONLY_ROWS, Activation, Weight
from autoglm.kernels.gpu.decode_attention import decode_attention
from autoglm.kernels.gpu.divprune import most_diverse
from autoglm.kernels.gpu.embed import embed
from autoglm.kernels.gpu.gemm import gemm
from autoglm.kernels.gpu.gemv import gemv
from autoglm.kernels.gpu.image import patchify, resample
from autoglm.kernels.gpu.image_attention import image_attention, pack, rotate_heads
from autoglm.kernels.gpu.norm import add_norm, quantize
from autoglm.kernels.gpu.png import unfilter
from autoglm.kernels.gpu.prefill_attention import prefill_attention
from autoglm.kernels.gpu.quest import choose_pages
from autoglm.kernels.gpu.rotary import store_keys
from autoglm.kernels.gpu.sampling import read_seats, sample, sample_late
from autoglm.kernels.gpu.skinny_gemm import WIDEST, WIDEST_GATED, skinny
from autoglm.kernels.gpu.swiglu import swiglu
from autoglm.kernels.reference import dispatch as reference
from autoglm.quantization.int8 import Int8Weight
from autoglm.quantization.linear import ExternalLinear

__all__ = [
    "add_norm",
    "choose_pages",
    "decode_attention",
    "embed",
    "gate_up",
    "image_attention",
    "linear",
    "most_diverse",
    "pack",
    "patchify",
    "prefill_attention",
    "quantize",
    "quantizes",
    "read_seats",
    "resample",
    "rotate_heads",
    "sample",
    "sample_late",
    "store_keys",
    "unfilter",
]

ALIGNMENT = 16  # bytes: what the copy engines want rows to begin at


def quantizes(weight: Weight, rows: int) -> bool:
    return isinstance(weight, Int8Weight) and rows > WEIGHT_ONLY_ROWS and _is_aligned(weight)


def linear(x: Activation, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    if x.scales is not None and isinstance(weight, Int8Weight):
        if x.values.shape[0] <= WIDEST:
            return skinny(x, weight, bias)
        return gemm(x, weight, bias).unsqueeze(0)
    if not isinstance(weight, ExternalLinear) and _fits_gemv(x.values, weight):
        return gemv(x.values, weight, bias)
    return reference.linear(x, weight, bias)


def gate_up(x: Activation, weight: Weight) -> torch.Tensor:
    if x.scales is not None and isinstance(weight, Int8Weight):
        return (skinny if x.values.shape[0] <= WIDEST_GATED else gemm)(x, weight, gated=True)
    if not isinstance(weight, ExternalLinear) and _fits_gemv(x.values, weight):
        return gemv(x.values, weight, gated=True)
    return swiglu(reference.product(x, weight))


def _fits_gemv(x: torch.Tensor, weight: torch.Tensor | Int8Weight) -> bool:
    plain = isinstance(weight, Int8Weight) or weight.dtype == torch.bfloat16
    return x.shape[0] == 1 and x.dtype == torch.bfloat16 and plain and _is_aligned(weight)


def _is_aligned(weight: Weight) -> bool:
    return weight.shape[1] % ALIGNMENT == 0 and weight.shape[0] % ALIGNMENT == 0
