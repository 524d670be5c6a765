"""Deferred sampling on the CPU: grammar masks, token counts and log probabilities."""

from typing import Any

import numpy as np
import pytest
import torch

from autoglm.kernels.reference import dispatch as reference
from autoglm.llm.deferred_sampling import sample_deferred
from autoglm.llm.request_slots import RequestSlots
from autoglm.llm.scheduler import Chunk
from tests.llm.sequences import make_sequence

VOCABULARY, NUM_WORDS = 40, 2
ALL = [-1] * NUM_WORDS


def allow(*tokens: int) -> list[int]:
    """A row of masks."""
    bits = np.zeros(NUM_WORDS * 32, np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32).tolist()  # type: ignore[no-any-return]


def make_slots() -> RequestSlots:
    """The logits of slot s are largest for token 30, and decrease with the distance from it."""
    slots = RequestSlots(3, vocab_size=VOCABULARY, max_blocks=2, block_size=4, device=torch.device("cpu"))
    slots.state.logits_buffer[:] = -(torch.arange(VOCABULARY) - 30).abs().float()
    return slots


def chunk(slot: int, **options: Any) -> Chunk:
    sequence = make_sequence([1, 2, 3], slot=slot, **options)
    return Chunk(sequence, 0, 3, samples=True, is_first=True, decodes=False)


def test_tokens_are_sampled_within_their_masks() -> None:
    slots, chunks = make_slots(), [chunk(2), chunk(0), chunk(1)]
    slots.initialize([each.sequence for each in chunks])
    masks = np.array([allow(3, 7, 38), allow(35), ALL], np.int32)
    sampled = sample_deferred(reference, slots, chunks, masks).wait()
    assert [(sequence.slot, token, logprob) for sequence, token, logprob in sampled] == [
        (2, 38, None), (0, 35, None), (1, 30, None),
    ]  # fmt: skip
    assert slots.state.last_tokens.tolist() == [35, 30, 38, 0]
    assert slots.state.output_token_counts.nonzero().tolist() == [[0, 35], [1, 30], [2, 38]]


def test_penalties_apply_to_allowed_tokens() -> None:
    slots, each = make_slots(), chunk(0, frequency_penalty=1.5)
    slots.initialize([each.sequence])
    slots.count_tokens(each.sequence, [30, 30])
    (sampled,) = sample_deferred(reference, slots, [each], np.array([allow(30, 31)], np.int32)).wait()
    assert sampled[1] == 31


def test_log_probabilities_are_those_before_masks_and_penalties() -> None:
    slots = make_slots()
    chunks = [chunk(1), chunk(0, logprobs=2, frequency_penalty=2.0, temperature=0.5), chunk(2, logprobs=0)]
    slots.initialize([each.sequence for each in chunks])
    expected = slots.state.logits_buffer[0].log_softmax(0)
    sampled = sample_deferred(reference, slots, chunks, np.array([ALL, allow(5), ALL], np.int32)).wait()
    assert [token for _, token, _ in sampled] == [30, 5, 30]
    assert sampled[0][2] is None
    masked, greedy = sampled[1][2], sampled[2][2]
    assert masked is not None and greedy is not None
    assert masked.token_id == 5 and masked.logprob == pytest.approx(float(expected[5]))
    assert masked.top[0][0] == 30 and masked.top[1][0] in (29, 31)
    assert [value for _, value in masked.top] == pytest.approx(expected[[30, 31]].tolist())
    assert greedy.top == [] and greedy.logprob == pytest.approx(float(expected[30]))
