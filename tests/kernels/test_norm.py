"""Embedding, norms and row quantisation against their twins."""

import pytest
import torch

from autoglm.kernels.gpu import norm
from autoglm.kernels.gpu.embed import embed
from autoglm.kernels.reference import dispatch as reference
from tests.kernels.device import DEVICE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("rows, size, splits", [(1, 4096, 4), (17, 48, 1), (3, 257, 2), (2, 1, 1)])
def test_add_norm_equals_its_twin(rows: int, size: int, splits: int, quantized: bool, dtype: torch.dtype) -> None:
    branch = torch.randn(splits, rows, size, device=DEVICE)
    residual, first, second = (torch.randn(n, size, device=DEVICE).to(dtype) for n in (rows, 1, 1))
    arguments = (first[0], second[0], 1e-5, quantized)
    wanted, wanted_residual = reference.add_norm(branch, residual, *arguments)
    found, found_residual = norm.add_norm(branch, residual.clone(), *arguments)
    step = 2**-5 if dtype == torch.bfloat16 else 1e-5  # the twin rounds between its steps
    torch.testing.assert_close(found_residual, wanted_residual, rtol=step, atol=step)
    if quantized:
        assert (found.values.int() - wanted.values.int()).abs().max() <= (3 if dtype == torch.bfloat16 else 1)
        torch.testing.assert_close(found.scales, wanted.scales, rtol=2**-6, atol=0)
    else:
        torch.testing.assert_close(found.values, wanted.values, rtol=2 * step, atol=2 * step)


def test_the_first_norm_has_no_branch_and_leaves_the_residual() -> None:
    residual, weight = torch.randn(5, 96, device=DEVICE), torch.randn(96, device=DEVICE)
    found, kept = norm.add_norm(None, residual.clone(), None, weight, 1e-5, False)
    assert torch.equal(kept, residual)
    torch.testing.assert_close(found.values, reference.rms_norm(residual, weight, 1e-5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_branch_without_a_norm_is_added_as_it_is(dtype: torch.dtype) -> None:
    branch, residual = torch.randn(2, 7, 96, device=DEVICE).to(dtype), torch.randn(7, 96, device=DEVICE).to(dtype)
    weight = torch.randn(96, device=DEVICE).to(dtype)
    step = 2**-5 if dtype == torch.bfloat16 else 1e-5  # the twin rounds a sum of parts before it adds it
    for parts in (branch[:1], branch.float()):
        wanted, wanted_residual = reference.add_norm(parts, residual, None, weight, 1e-5, False)
        found, found_residual = norm.add_norm(parts, residual.clone(), None, weight, 1e-5, False)
        torch.testing.assert_close(found_residual, wanted_residual, rtol=step, atol=step)
        torch.testing.assert_close(found.values, wanted.values, rtol=step, atol=step)


@pytest.mark.parametrize("rows, size", [(1, 13696), (17, 48), (4, 1), (130, 300)])
def test_quantize_equals_its_twin(rows: int, size: int) -> None:
    x = torch.randn(rows, size, device=DEVICE) * torch.logspace(-3, 3, rows, device=DEVICE)[:, None]
    x[-1] = 0
    found, wanted = norm.quantize(x), reference.quantize(x)
    torch.testing.assert_close(found.scales, wanted.scales)
    assert (found.values.int() - wanted.values.int()).abs().max() <= 1
    assert found.values.abs().max() <= 127 and (found.values[-1] == 0).all()


@pytest.mark.parametrize("size", [48, 4096, 1030])
def test_embed_equals_its_twin_wherever_the_table_lies(size: int) -> None:
    table = torch.randn(33, size)
    ids = torch.randint(0, 33, (17,), device=DEVICE)
    wanted = reference.embed(ids.cpu(), table)
    assert torch.equal(embed(ids, table.to(DEVICE)).cpu(), wanted)
    if DEVICE.type == "cuda":
        assert torch.equal(embed(ids, table.pin_memory()).cpu(), wanted)
