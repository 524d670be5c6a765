"""Quantisation of weights to INT8."""

import pytest
import torch

from autoglm.quantization import int8
from autoglm.quantization.int8 import GROUP, Int8Weight, quantize


def spread(weight: torch.Tensor, grouped: bool) -> torch.Tensor:
    """The range of each element's row or group, as [N, K]."""
    parts = torch.split(weight, GROUP if grouped else weight.shape[1], dim=1)
    return torch.cat([(p.amax(1) - p.amin(1)).unsqueeze(1).expand_as(p) for p in parts], dim=1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 128), (40, 200), (17, 384)])
def test_the_error_is_at_most_half_a_level(
    shape: tuple[int, int], grouped: bool, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "BLOCK", 1000)  # several blocks of rows
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.rand(shape[0], 1) + 0.3
    quantized = quantize(weight, symmetric, grouped)
    assert quantized.values.dtype == torch.int8
    assert quantized.groups == (-(-shape[1] // GROUP) if grouped else 1)
    assert (quantized.offsets is None) == symmetric
    if symmetric:
        parts = torch.split(weight, GROUP if grouped else shape[1], dim=1)
        step = torch.cat([p.abs().amax(1, keepdim=True).expand_as(p) for p in parts], dim=1) / 127
    else:
        step = spread(weight, grouped) / 255
    assert ((quantized.dequantize() - weight).abs() <= step * 0.501 + 1e-6).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 5.0, -1e-3, 1e-44])
def test_constant_rows_have_finite_scales_and_are_reproduced(value: float, symmetric: bool) -> None:
    quantized = quantize(torch.full((2, 130), value), symmetric, grouped=True)
    assert quantized.scales.isfinite().all()
    assert (quantized.scales > 0).all()
    assert torch.allclose(quantized.dequantize(), torch.full((2, 130), value), rtol=1e-6, atol=1e-36)


def test_the_full_range_is_used() -> None:
    weight = torch.linspace(-3, 1, 64).repeat(2, 1)
    assert quantize(weight).values.min() == -127
    quantized = quantize(weight, symmetric=False)
    assert (int(quantized.values.min()), int(quantized.values.max())) == (-128, 127)


def test_rows_are_views() -> None:
    quantized = quantize(torch.randn(8, 16), symmetric=False)
    part = quantized.rows(slice(2, 4))
    part.values.zero_()
    assert (quantized.values[2:4] == 0).all()
    assert part.offsets is not None
    assert part.shape == (2, 16)


def test_bfloat16_is_quantised_like_float32() -> None:
    weight = torch.randn(4, 64).bfloat16()
    assert torch.equal(quantize(weight).values, quantize(weight.float()).values)
    assert isinstance(quantize(weight), Int8Weight)
