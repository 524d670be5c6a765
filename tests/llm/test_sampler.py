"""Sampling against plain definitions: penalties token by token, cuts of the distribution, draws by frequency."""

from typing import Any

import pytest
import torch

from autoglm.llm.sampler import draw, penalise, sample
from autoglm.llm.sequence import Request, Sequence
from autoglm.llm.stop import stop_ids
from autoglm.sampling import SamplingParams
from autoglm.tokenizer import Detokenizer, Vocabulary
from tests.conftest import Pair

VOCABULARY = 12


@pytest.fixture
def sequence(plain: Pair) -> Any:
    def make(generated: tuple[int, ...] = (), **options: Any) -> Sequence:
        request = Request("x", [1, 2, 2], SamplingParams.from_parameters(options, {}), lambda _: None)
        positions = torch.zeros(3, 3, dtype=torch.int32)
        detokenizer = Detokenizer(Vocabulary(plain.checkpoint.path))
        made = Sequence(request, positions, 3, [], detokenizer, stop_ids((), (), False), 100)
        for token in generated:
            made.append(token)
        return made

    return make


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def test_penalties(sequence: Any) -> None:
    row, plain = logits(), logits()
    penalise(row, sequence((5, 5, 7), frequency_penalty=0.5, presence_penalty=0.25, repetition_penalty=2.0))
    for token in range(VOCABULARY):
        value = float(plain[token])
        if token in (1, 2, 5, 7):  # prompt and answer
            value = value / 2 if value > 0 else value * 2
        value -= {5: 2 * 0.5 + 0.25, 7: 0.5 + 0.25}.get(token, 0.0)  # the answer only
        assert float(row[token]) == pytest.approx(value)


def test_greedy_follows_the_penalty(sequence: Any) -> None:
    row = torch.tensor([[0.0, 1.0, 0.9, *[-1.0] * 9]])
    assert sample(row.clone(), [sequence()]) == [1]
    assert sample(row.clone(), [sequence((1,), frequency_penalty=0.2)]) == [2]


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.6, "min_p": 0.05}, {"top_k": 99}],
)
def test_distribution(options: dict[str, Any]) -> None:
    """Frequencies of many draws against probabilities that are computed one token at a time."""
    params = SamplingParams.from_parameters({"temperature": 1.3, **options}, {})
    row = logits(3)
    wanted = reference(row, params)
    generator = torch.Generator().manual_seed(1)
    counts = torch.bincount(
        torch.stack([draw(row, params, generator) for _ in range(20_000)]), minlength=VOCABULARY
    )
    assert ((counts == 0) == (wanted == 0)).all()
    assert (counts / 20_000 - wanted).abs().max() < 0.015


def reference(row: torch.Tensor, params: SamplingParams) -> torch.Tensor:
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


def test_seed_decides_and_the_batch_does_not(sequence: Any) -> None:
    rows = torch.stack([logits(i) for i in range(4)])
    options = {"temperature": 1.5, "seed": 11}
    alone = [sample(rows[i : i + 1].clone(), [sequence(**options)])[0] for i in range(4)]
    together = sample(rows.clone(), [sequence(**options) for _ in range(4)])
    assert alone == together
    others = {sample(rows[:1].clone(), [sequence(temperature=1.5, seed=seed)])[0] for seed in range(30)}
    assert len(others) > 2
