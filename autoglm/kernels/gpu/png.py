"""Undoes the scanline filters of a PNG.

A byte is predicted from its left, upper and upper left neighbours (PNG specification, 3rd edition, 9), so a pixel can
be computed once the row above is one pixel ahead: a wavefront, in which the rows of a band run in parallel, each a step
later than the one above. One program per channel; two more launches skew the pixels by steps and back.
"""

import torch
import triton
import triton.language as tl

LANES = 512  # maximum rows in parallel, including the one above them
AHEAD = 4  # steps loaded in advance
TILE = 64


def unfilter(*, rows: torch.Tensor, channels: int) -> torch.Tensor:
    """See `Kernels.unfilter`."""
    height, width = rows.shape[0], (rows.shape[1] - 1) // channels
    lanes = min(LANES, max(TILE, triton.next_power_of_2(height + 1)))
    bands = triton.cdiv(height, lanes - 1)
    steps = triton.cdiv(width + lanes - 1, AHEAD) * AHEAD
    skewed = rows.new_empty(3 * bands * steps + AHEAD, lanes)  # the last AHEAD rows are padding
    _skew[(bands * steps,)](rows, skewed, height, width, steps, CHANNELS=channels, LANES=lanes, num_warps=4)
    _unfilter[(3,)](rows, skewed, height, rows.shape[1], bands, steps, LANES=lanes, AHEAD=AHEAD, num_warps=8)
    pixels = rows.new_empty(height, width, 3)
    _straighten[(triton.cdiv(width, TILE), triton.cdiv(height, TILE))](
        skewed, pixels, height, width, bands, steps, LANES=lanes, TILE=TILE, num_warps=4
    )
    return pixels


@triton.jit(do_not_specialize=["height", "width", "steps"])
def _skew(rows, skewed, height, width, steps, CHANNELS: tl.constexpr, LANES: tl.constexpr):
    """One program per step of a band: [LANES] bytes of each channel, 0 where a row has no pixel at that step."""
    program = tl.program_id(0)
    lane = tl.arange(0, LANES)
    row = program // steps * (LANES - 1) + lane - 1
    x = program % steps - lane
    inside = (row >= 0) & (row < height) & (x >= 0) & (x < width)
    at = rows + row.to(tl.int64) * (1 + width * CHANNELS) + 1 + x * CHANNELS
    target = skewed + program.to(tl.int64) * LANES + lane
    for channel in tl.static_range(3):
        value = tl.load(at + channel, mask=inside, other=0)
        tl.store(target + channel * tl.num_programs(0).to(tl.int64) * LANES, value)


@triton.jit(do_not_specialize=["height", "stride", "bands", "steps"])
def _unfilter(rows, skewed, height, stride, bands, steps, LANES: tl.constexpr, AHEAD: tl.constexpr):
    """One program per channel, in place.

    The first lane of a band is the finished row above it. Before a row's first pixel everything is 0, which the filters
    map to 0. Values computed after its last pixel are not read.
    """
    tl.static_assert(AHEAD == 4)
    lane = tl.arange(0, LANES)
    skewed += tl.program_id(0).to(tl.int64) * bands * steps * LANES
    for band in range(bands):
        row = band * (LANES - 1) + lane - 1
        kind = tl.load(rows + row.to(tl.int64) * stride, mask=(lane > 0) & (row < height), other=0)
        at = skewed + band * (steps * LANES).to(tl.int64) + lane
        # The last lane of the band above is LANES - 1 steps later than its first.
        above = at - (steps - (LANES - 1)) * LANES + (LANES - 1)
        source = tl.where((lane == 0) & (row >= 0), above, at)
        left = tl.zeros((LANES,), tl.int32)
        up = tl.zeros((LANES,), tl.int32)
        first, second = tl.load(source), tl.load(source + LANES)
        third, fourth = tl.load(source + 2 * LANES), tl.load(source + 3 * LANES)
        for _ in range(0, steps, AHEAD):
            source += AHEAD * LANES
            next_first, next_second = tl.load(source), tl.load(source + LANES)
            next_third, next_fourth = tl.load(source + 2 * LANES), tl.load(source + 3 * LANES)
            left, up = _step(first, left, up, kind, lane)
            tl.store(at, left.to(tl.uint8))
            left, up = _step(second, left, up, kind, lane)
            tl.store(at + LANES, left.to(tl.uint8))
            left, up = _step(third, left, up, kind, lane)
            tl.store(at + 2 * LANES, left.to(tl.uint8))
            left, up = _step(fourth, left, up, kind, lane)
            tl.store(at + 3 * LANES, left.to(tl.uint8))
            at += AHEAD * LANES
            first, second, third, fourth = next_first, next_second, next_third, next_fourth
        tl.debug_barrier()  # the next band reads values written by other threads


@triton.jit
def _step(filtered, left, corner, kind, lane):
    """The pixels of a step, and those above them; `left` and `corner` are those of the previous step."""
    up = tl.gather(left, tl.maximum(lane - 1, 0), 0)
    straight, across = tl.abs(up - corner), tl.abs(left - corner)
    both = tl.abs(left + up - 2 * corner)
    guess = tl.where(across <= both, up, corner)
    guess = tl.where((straight <= across) & (straight <= both), left, guess)  # Paeth's
    guess = tl.where(kind == 3, (left + up) >> 1, guess)
    guess = tl.where(kind == 2, up, guess)
    guess = tl.where(kind == 1, left, guess)
    guess = tl.where(kind == 0, 0, guess)
    return (filtered.to(tl.int32) + guess) & 255, up


@triton.jit(do_not_specialize=["height", "width", "bands", "steps"])
def _straighten(skewed, pixels, height, width, bands, steps, LANES: tl.constexpr, TILE: tl.constexpr):
    """One program per TILE x TILE pixels."""
    x = tl.program_id(0) * TILE + tl.arange(0, TILE)[None, :]
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)[:, None]
    inside = (row < height) & (x < width)
    lane = row % (LANES - 1) + 1
    at = skewed + ((row // (LANES - 1)).to(tl.int64) * steps + x + lane) * LANES + lane
    target = pixels + (row.to(tl.int64) * width + x) * 3
    for channel in tl.static_range(3):
        value = tl.load(at + channel * (bands * steps).to(tl.int64) * LANES, mask=inside, other=0)
        tl.store(target + channel, value, mask=inside)
