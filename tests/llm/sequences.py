"""Sequences in a given state, without an engine."""

from collections.abc import Sequence as Seq
from typing import Any, cast

import torch

from autoglm.config import SparseAttentionConfig
from autoglm.llm.block_hash import MediaSpan
from autoglm.llm.sequence import Prompt, Request, Sequence
from autoglm.preprocess.sampling_params import SamplingParams
from tests.llm.simulation import NoText


def make_sequence(
    token_ids: list[int],
    *,
    answer: Seq[int] = (),
    slot: int | None = None,
    blocks: Seq[int] = (),
    positions: list[list[int]] | None = None,
    next_position: int | None = None,
    media: Seq[MediaSpan] = (),
    sparse: SparseAttentionConfig | None = None,
    **options: Any,
) -> Sequence:
    """A sequence with this prompt and answer. Positions [3, T] are those of text by default."""
    length = len(token_ids)
    prompt = Prompt(
        token_ids=token_ids,
        positions=torch.tensor([list(range(length))] * 3 if positions is None else positions, dtype=torch.int32),
        next_position=length if next_position is None else next_position,
        media=list(media),
        embeddings=None,
    )
    request = Request(
        request_id="a", token_ids=token_ids, sampling_params=SamplingParams(**options), sink=lambda output: None
    )
    detokenizer = cast(Any, NoText())
    sequence = Sequence(
        request, prompt, max_tokens=100, detokenizer=detokenizer, stop_token_ids=frozenset(), sparse=sparse
    )
    for token_id in answer:
        sequence.append(token_id)
    sequence.slot, sequence.blocks = slot, list(blocks)
    return sequence
