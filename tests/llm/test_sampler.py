"""Sampling against its definitions: penalties token by token, truncation, and the frequencies of samples."""

from typing import Any

import pytest
import torch

from autoglm.kernels.base import SamplingState
from autoglm.kernels.reference import dispatch as reference
from autoglm.kernels.reference.sampling import gumbel
from autoglm.kernels.sampling_metadata import PROMPT_MASK
from autoglm.llm.request_slots import pack_sampling_params
from autoglm.preprocess.sampling_params import SamplingParams

VOCABULARY = 12


def sample(
    rows: torch.Tensor,
    seed: int = 0,
    steps: list[int] | None = None,
    counts: torch.Tensor | None = None,
    **options: Any,
) -> list[int]:
    """A token for each row, all with the same options."""
    count, vocab = rows.shape
    params = SamplingParams.from_parameters(options, {})
    counts = torch.zeros(count, vocab, dtype=torch.int32) if counts is None else counts
    sampled = reference.sample(
        logits=rows.clone(),
        slots=torch.arange(count, dtype=torch.int32),
        steps=torch.tensor(steps or [0] * count, dtype=torch.int32),
        state=SamplingState(
            sampling_metadata=torch.from_numpy(pack_sampling_params(params, seed)).repeat(count, 1),
            output_token_counts=counts,
            last_tokens=torch.zeros(count, dtype=torch.int64),
            logits_buffer=torch.zeros(count, vocab),
        ),
    )
    return sampled.tolist()


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def counts_of(prompt: tuple[int, ...], answer: tuple[int, ...]) -> torch.Tensor:
    counts = torch.zeros(1, VOCABULARY, dtype=torch.int32)
    for token in set(prompt):
        counts[0, token] += PROMPT_MASK
    for token in answer:
        counts[0, token] += 1
    return counts


@pytest.mark.parametrize("seed", range(8))
def test_penalties(seed: int) -> None:
    """The order of all tokens: the best one, then the best one of the others, and so on."""
    options: dict[str, Any] = {"frequency_penalty": 0.5, "presence_penalty": 0.25, "repetition_penalty": 2.0}
    counts, row = counts_of((1, 2, 2), (5, 5, 7)), logits(seed)
    values = []
    for token in range(VOCABULARY):
        value = float(row[token])
        if token in (1, 2, 5, 7):  # prompt and answer
            value = value / 2 if value > 0 else value * 2
        values.append(value - {5: 2 * 0.5 + 0.25, 7: 0.5 + 0.25}.get(token, 0.0))  # the answer only
    for token in sorted(range(VOCABULARY), key=lambda token: -values[token]):
        assert sample(row[None], counts=counts.clone(), **options) == [token]
        row[token] = -torch.inf


def test_sampled_tokens_are_counted_for_the_penalties() -> None:
    row = torch.tensor([[0.0, 1.0, 0.9, *[-1.0] * 9]])
    counts = counts_of((), ())
    assert [sample(row, counts=counts, frequency_penalty=0.2) for _ in range(4)] == [[1], [2], [1], [2]]
    assert sample(row, counts=counts) == [1]


TRUNCATIONS: list[dict[str, Any]] = [
    {}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.6, "min_p": 0.05}, {"top_k": 99}
]  # fmt: skip


@pytest.mark.parametrize("options", TRUNCATIONS)
def test_frequencies_match_the_distribution(options: dict[str, Any]) -> None:
    """Against probabilities that are computed one token at a time."""
    params = SamplingParams.from_parameters({"temperature": 1.3, **options}, {})
    row = logits(3)
    expected = probabilities(row, params)
    count = 20_000
    sampled = sample(row.repeat(count, 1), 1, list(range(count)), temperature=1.3, **options)
    frequencies = torch.bincount(torch.tensor(sampled), minlength=VOCABULARY)
    assert (frequencies[expected == 0] == 0).all()
    chi_square = float(((frequencies - expected * count).square() / (expected * count))[expected > 0].sum())
    assert chi_square < 35  # 11 degrees of freedom: once in 4000
    assert (frequencies / count - expected).abs().sum() / 2 < 0.02


def probabilities(row: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    weights = torch.exp(row.double() / params.temperature)
    probs = (weights / weights.sum()).tolist()
    order = sorted(range(VOCABULARY), key=lambda i: -probs[i])
    keep = [i for i in order if probs[i] >= params.min_p * probs[order[0]]]
    keep = keep[: params.top_k or None]
    total, before, nucleus = sum(probs[i] for i in keep), 0.0, []
    for i in keep:
        if before < params.top_p * total:
            nucleus.append(i)
        before += probs[i]
    truncated = torch.zeros(VOCABULARY, dtype=torch.double)
    truncated[nucleus] = torch.tensor([probs[i] for i in nucleus], dtype=torch.double)
    return truncated / truncated.sum()


def test_noise_has_the_gumbel_distribution() -> None:
    """Against the distribution function exp(-exp(-x)), including the tail, which decides in a large vocabulary."""
    halves = torch.tensor([[7, 0]], dtype=torch.int32).repeat(40, 1)
    noise = gumbel(halves, torch.arange(40, dtype=torch.int32), 50_000).flatten()
    ordered = noise.double().sort().values
    below = (torch.arange(len(ordered)) + 0.5) / len(ordered)
    assert ((-(-ordered).exp()).exp() - below).abs().max() < 2e-3  # Kolmogorov-Smirnov
    assert 11 < ordered[-1] < 22
    tail = (-torch.expm1(-(-ordered[-2000:]).exp()) * len(ordered)).flip(0)  # about n for the n-th largest
    assert (tail[100:] / (torch.arange(2000)[100:] + 0.5) - 1).abs().max() < 0.3


@pytest.mark.parametrize("options", TRUNCATIONS)
def test_samples_depend_on_seed_and_step_but_not_on_the_batch(options: dict[str, Any]) -> None:
    rows = torch.stack([logits(i) for i in range(4)])
    options = {"temperature": 1.5, **options}
    alone = [sample(rows[i : i + 1], 11, [i], **options)[0] for i in range(4)]
    assert sample(rows, 11, [0, 1, 2, 3], **options) == alone
    assert len({sample(rows[:1], seed, **options)[0] for seed in range(40)}) > 1
    assert len({sample(rows[:1], 11, [step], **options)[0] for step in range(40)}) > 1


def test_seeds_have_64_bits() -> None:
    row = torch.zeros(1, 500)
    sampled = {sample(row, seed, temperature=1.0)[0] for seed in (1, 1 + 2**31, 1 + 2**32, 1 + 2**63, 2**64 - 1)}
    assert len(sampled) == 5
