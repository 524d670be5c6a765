"""Embedding, norms and row quantisation against the reference."""

from typing import Any

import pytest
import torch

from autoglm.kernels.gpu import norm
from autoglm.kernels.gpu.embed import embed
from autoglm.kernels.reference import dispatch as reference
from tests.kernels.device import DEVICE

dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])


@dtypes
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("rows, size, num_partials", [(1, 4096, 4), (17, 48, 1), (3, 257, 2), (2, 1, 1)])
def test_add_norm_equals_the_reference(
    rows: int, size: int, num_partials: int, quantized: bool, dtype: torch.dtype
) -> None:
    branch = torch.randn(num_partials, rows, size, device=DEVICE)
    residual, first, second = (torch.randn(n, size, device=DEVICE).to(dtype) for n in (rows, 1, 1))
    inputs: dict[str, Any] = {
        "branch": branch,
        "branch_norm": first[0],
        "norm": second[0],
        "eps": 1e-5,
        "quantized": quantized,
    }
    expected, expected_residual = reference.add_norm(residual=residual, **inputs)
    found, found_residual = norm.add_norm(residual=residual.clone(), **inputs)
    step = 2**-5 if dtype == torch.bfloat16 else 1e-5  # the reference rounds between its steps
    torch.testing.assert_close(found_residual, expected_residual, rtol=step, atol=step)
    if quantized:
        assert (found.values.int() - expected.values.int()).abs().max() <= (3 if dtype == torch.bfloat16 else 1)
        torch.testing.assert_close(found.scales, expected.scales, rtol=2**-6, atol=0)
    else:
        torch.testing.assert_close(found.values, expected.values, rtol=2 * step, atol=2 * step)


def test_add_norm_without_a_branch_leaves_the_residual_unchanged() -> None:
    residual, weight = torch.randn(5, 96, device=DEVICE), torch.randn(96, device=DEVICE)
    found, new_residual = norm.add_norm(
        branch=None, residual=residual.clone(), branch_norm=None, norm=weight, eps=1e-5, quantized=False
    )
    assert torch.equal(new_residual, residual)
    torch.testing.assert_close(found.values, reference.rms_norm(residual, weight, 1e-5))


@dtypes
def test_a_branch_without_a_norm_is_added_unchanged(dtype: torch.dtype) -> None:
    branch, residual = torch.randn(2, 7, 96, device=DEVICE).to(dtype), torch.randn(7, 96, device=DEVICE).to(dtype)
    weight = torch.randn(96, device=DEVICE).to(dtype)
    step = 2**-5 if dtype == torch.bfloat16 else 1e-5  # the reference rounds a sum of partials before adding it
    for partials in (branch[:1], branch.float()):
        inputs: dict[str, Any] = {
            "branch": partials,
            "branch_norm": None,
            "norm": weight,
            "eps": 1e-5,
            "quantized": False,
        }
        expected, expected_residual = reference.add_norm(residual=residual, **inputs)
        found, found_residual = norm.add_norm(residual=residual.clone(), **inputs)
        torch.testing.assert_close(found_residual, expected_residual, rtol=step, atol=step)
        torch.testing.assert_close(found.values, expected.values, rtol=step, atol=step)


@pytest.mark.parametrize("rows, size", [(1, 13696), (17, 48), (4, 1), (130, 300)])
def test_quantize_equals_the_reference(rows: int, size: int) -> None:
    x = torch.randn(rows, size, device=DEVICE) * torch.logspace(-3, 3, rows, device=DEVICE)[:, None]
    x[-1] = 0
    found, expected = norm.quantize(x=x), reference.quantize(x=x)
    torch.testing.assert_close(found.scales, expected.scales)
    assert (found.values.int() - expected.values.int()).abs().max() <= 1
    assert found.values.abs().max() <= 127 and (found.values[-1] == 0).all()


@pytest.mark.parametrize("size", [48, 4096, 1030])
def test_embed_reads_tables_on_the_device_and_in_pinned_host_memory(size: int) -> None:
    table = torch.randn(33, size)
    ids = torch.randint(0, 33, (17,), device=DEVICE)
    expected = reference.embed(ids=ids.cpu(), table=table)
    assert torch.equal(embed(ids=ids, table=table.to(DEVICE)).cpu(), expected)
    if DEVICE.type == "cuda":
        assert torch.equal(embed(ids=ids, table=table.pin_memory()).cpu(), expected)
