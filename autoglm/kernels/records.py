"""What a draw needs to know about a sequence's wishes: one row of 32-bit numbers, whole or fp32."""

import struct
from enum import IntEnum

from autoglm.sampling import SamplingParams

COUNT_MASK = 2**30 - 1  # of a mark: how often the answer has the token; the bit above it: the prompt has it
IN_PROMPT = 2**30


class Column(IntEnum):
    """Where a record holds what; the temperature is 0 for greedy, the seed is 64 bits in two halves."""

    TEMPERATURE = 0
    TOP_P = 1
    MIN_P = 2
    FREQUENCY = 3
    PRESENCE = 4
    REPETITION = 5
    TOP_K = 6
    SEED_LOW = 7
    SEED_HIGH = 8
    DEFERRED = 9  # 1: the pass leaves the choice to `Kernels.sample_late`


WIDTH = len(Column)


def record(params: SamplingParams, seed: int, deferred: bool = False) -> list[int]:
    """A sequence's record, int32 [WIDTH]. seed: from 0 to 2**64 - 1"""
    packed = struct.pack(
        "<6f4I",
        params.temperature,
        params.top_p,
        params.min_p,
        params.frequency_penalty,
        params.presence_penalty,
        params.repetition_penalty,
        params.top_k,
        seed & 0xFFFFFFFF,
        seed >> 32,
        deferred,
    )
    return list(struct.unpack(f"<{WIDTH}i", packed))
