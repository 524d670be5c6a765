"""The reference implementation: every operation in plain PyTorch, for the CPU and to test the kernels against.

Nothing here works in place, so that autograd can differentiate it (the demo's training).
"""

import torch
import torch.nn.functional as F

from autoglm.kernels.base import WEIGHT_ONLY_ROWS, Activation, Weight
from autoglm.kernels.reference.attention import decode_attention, prefill_attention, store_kv
from autoglm.kernels.reference.sampling import read_slots, sample, sample_deferred
from autoglm.kernels.reference.sparse import divprune, select_pages
from autoglm.kernels.reference.vision import image_attention, pack_varlen, patchify, resample, rotate_heads, unfilter
from autoglm.quantization.int8 import Int8Weight
from autoglm.quantization.linear import ExternalLinear

__all__ = [
    "add_norm", "decode_attention", "divprune", "embed", "gate_up", "image_attention", "linear", "pack_varlen",
    "patchify", "prefill_attention", "quantize", "quantizes", "read_slots", "resample", "rotate_heads", "sample",
    "sample_deferred", "select_pages", "store_kv", "unfilter",
]  # fmt: skip


def embed(*, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return F.embedding(ids, table)


def quantizes(*, weight: Weight, rows: int) -> bool:
    return isinstance(weight, Int8Weight) and rows > WEIGHT_ONLY_ROWS


def quantize(*, x: torch.Tensor) -> Activation:
    wide = x.float()
    scales = wide.abs().amax(-1).clamp(min=1e-30) / 127
    return Activation((wide / scales[:, None]).round().to(torch.int8), scales)


def linear(*, x: Activation, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    return product(x, weight, bias).unsqueeze(0)


def gate_up(*, x: Activation, weight: Weight) -> torch.Tensor:
    gate, up = product(x, weight).chunk(2, dim=-1)
    return F.silu(gate) * up


def add_norm(
    *,
    branch: torch.Tensor | None,
    residual: torch.Tensor,
    branch_norm: torch.Tensor | None,
    norm: torch.Tensor,
    eps: float,
    quantized: bool,
) -> tuple[Activation, torch.Tensor]:
    if branch is not None:
        addend = total(branch).to(residual.dtype)
        residual = residual + (addend if branch_norm is None else rms_norm(addend, branch_norm, eps))
    x = rms_norm(residual, norm, eps)
    return quantize(x=x) if quantized else Activation(x), residual


def total(parts: torch.Tensor) -> torch.Tensor:
    """The sum of partial sums [S, ...]."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def product(x: Activation, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """[T, N]; the product of int8 rows and an INT8 weight has the bias's dtype, or fp32."""
    if isinstance(weight, ExternalLinear):
        return weight(x.values)
    if isinstance(weight, torch.Tensor):
        return F.linear(x.values, weight, bias)
    if x.scales is None:
        return F.linear(x.values, weight.dequantize(x.values.dtype), bias)
    wide = F.linear(x.values.float(), weight.dequantize()) * x.scales[:, None]
    return wide if bias is None else wide.to(bias.dtype) + bias


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Computed in fp32; the weight is applied in the input's dtype."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)
