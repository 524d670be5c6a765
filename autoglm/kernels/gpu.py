"""The operations as kernels for CUDA devices, under the names of `Kernels`."""

import torch

from autoglm.kernels import WEIGHT_ONLY_ROWS, Activation, Weight, reference
from autoglm.kernels.decode_attention import decode_attention
from autoglm.kernels.diversity import most_diverse
from autoglm.kernels.embed import embed
from autoglm.kernels.gate import swiglu
from autoglm.kernels.gemm import gemm
from autoglm.kernels.gemv import gemv
from autoglm.kernels.image import patchify, resample
from autoglm.kernels.image_attention import image_attention, pack, rotate_heads
from autoglm.kernels.norm import add_norm, quantize
from autoglm.kernels.page_choice import choose_pages
from autoglm.kernels.png import unfilter
from autoglm.kernels.prefill_attention import prefill_attention
from autoglm.kernels.rotary import store_keys
from autoglm.kernels.sampling import read_seats, sample, sample_late
from autoglm.kernels.skinny import WIDEST, WIDEST_GATED, skinny
from autoglm.quantization.int8 import Int8Weight
from autoglm.quantization.linear import ForeignLinear

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
    if not isinstance(weight, ForeignLinear) and _fits_gemv(x.values, weight):
        return gemv(x.values, weight, bias)
    return reference.linear(x, weight, bias)


def gate_up(x: Activation, weight: Weight) -> torch.Tensor:
    if x.scales is not None and isinstance(weight, Int8Weight):
        return (skinny if x.values.shape[0] <= WIDEST_GATED else gemm)(x, weight, gated=True)
    if not isinstance(weight, ForeignLinear) and _fits_gemv(x.values, weight):
        return gemv(x.values, weight, gated=True)
    return swiglu(reference.product(x, weight))


def _fits_gemv(x: torch.Tensor, weight: torch.Tensor | Int8Weight) -> bool:
    plain = isinstance(weight, Int8Weight) or weight.dtype == torch.bfloat16
    return x.shape[0] == 1 and x.dtype == torch.bfloat16 and plain and _is_aligned(weight)


def _is_aligned(weight: Weight) -> bool:
    return weight.shape[1] % ALIGNMENT == 0 and weight.shape[0] % ALIGNMENT == 0
