"""DivPrune: the kernel, its reference, and the definition in plain loops."""

from collections.abc import Callable

import pytest
import torch

from autoglm.kernels.gpu import divprune as divprune_module
from autoglm.kernels.gpu.divprune import divprune
from autoglm.kernels.reference import sparse as reference
from tests.kernels.device import DEVICE

SIZES = [(1, 1), (2, 1), (40, 1), (40, 13), (40, 40), (150, 45)]
both = pytest.mark.parametrize("function", [divprune, reference.divprune], ids=["kernel", "reference"])
Function = Callable[..., torch.Tensor]


def by_definition(similarity: torch.Tensor, count: int) -> list[int]:
    """First the row whose nearest neighbour is farthest, then always the one farthest from those chosen."""
    similar = similarity.tolist()
    indices = range(len(similar))
    chosen: list[int] = []
    for _ in range(count):
        others = {i: chosen or [j for j in indices if j != i] for i in indices if i not in chosen}
        nearest = {i: max((similar[i][j] for j in neighbours), default=-1.0) for i, neighbours in others.items()}
        chosen.append(min(nearest, key=lambda i: nearest[i]))
    return sorted(chosen)


def cosines(rows: torch.Tensor) -> torch.Tensor:
    """In fp64, and symmetric bit for bit, which a matrix product need not be."""
    x = torch.nn.functional.normalize(rows.double(), dim=-1)
    return (x[:, None] * x).sum(-1)


@both
@pytest.mark.parametrize("n, count", SIZES)
def test_rows_with_exact_similarities_are_chosen_by_definition(function: Function, n: int, count: int) -> None:
    """16 components of equal size: cosines are multiples of 1/16, without rounding, and many are equal."""
    torch.manual_seed(n)
    signs = torch.randint(0, 2, (n, 32)) * 2 - 1.0
    rows = torch.zeros(n, 32).scatter(1, torch.rand(n, 32).argsort(1)[:, :16], signs)
    rows *= 2.0 ** (torch.arange(n) % 7 - 3)[:, None]
    assert function(embeddings=rows.to(DEVICE), count=count).tolist() == by_definition(cosines(rows), count)


@both
@pytest.mark.parametrize("n, count", SIZES)
def test_random_rows_are_chosen_by_definition(
    function: Function, n: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All choose by the same similarities: a matrix product may round those of (a, b) and (b, a) differently."""
    torch.manual_seed(n)
    rows = torch.randn(n, 32)
    exact = cosines(rows)
    similarity, nearest = reference.compute_similarity(rows.to(DEVICE))
    off_diagonal = ~torch.eye(n, dtype=torch.bool)
    torch.testing.assert_close(similarity.cpu()[off_diagonal], exact[off_diagonal].float())
    torch.testing.assert_close(nearest.cpu(), exact.float().fill_diagonal_(-1).amax(1))
    assert (similarity.diag() == torch.inf).all()

    shared = exact.float()
    given = shared.clone().fill_diagonal_(torch.inf), shared.clone().fill_diagonal_(-1).amax(1)
    monkeypatch.setattr(reference, "compute_similarity", lambda _: tuple(t.to(DEVICE) for t in given))
    assert function(embeddings=rows.to(DEVICE), count=count).tolist() == by_definition(shared, count)


@both
def test_one_row_of_each_cluster_is_chosen(function: Function) -> None:
    torch.manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(8, 32), dim=-1)
    rows = (centres.repeat_interleave(5, 0) + 0.01 * torch.randn(40, 32)).to(DEVICE)
    assert (function(embeddings=rows, count=8) // 5).tolist() == list(range(8))


@both
def test_ties_go_to_the_first_row(function: Function) -> None:
    """Three copies of five orthogonal rows: the first of each, then the remaining ones in order."""
    rows = torch.eye(5, 16, device=DEVICE).repeat(3, 1)
    assert function(embeddings=rows, count=5).tolist() == [0, 1, 2, 3, 4]
    assert function(embeddings=rows, count=7).tolist() == [0, 1, 2, 3, 4, 5, 6]


@both
def test_rows_that_are_not_finite_are_chosen_once(function: Function) -> None:
    torch.manual_seed(0)
    rows = torch.randn(20, 16)
    rows[3], rows[7], rows[9, 2] = torch.nan, torch.inf, -torch.inf
    for count in (5, 20):
        chosen = function(embeddings=rows.to(DEVICE), count=count).tolist()
        assert len(set(chosen)) == count and chosen == sorted(chosen) and set(chosen) <= set(range(20))


@pytest.mark.parametrize("n", [300, 4096, 4097])
def test_kernel_equals_the_reference_for_each_block_size(n: int) -> None:
    torch.manual_seed(n)
    rows = torch.randn(n, 24, device=DEVICE).bfloat16()
    assert torch.equal(divprune(embeddings=rows, count=30), reference.divprune(embeddings=rows, count=30))


def test_more_rows_than_the_largest_block_use_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(33, 8, device=DEVICE)
    monkeypatch.setattr(divprune_module, "MAX_BLOCK", 32)
    monkeypatch.setattr(divprune_module, "_divprune", None)
    assert torch.equal(divprune(embeddings=rows, count=9), reference.divprune(embeddings=rows, count=9))
