"""Per-request sampling parameters as one row of 32-bit numbers, and the counts of tokens, as the kernels read them."""

from enum import IntEnum

# An entry of output_token_counts: the low 30 bits count a token in the answer, the next bit is its prompt mask.
COUNT_MASK = 2**30 - 1
PROMPT_MASK = 2**30


class Column(IntEnum):
    """The columns of a row: fp32 for options that are floats, else int32; the seed is 64 bits in two halves."""

    TEMPERATURE = 0  # 0 is greedy
    TOP_P = 1
    MIN_P = 2
    FREQUENCY = 3
    PRESENCE = 4
    REPETITION = 5
    TOP_K = 6
    SEED_LOW = 7
    SEED_HIGH = 8
    DEFERRED = 9  # 1: leave the row to `Kernels.sample_deferred`


WIDTH = len(Column)
