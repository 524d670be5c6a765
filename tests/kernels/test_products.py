"""GEMV and GEMMs against their definition in fp64."""

import pytest
import torch

from autoglm.kernels.base import Activation
from autoglm.kernels.gpu import dispatch as gpu
from autoglm.kernels.gpu import gemm as gemm_module
from autoglm.kernels.gpu import skinny_gemm as skinny_module
from autoglm.kernels.gpu.gemm import gemm
from autoglm.kernels.gpu.gemv import gemv
from autoglm.kernels.gpu.skinny_gemm import skinny_gemm, tiling
from autoglm.kernels.reference import dispatch as reference
from autoglm.quantization.int8 import GROUP, Int8Weight
from tests.kernels.device import DEVICE, set_num_sms

BFLOAT16 = 8e-3  # relative error
weight_kinds = pytest.mark.parametrize(
    "grouped, asymmetric", [(False, False), (False, True), (True, False), (True, True)]
)


def int8_weight(
    outputs: int, size: int, grouped: bool = False, asymmetric: bool = False, group_offset: int = 0
) -> Int8Weight:
    """A random weight between poisoned rows, so that a kernel that reads outside of it returns NaN."""
    groups = -(-(size + group_offset) // GROUP) if grouped else 1
    values = torch.full((outputs + 2, size), 127, dtype=torch.int8, device=DEVICE)
    scales = torch.full((outputs + 2, groups), torch.nan, device=DEVICE)
    values[1:-1] = torch.randint(-127, 128, (outputs, size), dtype=torch.int8, device=DEVICE)
    scales[1:-1] = torch.rand(outputs, groups, device=DEVICE) * 1e-3 + 1e-4
    offsets = torch.randn_like(scales[1:-1]) * 1e-2 if asymmetric else None
    return Int8Weight(values[1:-1], scales[1:-1].contiguous(), offsets, group_offset)


def by_definition(x: Activation, weight: Int8Weight | torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    rows = x.values.double() if x.scales is None else x.values.double() * x.scales.double()[:, None]
    wide = weight.dequantize(torch.float64) if isinstance(weight, Int8Weight) else weight.double()
    return rows @ wide.T + (0 if bias is None else bias.double())


def gated(product: torch.Tensor) -> torch.Tensor:
    gate, up = product.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@weight_kinds
@pytest.mark.parametrize("outputs, size", [(64, 256), (38, 48), (16, 4096), (10, 13696), (24, 304)])
def test_gemv_with_int8_weights(outputs: int, size: int, grouped: bool, asymmetric: bool) -> None:
    weight = int8_weight(outputs, size, grouped, asymmetric)
    x = Activation(torch.randn(1, size, device=DEVICE).bfloat16())
    bias = torch.randn(outputs, device=DEVICE)
    assert error(gemv(x.values, weight, bias).sum(0), by_definition(x, weight, bias)) < 1e-4
    assert error(gemv(x.values, weight, gated=True), gated(by_definition(x, weight))) < BFLOAT16


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 200])
@pytest.mark.parametrize(
    "outputs, size, group_offset", [(64, 256, 64), (48, 48, 64), (48, 80, 96), (16, 6848, 64), (144, 1040, 16)]
)
def test_a_shard_that_begins_within_a_group(
    outputs: int, size: int, group_offset: int, rows: int, asymmetric: bool
) -> None:
    weight = int8_weight(outputs, size, True, asymmetric, group_offset)
    x = torch.randn(rows, size, device=DEVICE).bfloat16()
    activation = gpu.quantize(x=x) if gpu.quantizes(weight=weight, rows=rows) else Activation(x)
    bias = torch.randn(outputs, device=DEVICE).bfloat16()
    expected = by_definition(activation, weight, bias)
    assert error(gpu.linear(x=activation, weight=weight, bias=bias).sum(0), expected) < BFLOAT16
    assert error(reference.linear(x=activation, weight=weight, bias=bias).sum(0), expected) < BFLOAT16


@pytest.mark.parametrize("outputs, size", [(64, 256), (38, 48), (6, 4096), (10, 13696)])
def test_gemv_with_bfloat16_weights(outputs: int, size: int) -> None:
    weight = torch.randn(outputs, size, device=DEVICE).bfloat16() * size**-0.5
    x = Activation(torch.randn(1, size, device=DEVICE).bfloat16())
    assert error(gemv(x.values, weight).sum(0), by_definition(x, weight)) < 1e-5
    assert error(gemv(x.values, weight, gated=True), gated(by_definition(x, weight))) < BFLOAT16


def test_gemv_is_accurate_for_activations_of_very_different_magnitudes() -> None:
    weight = int8_weight(32, 512)
    x = torch.randn(1, 512, device=DEVICE) * torch.logspace(-6, 4, 512, device=DEVICE)
    rows = Activation(x.bfloat16())
    assert error(gemv(rows.values, weight).sum(0), by_definition(rows, weight)) < 1e-4
    assert (gemv(torch.zeros_like(rows.values), weight) == 0).all()


@weight_kinds
@pytest.mark.parametrize("rows, outputs, size", [(2, 64, 256), (17, 48, 48), (5, 144, 304), (64, 80, 128)])
def test_int8_gemms(rows: int, outputs: int, size: int, grouped: bool, asymmetric: bool) -> None:
    weight = int8_weight(outputs, size, grouped, asymmetric)
    x = reference.quantize(x=torch.randn(rows, size, device=DEVICE))
    bias = torch.randn(outputs, device=DEVICE)
    expected = by_definition(x, weight, bias)
    assert error(skinny_gemm(x, weight, bias).sum(0), expected) < 1e-5
    assert error(gemm(x, weight, bias), expected) < BFLOAT16
    expected = gated(by_definition(x, weight))
    assert error(skinny_gemm(x, weight, gated=True), expected) < BFLOAT16
    assert error(gemm(x, weight, gated=True), expected) < BFLOAT16


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("num_sms", [1, 4, 1000])
def test_gemm_with_more_tiles_than_programs(num_sms: int, grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 x 3 tiles, in swaths of 2, 2 and 1 tiles of rows."""
    monkeypatch.setattr(gemm_module, "SWATH", 2)
    set_num_sms(monkeypatch, gemm_module, num_sms)
    x = reference.quantize(x=torch.randn(600, 48, device=DEVICE))
    weight, bias = int8_weight(520, 48, grouped, True), torch.randn(520, device=DEVICE)
    assert error(gemm(x, weight, bias), by_definition(x, weight, bias)) < BFLOAT16
    weight = int8_weight(2 * 264, 48, grouped, True)
    assert error(gemm(x, weight, gated=True), gated(by_definition(x, weight))) < BFLOAT16


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("num_sms", "rows", "expected"),
    [
        (1, 5, (128, 128, 1)),
        (1, 128, (128, 128, 1)),
        (2, 32, (64, 128, 4)),
        (2, 33, (64, 128, 3)),
        (6, 64, (64, 256, 2)),
        (6, 65, (64, 256, 2)),
    ],
)
def test_skinny_gemm_with_every_tiling(
    num_sms: int, rows: int, expected: tuple[int, int, int], grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 tiles of 64 outputs; 9 or 5 blocks of K, so that some splits are shorter than others, and one is empty."""
    set_num_sms(monkeypatch, skinny_module, num_sms)
    assert tiling(rows, 144, 1040, False, num_sms)[:3] == expected
    weight, bias = int8_weight(144, 1040, grouped, True), torch.randn(144, device=DEVICE)
    x = reference.quantize(x=torch.randn(rows, 1040, device=DEVICE))
    partials = skinny_gemm(x, weight, bias)
    assert len(partials) == expected[2]
    assert error(partials.sum(0), by_definition(x, weight, bias)) < 1e-5


@pytest.mark.parametrize("rows, expected", [(16, (64, 512, 1)), (17, (128, 128, 1))])
def test_gated_skinny_gemm_with_every_tiling(rows: int, expected: tuple[int, int, int]) -> None:
    assert tiling(rows, 144, 1040, True, 132)[:3] == expected
    weight = int8_weight(2 * 144, 1040, False, True)
    x = reference.quantize(x=torch.randn(rows, 1040, device=DEVICE))
    assert error(skinny_gemm(x, weight, gated=True), gated(by_definition(x, weight))) < BFLOAT16


@pytest.mark.parametrize("rows", [1, 2, 64, 65, 129, 300])
def test_every_number_of_rows_has_a_kernel(rows: int) -> None:
    weight = int8_weight(32, 64)
    x = torch.randn(rows, 64, device=DEVICE).bfloat16()
    ready = gpu.quantize(x=x) if gpu.quantizes(weight=weight, rows=rows) else Activation(x)
    assert error(gpu.linear(x=ready, weight=weight).sum(0), by_definition(ready, weight)) < BFLOAT16
    assert error(gpu.gate_up(x=ready, weight=weight), gated(by_definition(ready, weight))) < BFLOAT16


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_unaligned_size_use_the_reference(rows: int) -> None:
    weight = int8_weight(24, 20)
    assert not gpu.quantizes(weight=weight, rows=rows)
    x = Activation(torch.randn(rows, 20, device=DEVICE))
    assert error(gpu.linear(x=x, weight=weight).sum(0), by_definition(x, weight)) < 1e-5


def test_the_reference_equals_the_definition() -> None:
    weight = int8_weight(32, 256, True, True)
    x = Activation(torch.randn(1, 256, device=DEVICE))
    assert error(reference.linear(x=x, weight=weight)[0], by_definition(x, weight)) < 1e-5
    many = reference.quantize(x=torch.randn(9, 256, device=DEVICE))
    assert error(reference.linear(x=many, weight=weight)[0], by_definition(many, weight)) < 1e-5
    assert error(reference.gate_up(x=many, weight=weight), gated(by_definition(many, weight))) < 1e-5
