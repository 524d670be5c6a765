"""The operations of `Kernels` on CUDA devices."""

import torch

from autoglm.kernels.base import WEIGHT_ONLY_ROWS, Activation, Weight
from autoglm.kernels.gpu.decode_attention import decode_attention
from autoglm.kernels.gpu.divprune import divprune
from autoglm.kernels.gpu.embed import embed
from autoglm.kernels.gpu.gemm import gemm
from autoglm.kernels.gpu.gemv import gemv
from autoglm.kernels.gpu.image import patchify, resample
from autoglm.kernels.gpu.image_attention import image_attention, pack_varlen, rotate_heads
from autoglm.kernels.gpu.norm import add_norm, quantize
from autoglm.kernels.gpu.png import unfilter
from autoglm.kernels.gpu.prefill_attention import prefill_attention
from autoglm.kernels.gpu.quest import select_pages
from autoglm.kernels.gpu.rotary import store_kv
from autoglm.kernels.gpu.sampling import read_slots, sample, sample_deferred
from autoglm.kernels.gpu.skinny_gemm import MAX_ROWS, MAX_ROWS_GATED, skinny_gemm
from autoglm.kernels.gpu.swiglu import swiglu
from autoglm.kernels.reference import dispatch as reference
from autoglm.quantization.int8 import Int8Weight
from autoglm.quantization.linear import ExternalLinear

__all__ = [
    "add_norm", "decode_attention", "divprune", "embed", "gate_up", "image_attention", "linear", "pack_varlen",
    "patchify", "prefill_attention", "quantize", "quantizes", "read_slots", "resample", "rotate_heads", "sample",
    "sample_deferred", "select_pages", "store_kv", "unfilter",
]  # fmt: skip

ALIGNMENT = 16  # bytes; the tensor memory accelerator needs each row to begin at a multiple


def quantizes(*, weight: Weight, rows: int) -> bool:
    return isinstance(weight, Int8Weight) and rows > WEIGHT_ONLY_ROWS and _is_aligned(weight)


def linear(*, x: Activation, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    if x.scales is not None and isinstance(weight, Int8Weight):
        if x.values.shape[0] <= MAX_ROWS:
            return skinny_gemm(x, weight, bias)
        return gemm(x, weight, bias).unsqueeze(0)
    if not isinstance(weight, ExternalLinear) and _fits_gemv(x.values, weight):
        return gemv(x.values, weight, bias)
    return reference.linear(x=x, weight=weight, bias=bias)


def gate_up(*, x: Activation, weight: Weight) -> torch.Tensor:
    if x.scales is not None and isinstance(weight, Int8Weight):
        return (skinny_gemm if x.values.shape[0] <= MAX_ROWS_GATED else gemm)(x, weight, gated=True)
    if not isinstance(weight, ExternalLinear) and _fits_gemv(x.values, weight):
        return gemv(x.values, weight, gated=True)
    return swiglu(reference.product(x, weight))


def _fits_gemv(x: torch.Tensor, weight: torch.Tensor | Int8Weight) -> bool:
    plain = isinstance(weight, Int8Weight) or weight.dtype == torch.bfloat16
    return x.shape[0] == 1 and x.dtype == torch.bfloat16 and plain and _is_aligned(weight)


def _is_aligned(weight: Weight) -> bool:
    return weight.shape[1] % ALIGNMENT == 0 and weight.shape[0] % ALIGNMENT == 0
