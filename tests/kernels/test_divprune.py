"""The most diverse rows: the kernel, its twin, and the rule written out in loops."""

from collections.abc import Callable

import pytest
import torch

from autoglm.kernels.gpu import divprune as diversity
from autoglm.kernels.gpu.divprune import most_diverse
from autoglm.kernels.reference import sparse as twin

FUNCTIONS = (most_diverse, twin.most_diverse)


def by_definition(rows: torch.Tensor, count: int) -> list[int]:
    """First the row whose nearest neighbour is farthest, then each time the one that is farthest from those chosen."""
    x = torch.nn.functional.normalize(rows.double(), dim=-1)
    likeness = (x @ x.T).tolist()
    places = range(len(rows))
    chosen: list[int] = []
    for _ in range(count):
        others = {i: chosen or [j for j in places if j != i] for i in places if i not in chosen}
        nearest = {i: max((likeness[i][j] for j in some), default=-1.0) for i, some in others.items()}
        chosen.append(min(nearest, key=lambda i: nearest[i]))
    return sorted(chosen)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("n, count", [(1, 1), (2, 1), (40, 1), (40, 13), (40, 40), (150, 45)])
def test_by_definition(function: Callable[..., torch.Tensor], n: int, count: int, device: torch.device) -> None:
    torch.manual_seed(n)
    rows = torch.randn(n, 32)
    assert function(rows.to(device), count).tolist() == by_definition(rows, count)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_of_each_kind(function: Callable[..., torch.Tensor], device: torch.device) -> None:
    torch.manual_seed(0)
    kinds = torch.nn.functional.normalize(torch.randn(8, 32), dim=-1)
    rows = (kinds.repeat_interleave(5, 0) + 0.01 * torch.randn(40, 32)).to(device)
    assert (function(rows, 8) // 5).tolist() == list(range(8))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_of_equals_the_first(function: Callable[..., torch.Tensor], device: torch.device) -> None:
    """Five directions at right angles, each three times: one of each, the first, then what is left from the front."""
    rows = torch.eye(5, 16, device=device).repeat(3, 1)
    assert function(rows, 5).tolist() == [0, 1, 2, 3, 4]
    assert function(rows, 7).tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_no_number_is_chosen_once(function: Callable[..., torch.Tensor], device: torch.device) -> None:
    rows = torch.randn(20, 16)
    rows[3], rows[7], rows[9, 2] = torch.nan, torch.inf, -torch.inf
    for count in (5, 20):
        chosen = function(rows.to(device), count).tolist()
        assert len(set(chosen)) == count and chosen == sorted(chosen) and set(chosen) <= set(range(20))


@pytest.mark.parametrize("n", [300, 4096, 4097])
def test_kernel_is_its_twin(n: int, device: torch.device) -> None:
    """On both sides of what one program of each size holds."""
    torch.manual_seed(n)
    rows = torch.randn(n, 24, device=device).bfloat16()
    assert torch.equal(most_diverse(rows, 30), twin.most_diverse(rows, 30))


def test_too_many_rows_are_the_twin_s(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(33, 8, device=device)
    monkeypatch.setattr(diversity, "MOST", 32)
    monkeypatch.setattr(diversity, "_most_diverse", None)
    assert torch.equal(most_diverse(rows, 9), twin.most_diverse(rows, 9))
