"""Fixes for Triton's interpreter (3.6), whose numpy arrays have no BF16 and FP8."""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH_DTYPES = {
    tl.float8e4nv: torch.float8_e4m3fn, tl.bfloat16: torch.bfloat16, tl.float16: torch.float16,
    tl.float32: torch.float32, tl.float64: torch.float64,
}  # fmt: skip
Builder = interpreter.InterpreterBuilder
cast_impl, create_dot = Builder.cast_impl, Builder.create_dot


def patch() -> None:
    interpreter._convert_float = _convert_float
    Builder.create_dot = _create_dot
    for name in ("create_si_to_fp", "create_ui_to_fp"):
        setattr(Builder, name, _int_to_float)


def _convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    """Round to nearest: the original truncates to BF16, and loses the carry when FP8 rounds up."""
    x = torch.from_numpy(np.ascontiguousarray(data).reshape(-1).view(np.uint8)).view(TORCH_DTYPES[source])
    bits = x.to(TORCH_DTYPES[target]).view(torch.uint8).numpy()
    return bits.view(f"uint{target.primitive_bitwidth}").reshape(data.shape)


def _create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    """Multiply BF16 as fp32: the original multiplies the bit patterns."""
    a, b = (cast_impl(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return create_dot(self, a, b, *rest)


def _int_to_float(self: Any, source: Any, target: Any) -> Any:
    """Convert integers to BF16 through fp32: the original stores the integers as bit patterns."""
    if target.scalar == tl.bfloat16:
        source = cast_impl(self, source, tl.float32)
    return cast_impl(self, source, target)
