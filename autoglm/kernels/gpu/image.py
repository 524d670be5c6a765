"""Image preprocessing for the vision encoder: integer resize, normalisation by table lookup, patches."""

import torch
import triton
import triton.language as tl

from autoglm.kernels.base import ResampleFilter

BLOCK = 1024


def resample(*, pixels: torch.Tensor, resample_filter: ResampleFilter, axis: int) -> torch.Tensor:
    """See `Kernels.resample`."""
    shape = list(pixels.shape)
    target, count = resample_filter.weights.shape
    source, shape[axis] = shape[axis], target
    out = pixels.new_empty(shape)
    row = out.shape[1] * out.shape[2]
    _resample[(out.shape[0], triton.cdiv(row, BLOCK))](
        pixels, resample_filter.starts, resample_filter.weights, out, pixels.shape[1] * 3, row, source, count,
        FRACTION_BITS=ResampleFilter.FRACTION_BITS, ALONG_ROWS=axis == 1, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["SOURCE_ROW", "ROW", "SOURCE", "TAPS"])
def _resample(
    pixels, starts, weights, out, SOURCE_ROW, ROW, SOURCE, TAPS,
    FRACTION_BITS: tl.constexpr, ALONG_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for a part of a target row; row sizes are in bytes."""
    y = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < ROW
    if ALONG_ROWS:
        target = tl.where(inside, column // 3, 0)
        line, step = pixels + y.to(tl.int64) * SOURCE_ROW + column % 3, 3
    else:
        target = y
        line, step = pixels + column, SOURCE_ROW
    start = tl.load(starts + target).to(tl.int64)
    total = tl.full((BLOCK,), 1 << (FRACTION_BITS - 1), tl.int32)
    for tap in range(TAPS):
        source = tl.minimum(start + tap, SOURCE - 1)  # the weights past the end are 0
        value = tl.load(line + source * step, mask=inside, other=0)
        total += value.to(tl.int32) * tl.load(weights + target * TAPS + tap)
    total = tl.minimum(tl.maximum(total >> FRACTION_BITS, 0), 255)
    tl.store(out + y.to(tl.int64) * ROW + column, total.to(tl.uint8), mask=inside)


def patchify(
    *, pixels: torch.Tensor, levels: torch.Tensor, patch_size: int, merge_size: int, temporal_patch_size: int
) -> torch.Tensor:
    """See `Kernels.patchify`."""
    rows, columns = pixels.shape[0] // patch_size, pixels.shape[1] // patch_size
    area = patch_size * patch_size
    out = torch.empty(rows * columns, 3 * temporal_patch_size * area, device=pixels.device, dtype=levels.dtype)
    _patchify[(rows * columns,)](
        pixels,
        levels,
        out,
        columns // merge_size,
        patch_size,
        merge_size,
        temporal_patch_size,
        triton.next_power_of_2(3 * area),
        num_warps=4,
    )
    return out


@triton.jit(do_not_specialize=["ACROSS"])
def _patchify(
    pixels, levels, out, ACROSS, PATCH: tl.constexpr, MERGE: tl.constexpr, FRAMES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program per patch; a row of the image has ACROSS blocks of merged patches."""
    index = tl.program_id(0)
    block, inner = index // (MERGE * MERGE), index % (MERGE * MERGE)
    top = (block // ACROSS * MERGE + inner // MERGE) * PATCH
    left = (block % ACROSS * MERGE + inner % MERGE) * PATCH
    AREA: tl.constexpr = PATCH * PATCH
    element = tl.arange(0, BLOCK)
    inside = element < 3 * AREA
    channel, pixel = element // AREA, element % AREA
    row = (top + pixel // PATCH).to(tl.int64) * (ACROSS * MERGE * PATCH)
    level = tl.load(pixels + (row + left + pixel % PATCH) * 3 + channel, mask=inside, other=0)
    value = tl.load(levels + channel * 256 + level.to(tl.int32), mask=inside, other=0.0)
    at = out + index.to(tl.int64) * (3 * FRAMES * AREA) + channel * (FRAMES * AREA) + pixel
    for frame in tl.static_range(FRAMES):
        tl.store(at + frame * AREA, value, mask=inside)
