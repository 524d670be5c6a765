"""Choosing tokens, and what a pass takes from the seats, on a GPU; `Kernels` says what is done.

Two launches choose. The first puts penalties, temperature and noise on all logits and finds the best of each part of
a row; the second finds the best of these. Where a row's distribution is to be cut, the first leaves the noise out and
the second searches the cuts' lowest logits by bisection, over bit patterns ordered as the numbers are: exact, without
sorting. A choice that was left for later takes the same two launches, over logits that the first has kept.
"""

import torch
import triton
import triton.language as tl

from autoglm.kernels import sampling_metadata as layout
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
SEARCH = 4096  # logits that a search looks at together
STEP_32 = tl.constexpr(2.0**-32)
BELOW_1 = tl.constexpr(1 - 2.0**-24)
FAR = tl.constexpr(104.0)  # e**-104 is 0 in fp32: what lies so far below the best is never drawn
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


def read_seats(
    seats: torch.Tensor,
    lengths: torch.Tensor,
    positions: torch.Tensor,
    blocks: torch.Tensor,
    tokens: torch.Tensor,
    tables: torch.Tensor,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `Kernels.read_seats`. An ordinary launch: kernels behind it may read block tables before they wait."""
    rows, width = seats.shape[0], tables.shape[1]
    ids = tokens.new_empty(rows)
    axes = positions.new_empty(3, rows)
    table = tables.new_empty(rows, width)
    _read_seats[(rows, triton.cdiv(width, PART))](
        seats, lengths, positions, blocks, tokens, tables, ids, axes, table, rows, width, block_size, PART
    )
    return ids, axes, table


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["seats", "lengths", "positions", "blocks"])
def _read_seats(
    seats, lengths, positions, blocks, tokens, tables, ids, axes, table, rows, width, block_size, PART: tl.constexpr
):
    row = tl.program_id(0)
    seat = tl.load(seats + row).to(tl.int64)
    last = tl.load(lengths + row) - 1
    columns = tl.program_id(1) * PART + tl.arange(0, PART)
    inside = columns < width
    ends = columns == tl.where(last >= 0, last // block_size, -1)
    block = tl.load(blocks + row)
    known = tl.load(tables + seat * width + columns, mask=inside, other=0)
    tl.store(tables + seat * width + columns, tl.full((PART,), block, tl.int32), mask=inside & ends)
    tl.store(table + row.to(tl.int64) * width + columns, tl.where(ends, block, known), mask=inside)
    if tl.program_id(1) == 0:
        tl.store(ids + row, tl.load(tokens + seat))
        position = tl.load(positions + row)
        for axis in tl.static_range(3):
            tl.store(axes + axis * rows + row, position)


def sample(
    logits: torch.Tensor,
    seats: torch.Tensor,
    steps: torch.Tensor,
    records: torch.Tensor,
    marks: torch.Tensor,
    tokens: torch.Tensor,
    kept: torch.Tensor,
) -> torch.Tensor:
    """See `Kernels.sample`."""
    return _choose(logits, seats, steps, None, records, marks, tokens, kept)


def sample_late(
    seats: torch.Tensor,
    steps: torch.Tensor,
    masks: torch.Tensor,
    records: torch.Tensor,
    marks: torch.Tensor,
    tokens: torch.Tensor,
    kept: torch.Tensor,
) -> torch.Tensor:
    """See `Kernels.sample_late`."""
    return _choose(kept, seats, steps, masks, records, marks, tokens, kept)


def _choose(
    logits: torch.Tensor,
    seats: torch.Tensor,
    steps: torch.Tensor,
    masks: torch.Tensor | None,
    records: torch.Tensor,
    marks: torch.Tensor,
    tokens: torch.Tensor,
    kept: torch.Tensor,
) -> torch.Tensor:
    late, rows, vocab = masks is not None, len(seats), logits.shape[1]
    parts = triton.cdiv(vocab, PART)
    best = logits.new_empty(rows, parts)
    places = seats.new_empty(rows, parts)
    chosen = seats.new_empty(rows)
    numbers = records.view(torch.float32)
    _score[(rows, parts)](
        logits, seats, steps, masks, records, numbers, marks, kept, best, places, vocab, parts,
        PART, LATE=late, PDL=PDL, launch_pdl=PDL,
    )  # fmt: skip
    _settle[(rows,)](
        logits, seats, steps, records, numbers, marks, best, places, tokens, chosen, vocab, parts,
        triton.next_power_of_2(parts), SEARCH, LATE=late, PDL=PDL, num_warps=16, launch_pdl=PDL,
    )  # fmt: skip
    return chosen


@triton.jit
def _is_cut(records, numbers):
    cut = (tl.load(records + TOP_K) > 0) | (tl.load(numbers + TOP_P) < 1) | (tl.load(numbers + MIN_P) > 0)
    return cut & (tl.load(numbers + TEMPERATURE) > 0)


@triton.jit(do_not_specialize_on_alignment=["seats", "steps"])
def _score(
    logits, seats, steps, masks, records, numbers, marks, kept, best, places, vocab, parts,
    PART: tl.constexpr, LATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row, part). LATE: the logits are the seats'."""
    pdl_launch(PDL)
    pdl_wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    seat = tl.load(seats + row).to(tl.int64)
    records += seat * WIDTH
    numbers += seat * WIDTH
    frequency = tl.load(numbers + FREQUENCY)
    presence = tl.load(numbers + PRESENCE)
    repetition = tl.load(numbers + REPETITION)
    temperature = tl.load(numbers + TEMPERATURE)
    token = part * PART + tl.arange(0, PART)
    inside = token < vocab
    logits += (seat if LATE else row) * vocab
    x = tl.load(logits + token, mask=inside, other=float("-inf"))
    allowed = inside
    if LATE:
        word = tl.load(masks + row * ((vocab + 31) // 32) + token // 32, mask=inside, other=0)
        allowed = ((word >> (token % 32)) & 1) != 0
        x = tl.where(allowed, x, float("-inf"))
    elif tl.load(records + DEFERRED) != 0:
        tl.store(kept + seat * vocab + token, x, mask=inside)
    x = tl.where(x == x, x, float("-inf"))  # a NaN is never chosen, and spreads no further
    if (frequency != 0) | (presence != 0) | (repetition != 1):
        mark = tl.load(marks + seat * vocab + token, mask=inside, other=0)
        count = mark & COUNT_MASK
        x = tl.where(mark != 0, tl.where(x > 0, x / repetition, x * repetition), x)
        x = tl.where(count > 0, x - (count * frequency + presence), x)
    if temperature > 0:
        x /= temperature
    if LATE:  # what is allowed stays above what is not, whatever its logit was
        x = tl.where(allowed, tl.minimum(tl.maximum(x, -LARGEST), LARGEST), float("-inf"))
    if temperature > 0:
        if _is_cut(records, numbers):
            tl.store(logits + token, x, mask=inside)
        else:
            x += gumbel(records, tl.load(steps + row), part * PART, PART)
    top, place = tl.max(x, 0, return_indices=True)
    tl.store(best + row * parts + part, top)
    tl.store(places + row * parts + part, part * PART + place)


@triton.jit(do_not_specialize_on_alignment=["seats", "steps"])
def _settle(
    logits, seats, steps, records, numbers, marks, best, places, tokens, chosen, vocab, parts,
    PARTS: tl.constexpr, SEARCH: tl.constexpr, LATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row; it chooses if the row's turn is now, LATE or not."""
    pdl_launch(PDL)
    pdl_wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    seat = tl.load(seats + row).to(tl.int64)
    part = tl.arange(0, PARTS)
    tops = tl.load(best + row * parts + part, mask=part < parts, other=float("-inf"))
    top, winner = tl.max(tops, 0, return_indices=True)
    choice = tl.load(places + row * parts + tl.minimum(winner, parts - 1))
    records += seat * WIDTH
    numbers += seat * WIDTH
    if (tl.load(records + DEFERRED) != 0) == LATE:
        if _is_cut(records, numbers):
            own = logits + (seat if LATE else row) * vocab
            choice = _draw(own, records, numbers, tl.load(steps + row), top, vocab, SEARCH)
        choice = tl.minimum(choice, vocab - 1)  # whatever the logits were
        tl.store(chosen + row, choice)
        tl.store(tokens + seat, choice.to(tl.int64))
        mark = marks + seat * vocab + choice
        tl.store(mark, tl.load(mark) + 1)
    else:
        tl.store(chosen + row, -1)


@triton.jit
def _draw(logits, records, numbers, step, top, vocab, SEARCH: tl.constexpr):
    """Cut one row's distribution, whose highest logit is `top`, and draw."""
    top_k = tl.load(records + TOP_K)
    top_p = tl.load(numbers + TOP_P)
    min_p = tl.load(numbers + MIN_P)
    lowest = _order(top - FAR)
    if top_k > 0:
        lowest = _search(logits, top, min_p, lowest, top_k.to(tl.float32), vocab, False, SEARCH)
    if top_p < 1:
        below = lowest - 1
        total, _, _ = _above(logits, top, min_p, lowest, below, below, below, vocab, True, SEARCH)
        lowest = _search(logits, top, min_p, lowest, top_p * total, vocab, True, SEARCH)
    highest = float("-inf")
    choice = 0
    for first in tl.range(0, vocab, SEARCH):
        token = first + tl.arange(0, SEARCH)
        x = tl.load(logits + token, mask=token < vocab, other=float("-inf"))
        kept = (_order(x) >= lowest) & (tl.exp(x - top) >= min_p) & (token < vocab)
        scores = tl.where(kept, x + gumbel(records, step, first, SEARCH), float("-inf"))
        score, place = tl.max(scores, 0, return_indices=True)
        choice = tl.where(score > highest, first + place, choice)
        highest = tl.maximum(score, highest)
    return choice


@triton.jit
def _search(logits, top, min_p, lowest, limit, vocab, WEIGHTED: tl.constexpr, SEARCH: tl.constexpr):
    """The lowest logit, as `_order` has it, such that what lies above it counts less than `limit`."""
    low = lowest
    high = tl.maximum(_order(top), low)
    while low < high:
        # Two searches' steps at once: their cost is reading the logits. The span may exceed int32.
        span = high.to(tl.int64) - low
        a = (low + span // 4).to(tl.int32)
        b = (low + span // 2).to(tl.int32)
        c = (low + span // 4 * 3).to(tl.int32)
        above_a, above_b, above_c = _above(logits, top, min_p, lowest, a, b, c, vocab, WEIGHTED, SEARCH)
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
def _above(logits, top, min_p, lowest, a, b, c, vocab, WEIGHTED: tl.constexpr, SEARCH: tl.constexpr):
    """What lies above a, b and c: how many logits, or the weights of those that are kept so far."""
    over_a = tl.zeros((SEARCH,), tl.float32)
    over_b = tl.zeros((SEARCH,), tl.float32)
    over_c = tl.zeros((SEARCH,), tl.float32)
    for first in tl.range(0, vocab, SEARCH):
        token = first + tl.arange(0, SEARCH)
        x = tl.load(logits + token, mask=token < vocab, other=float("-inf"))
        order = _order(x)
        counts = token < vocab
        amount = tl.full((SEARCH,), 1.0, tl.float32)
        if WEIGHTED:
            amount = tl.exp(x - top)
            counts = (order >= lowest) & (amount >= min_p) & counts
        over_a += tl.where(counts & (order > a), amount, 0.0)
        over_b += tl.where(counts & (order > b), amount, 0.0)
        over_c += tl.where(counts & (order > c), amount, 0.0)
    return tl.sum(over_a), tl.sum(over_b), tl.sum(over_c)


@triton.jit
def _order(x):
    """fp32 numbers as int32 ones that are ordered alike."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def gumbel(records, step, first, COUNT: tl.constexpr):
    """Noise fp32 [COUNT] for tokens `first`, ..., a multiple of 4; see the twin."""
    bits = noise_bits(tl.load(records + SEED_LOW), tl.load(records + SEED_HIGH), step, first, COUNT)
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
