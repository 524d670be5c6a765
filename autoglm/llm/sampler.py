"""From logits to the next tokens."""

import secrets
from collections.abc import Sequence as Seq

import torch

from autoglm.llm.sequence import Sequence
from autoglm.sampling import SamplingParams


def sample(logits: torch.Tensor, sequences: Seq[Sequence]) -> list[int]:
    """Choose each sequence's next token.

    A sequence's choice depends on its own logits, options, seed and past only, never on the batch.

    Args:
        logits: fp32 [len(sequences), vocab_size]; changed in place.
    """
    for row, sequence in zip(logits, sequences, strict=True):
        penalise(row, sequence)
    chosen = logits.argmax(-1)
    for index, sequence in enumerate(sequences):
        params = sequence.request.sampling
        if params.temperature > 0:
            chosen[index] = draw(logits[index], params, generator_of(sequence, logits.device))
    return chosen.tolist()  # type: ignore[no-any-return]


def penalise(row: torch.Tensor, sequence: Sequence) -> None:
    """Lower (or raise) the logits of tokens that have come before, in place. row [vocab_size]"""
    params = sequence.request.sampling
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.tokens)), device=row.device)
        value = row[seen]
        row[seen] = torch.where(value > 0, value / params.repetition_penalty, value * params.repetition_penalty)
    if sequence.generated and (params.frequency_penalty or params.presence_penalty):
        ids = torch.tensor(list(sequence.generated), device=row.device)
        counts = torch.tensor(list(sequence.generated.values()), device=row.device, dtype=row.dtype)
        row[ids] -= counts * params.frequency_penalty + params.presence_penalty


def draw(row: torch.Tensor, params: SamplingParams, generator: torch.Generator) -> torch.Tensor:
    """Sample one token: temperature, then min-p, top-k and top-p cut the distribution. row [vocab_size] -> []

    The draw is argmax(p / Exponential(1)), which needs no sum and no synchronisation (the Gumbel-max trick).
    """
    probabilities = (row / params.temperature).softmax(-1)
    if params.min_p > 0:
        probabilities = probabilities.where(probabilities >= params.min_p * probabilities.max(), 0)
    if 0 < params.top_k < row.shape[0]:
        probabilities = probabilities.where(probabilities >= probabilities.topk(params.top_k).values[-1], 0)
    if params.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        # A token stays when those before it hold less than top_p of what is left; the first always does.
        before = ordered.cumsum(-1) - ordered
        probabilities[order[before >= params.top_p * ordered.sum()]] = 0
    noise = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / noise).argmax()


def generator_of(sequence: Sequence, device: torch.device) -> torch.Generator:
    """The sequence's own source of randomness, from its seed."""
    if sequence.generator is None:
        seed = sequence.request.sampling.seed
        sequence.generator = torch.Generator(device)
        sequence.generator.manual_seed(secrets.randbits(63) if seed is None else seed)
    return sequence.generator
