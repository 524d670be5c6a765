"""Sampling, and gathering a pass's inputs from the request slots.

Sampling takes two launches. The first applies penalties, temperature and noise to all logits and finds the best of each
part of a row; the second finds the best of the parts. If top-k, top-p or min-p truncate a row's distribution, the first
omits the noise, and the second finds the lowest kept logit by bisection over order-preserving bit patterns: exact,
without sorting. Deferred rows take the same two launches, over the logits that the first has buffered.
"""

import torch
import triton
import triton.language as tl

from autoglm.kernels import sampling_metadata as layout
from autoglm.kernels.base import SamplingState
from autoglm.kernels.gpu.pdl import PDL, pdl_launch, pdl_wait

WIDTH = tl.constexpr(layout.WIDTH)
TEMPERATURE = tl.constexpr(int(layout.Column.TEMPERATURE))
TOP_P = tl.constexpr(int(layout.Column.TOP_P))
MIN_P = tl.constexpr(int(layout.Column.MIN_P))
FREQUENCY = tl.constexpr(int(layout.Column.FREQUENCY))
PRESENCE = tl.constexpr(int(layout.Column.PRESENCE))
REPETITION = tl.constexpr(int(layout.Column.REPETITION))
TOP_K = tl.constexpr(int(layout.Column.TOP_K))
SEED_LOW = tl.constexpr(int(layout.Column.SEED_LOW))
SEED_HIGH = tl.constexpr(int(layout.Column.SEED_HIGH))
DEFERRED = tl.constexpr(int(layout.Column.DEFERRED))
COUNT_MASK = tl.constexpr(layout.COUNT_MASK)

PART = 1024  # logits of one program
SEARCH = 4096  # logits read at once by the bisection
STEP_32 = tl.constexpr(2.0**-32)
BELOW_1 = tl.constexpr(1 - 2.0**-24)
FAR = tl.constexpr(104.0)  # e**-104 is 0 in fp32: logits this far below the highest are never drawn
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


def read_slots(
    *, rows: torch.Tensor, last_tokens: torch.Tensor, block_tables: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `Kernels.read_slots`. Launched without PDL: later kernels may read block tables before they wait."""
    slots, seq_lens, positions, last_blocks = rows[:4]
    count, width = rows.shape[1], block_tables.shape[1]
    ids = last_tokens.new_empty(count)
    axes = rows.new_empty(3, count)
    table = block_tables.new_empty(count, width)
    _read_slots[(count, triton.cdiv(width, PART))](
        slots, seq_lens, positions, last_blocks, last_tokens, block_tables, ids, axes, table, count, width, block_size,
        PART,
    )  # fmt: skip
    return ids, axes, table


@triton.jit(
    do_not_specialize=["rows"], do_not_specialize_on_alignment=["slots", "seq_lens", "positions", "last_blocks"]
)
def _read_slots(
    slots, seq_lens, positions, last_blocks, last_tokens, block_tables, ids, axes, table, rows, width, block_size,
    PART: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    last = tl.load(seq_lens + row) - 1
    columns = tl.program_id(1) * PART + tl.arange(0, PART)
    inside = columns < width
    ends = columns == tl.where(last >= 0, last // block_size, -1)
    block = tl.load(last_blocks + row)
    stored = tl.load(block_tables + slot * width + columns, mask=inside, other=0)
    tl.store(block_tables + slot * width + columns, tl.full((PART,), block, tl.int32), mask=inside & ends)
    tl.store(table + row.to(tl.int64) * width + columns, tl.where(ends, block, stored), mask=inside)
    if tl.program_id(1) == 0:
        tl.store(ids + row, tl.load(last_tokens + slot))
        position = tl.load(positions + row)
        for axis in tl.static_range(3):
            tl.store(axes + axis * rows + row, position)


def sample(*, logits: torch.Tensor, slots: torch.Tensor, steps: torch.Tensor, state: SamplingState) -> torch.Tensor:
    """See `Kernels.sample`."""
    return _sample(logits=logits, slots=slots, steps=steps, masks=None, state=state)


def sample_deferred(
    *, slots: torch.Tensor, steps: torch.Tensor, masks: torch.Tensor, state: SamplingState
) -> torch.Tensor:
    """See `Kernels.sample_deferred`."""
    return _sample(logits=state.logits_buffer, slots=slots, steps=steps, masks=masks, state=state)


def _sample(
    *, logits: torch.Tensor, slots: torch.Tensor, steps: torch.Tensor, masks: torch.Tensor | None, state: SamplingState
) -> torch.Tensor:
    metadata, counts = state.sampling_metadata, state.output_token_counts
    deferred, rows, vocab = masks is not None, len(slots), logits.shape[1]
    parts = triton.cdiv(vocab, PART)
    best = logits.new_empty(rows, parts)
    indices = slots.new_empty(rows, parts)
    sampled = slots.new_empty(rows)
    floats = metadata.view(torch.float32)
    _score[(rows, parts)](
        logits, slots, steps, masks, metadata, floats, counts, state.logits_buffer, best, indices, vocab, parts,
        PART, DEFERRED_ROWS=deferred, PDL=PDL, launch_pdl=PDL,
    )  # fmt: skip
    _select[(rows,)](
        logits, slots, steps, metadata, floats, counts, best, indices, state.last_tokens, sampled, vocab, parts,
        triton.next_power_of_2(parts), SEARCH, DEFERRED_ROWS=deferred, PDL=PDL, num_warps=16, launch_pdl=PDL,
    )  # fmt: skip
    return sampled


@triton.jit
def _is_truncated(metadata, floats):
    cut = (tl.load(metadata + TOP_K) > 0) | (tl.load(floats + TOP_P) < 1) | (tl.load(floats + MIN_P) > 0)
    return cut & (tl.load(floats + TEMPERATURE) > 0)


@triton.jit(do_not_specialize_on_alignment=["slots", "steps"])
def _score(
    logits, slots, steps, masks, metadata, floats, counts, logits_buffer, best, indices, vocab, parts,
    PART: tl.constexpr, DEFERRED_ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row, part). DEFERRED_ROWS: the logits are in the slots' buffer."""
    pdl_launch(PDL)
    pdl_wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    metadata += slot * WIDTH
    floats += slot * WIDTH
    frequency = tl.load(floats + FREQUENCY)
    presence = tl.load(floats + PRESENCE)
    repetition = tl.load(floats + REPETITION)
    temperature = tl.load(floats + TEMPERATURE)
    token = part * PART + tl.arange(0, PART)
    inside = token < vocab
    logits += (slot if DEFERRED_ROWS else row) * vocab
    x = tl.load(logits + token, mask=inside, other=float("-inf"))
    allowed = inside
    if DEFERRED_ROWS:
        word = tl.load(masks + row * ((vocab + 31) // 32) + token // 32, mask=inside, other=0)
        allowed = ((word >> (token % 32)) & 1) != 0
        x = tl.where(allowed, x, float("-inf"))
    elif tl.load(metadata + DEFERRED) != 0:
        tl.store(logits_buffer + slot * vocab + token, x, mask=inside)
    x = tl.where(x == x, x, float("-inf"))  # NaN is never sampled and does not propagate
    if (frequency != 0) | (presence != 0) | (repetition != 1):
        count_entry = tl.load(counts + slot * vocab + token, mask=inside, other=0)
        count = count_entry & COUNT_MASK
        x = tl.where(count_entry != 0, tl.where(x > 0, x / repetition, x * repetition), x)
        x = tl.where(count > 0, x - (count * frequency + presence), x)
    if temperature > 0:
        x /= temperature
    if DEFERRED_ROWS:  # allowed tokens stay above masked ones, whatever their logits are
        x = tl.where(allowed, tl.minimum(tl.maximum(x, -LARGEST), LARGEST), float("-inf"))
    if temperature > 0:
        if _is_truncated(metadata, floats):
            tl.store(logits + token, x, mask=inside)
        else:
            x += gumbel(metadata, tl.load(steps + row), part * PART, PART)
    max_logit, index = tl.max(x, 0, return_indices=True)
    tl.store(best + row * parts + part, max_logit)
    tl.store(indices + row * parts + part, part * PART + index)


@triton.jit(do_not_specialize_on_alignment=["slots", "steps"])
def _select(
    logits, slots, steps, metadata, floats, counts, best, indices, last_tokens, sampled, vocab, parts,
    PARTS: tl.constexpr, SEARCH: tl.constexpr, DEFERRED_ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row; it samples if the row is deferred exactly when DEFERRED_ROWS is set."""
    pdl_launch(PDL)
    pdl_wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    part = tl.arange(0, PARTS)
    part_max = tl.load(best + row * parts + part, mask=part < parts, other=float("-inf"))
    max_logit, winner = tl.max(part_max, 0, return_indices=True)
    token_id = tl.load(indices + row * parts + tl.minimum(winner, parts - 1))
    metadata += slot * WIDTH
    floats += slot * WIDTH
    if (tl.load(metadata + DEFERRED) != 0) == DEFERRED_ROWS:
        if _is_truncated(metadata, floats):
            own = logits + (slot if DEFERRED_ROWS else row) * vocab
            token_id = _draw_truncated(own, metadata, floats, tl.load(steps + row), max_logit, vocab, SEARCH)
        token_id = tl.minimum(token_id, vocab - 1)  # in case all logits are -inf
        tl.store(sampled + row, token_id)
        tl.store(last_tokens + slot, token_id.to(tl.int64))
        count_entry = counts + slot * vocab + token_id
        tl.store(count_entry, tl.load(count_entry) + 1)
    else:
        tl.store(sampled + row, -1)


@triton.jit
def _draw_truncated(logits, metadata, floats, step, max_logit, vocab, SEARCH: tl.constexpr):
    """Truncate the distribution of one row, whose highest logit is `max_logit`, and draw a token."""
    top_k = tl.load(metadata + TOP_K)
    top_p = tl.load(floats + TOP_P)
    min_p = tl.load(floats + MIN_P)
    lowest = _sort_key(max_logit - FAR)
    if top_k > 0:
        lowest = _bisect(logits, max_logit, min_p, lowest, top_k.to(tl.float32), vocab, False, SEARCH)
    if top_p < 1:
        below = lowest - 1
        total, _, _ = _mass_above(logits, max_logit, min_p, lowest, below, below, below, vocab, True, SEARCH)
        lowest = _bisect(logits, max_logit, min_p, lowest, top_p * total, vocab, True, SEARCH)
    highest = float("-inf")
    token_id = 0
    for first in tl.range(0, vocab, SEARCH):
        token = first + tl.arange(0, SEARCH)
        x = tl.load(logits + token, mask=token < vocab, other=float("-inf"))
        kept = (_sort_key(x) >= lowest) & (tl.exp(x - max_logit) >= min_p) & (token < vocab)
        scores = tl.where(kept, x + gumbel(metadata, step, first, SEARCH), float("-inf"))
        score, index = tl.max(scores, 0, return_indices=True)
        token_id = tl.where(score > highest, first + index, token_id)
        highest = tl.maximum(score, highest)
    return token_id


@triton.jit
def _bisect(logits, max_logit, min_p, lowest, limit, vocab, WEIGHTED: tl.constexpr, SEARCH: tl.constexpr):
    """The lowest sort key such that the mass above it is less than `limit`."""
    low = lowest
    high = tl.maximum(_sort_key(max_logit), low)
    while low < high:
        # Two bisection steps at once: reading the logits dominates. The span may exceed int32.
        span = high.to(tl.int64) - low
        a = (low + span // 4).to(tl.int32)
        b = (low + span // 2).to(tl.int32)
        c = (low + span // 4 * 3).to(tl.int32)
        above_a, above_b, above_c = _mass_above(logits, max_logit, min_p, lowest, a, b, c, vocab, WEIGHTED, SEARCH)
        if above_a < limit:
            high = a
        elif above_b < limit:
            low = a + 1
            high = b
        elif above_c < limit:
            low = b + 1
            high = c
        else:
            low = c + 1
    return low


@triton.jit
def _mass_above(logits, max_logit, min_p, lowest, a, b, c, vocab, WEIGHTED: tl.constexpr, SEARCH: tl.constexpr):
    """The mass above a, b and c: the number of logits, or (WEIGHTED) the weights of those kept so far."""
    over_a = tl.zeros((SEARCH,), tl.float32)
    over_b = tl.zeros((SEARCH,), tl.float32)
    over_c = tl.zeros((SEARCH,), tl.float32)
    for first in tl.range(0, vocab, SEARCH):
        token = first + tl.arange(0, SEARCH)
        x = tl.load(logits + token, mask=token < vocab, other=float("-inf"))
        key = _sort_key(x)
        counts = token < vocab
        amount = tl.full((SEARCH,), 1.0, tl.float32)
        if WEIGHTED:
            amount = tl.exp(x - max_logit)
            counts = (key >= lowest) & (amount >= min_p) & counts
        over_a += tl.where(counts & (key > a), amount, 0.0)
        over_b += tl.where(counts & (key > b), amount, 0.0)
        over_c += tl.where(counts & (key > c), amount, 0.0)
    return tl.sum(over_a), tl.sum(over_b), tl.sum(over_c)


@triton.jit
def _sort_key(x):
    """fp32 -> int32 with the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def gumbel(metadata, step, first, COUNT: tl.constexpr):
    """Gumbel noise, fp32 [COUNT], for the tokens from `first`, a multiple of 4; see the reference."""
    bits = noise_bits(tl.load(metadata + SEED_LOW), tl.load(metadata + SEED_HIGH), step, first, COUNT)
    uniform = tl.minimum(bits.to(tl.float32) * STEP_32 + STEP_32 / 2, BELOW_1)
    series = uniform * (1 + uniform * (0.5 + uniform / 3))
    return -tl.log(tl.where(uniform < 0.01, series, -tl.log(1 - uniform)))


@triton.jit
def noise_bits(low, high, step, first, COUNT: tl.constexpr):
    seed = (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low.to(tl.uint32, bitcast=True).to(tl.uint64)
    counter = first // 4 + tl.arange(0, COUNT // 4)
    zero = tl.zeros_like(counter)
    a, b, c, d = tl.philox(seed, counter, zero + step, zero, zero)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
