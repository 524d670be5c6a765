"""Sampling against plain definitions: penalties token by token, cuts of the distribution, draws by frequency."""

from typing import Any

import pytest
import torch

from autoglm.kernels.reference import dispatch as reference
from autoglm.kernels.reference.sampling import gumbel
from autoglm.kernels.sampling_metadata import IN_PROMPT
from autoglm.llm.request_slots import record
from autoglm.preprocess.sampling_params import SamplingParams

VOCABULARY = 12


def choose(
    rows: torch.Tensor,
    seed: int = 0,
    steps: list[int] | None = None,
    marks: torch.Tensor | None = None,
    **options: Any,
) -> list[int]:
    """One token for each row; all rows have the same options."""
    count, vocab = rows.shape
    params = SamplingParams.from_parameters(options, {})
    marks = torch.zeros(count, vocab, dtype=torch.int32) if marks is None else marks
    seats = torch.arange(count, dtype=torch.int32)
    chosen = reference.sample(
        rows.clone(),
        seats,
        torch.tensor(steps or [0] * count, dtype=torch.int32),
        torch.tensor(record(params, seed), dtype=torch.int32).repeat(count, 1),
        marks,
        torch.zeros(count, dtype=torch.int64),
        torch.zeros(count, vocab),
    )
    return chosen.tolist()


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def marks_of(prompt: tuple[int, ...], answer: tuple[int, ...]) -> torch.Tensor:
    marks = torch.zeros(1, VOCABULARY, dtype=torch.int32)
    for token in set(prompt):
        marks[0, token] += IN_PROMPT
    for token in answer:
        marks[0, token] += 1
    return marks


@pytest.mark.parametrize("seed", range(8))
def test_penalties(seed: int) -> None:
    """The best by plain arithmetic; and the second best once the best is gone, and so on."""
    options: dict[str, Any] = {"frequency_penalty": 0.5, "presence_penalty": 0.25, "repetition_penalty": 2.0}
    marks, row = marks_of((1, 2, 2), (5, 5, 7)), logits(seed)
    values = []
    for token in range(VOCABULARY):
        value = float(row[token])
        if token in (1, 2, 5, 7):  # prompt and answer
            value = value / 2 if value > 0 else value * 2
        values.append(value - {5: 2 * 0.5 + 0.25, 7: 0.5 + 0.25}.get(token, 0.0))  # the answer only
    for token in sorted(range(VOCABULARY), key=lambda token: -values[token]):
        assert choose(row[None], marks=marks.clone(), **options) == [token]
        row[token] = -torch.inf


def test_greedy_follows_the_penalty() -> None:
    row = torch.tensor([[0.0, 1.0, 0.9, *[-1.0] * 9]])
    marks = marks_of((), ())
    assert [choose(row, marks=marks, frequency_penalty=0.2) for _ in range(4)] == [[1], [2], [1], [2]]
    assert choose(row, marks=marks) == [1]


CUTS: list[dict[str, Any]] = [
    {}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.6, "min_p": 0.05}, {"top_k": 99}
]  # fmt: skip


@pytest.mark.parametrize("options", CUTS)
def test_distribution(options: dict[str, Any]) -> None:
    """Frequencies of many draws against probabilities that are computed one token at a time."""
    params = SamplingParams.from_parameters({"temperature": 1.3, **options}, {})
    row = logits(3)
    wanted = probabilities(row, params)
    draws = 20_000
    chosen = choose(row.repeat(draws, 1), 1, list(range(draws)), temperature=1.3, **options)
    counts = torch.bincount(torch.tensor(chosen), minlength=VOCABULARY)
    assert (counts[wanted == 0] == 0).all()
    expected = wanted * draws
    chi_square = float(((counts - expected).square() / expected)[wanted > 0].sum())
    assert chi_square < 35  # 11 degrees of freedom: once in 4000
    assert (counts / draws - wanted).abs().sum() / 2 < 0.02


def probabilities(row: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    weights = torch.exp(row.double() / params.temperature)
    chances = (weights / weights.sum()).tolist()
    order = sorted(range(VOCABULARY), key=lambda i: -chances[i])
    keep = [i for i in order if chances[i] >= params.min_p * chances[order[0]]]
    keep = keep[: params.top_k or None]
    total, before, nucleus = sum(chances[i] for i in keep), 0.0, []
    for i in keep:
        if before < params.top_p * total:
            nucleus.append(i)
        before += chances[i]
    kept = torch.zeros(VOCABULARY, dtype=torch.double)
    kept[nucleus] = torch.tensor([chances[i] for i in nucleus], dtype=torch.double)
    return kept / kept.sum()


def test_noise_is_gumbel_noise() -> None:
    """Against the distribution function exp(-exp(-x)); also far out, where a draw from a large vocabulary looks."""
    halves = torch.tensor([[7, 0]], dtype=torch.int32).repeat(40, 1)
    noise = gumbel(halves, torch.arange(40, dtype=torch.int32), 50_000).flatten()
    ordered = noise.double().sort().values
    below = (torch.arange(len(ordered)) + 0.5) / len(ordered)
    assert ((-(-ordered).exp()).exp() - below).abs().max() < 2e-3  # Kolmogorov-Smirnov
    assert 11 < ordered[-1] < 22
    far = (-torch.expm1(-(-ordered[-2000:]).exp()) * len(ordered)).flip(0)  # the n-th largest is about n
    assert (far[100:] / (torch.arange(2000)[100:] + 0.5) - 1).abs().max() < 0.3


@pytest.mark.parametrize("options", CUTS)
def test_seed_and_step_decide_and_the_batch_does_not(options: dict[str, Any]) -> None:
    rows = torch.stack([logits(i) for i in range(4)])
    options = {"temperature": 1.5, **options}
    alone = [choose(rows[i : i + 1], 11, [i], **options)[0] for i in range(4)]
    assert choose(rows, 11, [0, 1, 2, 3], **options) == alone
    assert len({choose(rows[:1], seed, **options)[0] for seed in range(40)}) > 1
    assert len({choose(rows[:1], 11, [step], **options)[0] for step in range(40)}) > 1


def test_seeds_have_64_bits() -> None:
    row = torch.zeros(1, 500)
    chosen = {choose(row, seed, temperature=1.0)[0] for seed in (1, 1 + 2**31, 1 + 2**32, 1 + 2**63, 2**64 - 1)}
    assert len(chosen) == 5
