"""What a draw needs to know about a sequence's wishes: one row of 32-bit numbers, whole or fp32."""

from enum import IntEnum

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
