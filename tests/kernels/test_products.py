"""The products with weights against their twins, in fp64 where a twin rounds."""

import pytest
import torch

from autoglm.kernels.base import Activation
from autoglm.kernels.gpu import dispatch as gpu
from autoglm.kernels.gpu.gemm import gemm
from autoglm.kernels.gpu.gemv import gemv
from autoglm.kernels.gpu.skinny_gemm import skinny
from autoglm.kernels.reference import dispatch as reference
from autoglm.quantization.int8 import GROUP, Int8Weight
from tests.kernels.device import DEVICE

KINDS = [(False, False), (False, True), (True, False), (True, True)]  # grouped, asymmetric
BFLOAT16 = 8e-3  # relative; the interpreter cuts where a GPU rounds


def int8_weight(outputs: int, size: int, grouped: bool, asymmetric: bool) -> Int8Weight:
    """Random, a part of memory whose surroundings are poisoned: a kernel that reads outside gives NaN."""
    groups = -(-size // GROUP) if grouped else 1
    values = torch.full((outputs + 2, size), 127, dtype=torch.int8, device=DEVICE)
    scales = torch.full((outputs + 2, groups), torch.nan, device=DEVICE)
    values[1:-1] = torch.randint(-127, 128, (outputs, size), dtype=torch.int8, device=DEVICE)
    scales[1:-1] = torch.rand(outputs, groups, device=DEVICE) * 1e-3 + 1e-4
    offsets = torch.randn_like(scales[1:-1]) * 1e-2 if asymmetric else None
    return Int8Weight(values[1:-1], scales[1:-1].contiguous(), offsets)


def expected(x: Activation, weight: Int8Weight | torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    rows = x.values.double() if x.scales is None else x.values.double() * x.scales.double()[:, None]
    wide = weight.dequantize(torch.float64) if isinstance(weight, Int8Weight) else weight.double()
    return rows @ wide.T + (0 if bias is None else bias.double())


def gated(product: torch.Tensor) -> torch.Tensor:
    gate, up = product.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("grouped, asymmetric", KINDS)
@pytest.mark.parametrize("outputs, size", [(64, 256), (38, 48), (16, 4096), (10, 13696), (24, 304)])
def test_gemv_is_one_row_times_the_weight(outputs: int, size: int, grouped: bool, asymmetric: bool) -> None:
    weight = int8_weight(outputs, size, grouped, asymmetric)
    x = Activation(torch.randn(1, size, device=DEVICE).bfloat16())
    bias = torch.randn(outputs, device=DEVICE)
    assert error(gemv(x.values, weight, bias).sum(0), expected(x, weight, bias)) < 1e-4
    assert error(gemv(x.values, weight, gated=True), gated(expected(x, weight))) < BFLOAT16


@pytest.mark.parametrize("outputs, size", [(64, 256), (38, 48), (6, 4096), (10, 13696)])
def test_gemv_takes_bfloat16_weights(outputs: int, size: int) -> None:
    weight = torch.randn(outputs, size, device=DEVICE).bfloat16() * size**-0.5
    x = Activation(torch.randn(1, size, device=DEVICE).bfloat16())
    assert error(gemv(x.values, weight).sum(0), expected(x, weight)) < 1e-5
    assert error(gemv(x.values, weight, gated=True), gated(expected(x, weight))) < BFLOAT16


def test_gemv_loses_nothing_of_activations_of_very_different_size() -> None:
    weight = int8_weight(32, 512, False, False)
    x = torch.randn(1, 512, device=DEVICE) * torch.logspace(-6, 4, 512, device=DEVICE)
    rows = Activation(x.bfloat16())
    assert error(gemv(rows.values, weight).sum(0), expected(rows, weight)) < 1e-4
    nothing = torch.zeros_like(rows.values)
    assert (gemv(nothing, weight) == 0).all()


@pytest.mark.parametrize("grouped, asymmetric", KINDS)
@pytest.mark.parametrize("rows, outputs, size", [(2, 64, 256), (17, 48, 48), (5, 144, 304), (64, 80, 128)])
def test_int8_rows_times_an_int8_weight(rows: int, outputs: int, size: int, grouped: bool, asymmetric: bool) -> None:
    weight = int8_weight(outputs, size, grouped, asymmetric)
    x = reference.quantize(torch.randn(rows, size, device=DEVICE))
    bias = torch.randn(outputs, device=DEVICE)
    wanted = expected(x, weight, bias)
    assert error(skinny(x, weight, bias).sum(0), wanted) < 1e-5
    assert error(gemm(x, weight, bias), wanted) < BFLOAT16
    wanted = gated(expected(x, weight))
    assert error(skinny(x, weight, gated=True), wanted) < BFLOAT16
    assert error(gemm(x, weight, gated=True), wanted) < BFLOAT16


@pytest.mark.parametrize("rows", [1, 2, 64, 65, 129, 300])
def test_every_number_of_rows_finds_its_kernel(rows: int) -> None:
    weight = int8_weight(32, 64, False, False)
    x = torch.randn(rows, 64, device=DEVICE).bfloat16()
    ready = gpu.quantize(x) if gpu.quantizes(weight, rows) else Activation(x)
    assert error(gpu.linear(ready, weight).sum(0), expected(ready, weight)) < BFLOAT16
    assert error(gpu.gate_up(ready, weight), gated(expected(ready, weight))) < BFLOAT16


@pytest.mark.parametrize("rows", [1, 3])
def test_sizes_that_the_copy_engines_cannot_take_are_computed_all_the_same(rows: int) -> None:
    weight = int8_weight(24, 20, False, False)
    assert not gpu.quantizes(weight, rows)
    x = Activation(torch.randn(rows, 20, device=DEVICE))
    assert error(gpu.linear(x, weight).sum(0), expected(x, weight)) < 1e-5


def test_twins_agree_with_the_definition() -> None:
    weight = int8_weight(32, 256, True, True)
    x = Activation(torch.randn(1, 256, device=DEVICE))
    assert error(reference.linear(x, weight)[0], expected(x, weight)) < 1e-5
    many = reference.quantize(torch.randn(9, 256, device=DEVICE))
    assert error(reference.linear(many, weight)[0], expected(many, weight)) < 1e-5
    assert error(reference.gate_up(many, weight), gated(expected(many, weight))) < 1e-5
