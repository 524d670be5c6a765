"""Device functions of the INT8 GEMMs: accumulating the product of a tile, and applying scales."""

import triton
import triton.language as tl


@triton.jit
def add_product(
    total, tile, rows, scales, offsets, outputs, inside, k, GROUPS: tl.constexpr, DEPTH: tl.constexpr,
    LEFT: tl.constexpr,
):  # fmt: skip
    """Accumulate the product of a tile of the weight [BLOCK, DEPTH], whose columns begin at k, and rows [ROWS, DEPTH].

    total is [BLOCK, ROWS] if the weight is the LEFT operand, else [ROWS, BLOCK]; int32 for a weight with one scale per
    row, else fp32 with the scales and offsets of the tile's group applied (DEPTH is the group size then).
    """
    if GROUPS == 1:
        if LEFT:
            total = tl.dot(tile, rows.T, total, out_dtype=tl.int32)
        else:
            total = tl.dot(rows, tile.T, total, out_dtype=tl.int32)
    else:
        at = outputs * GROUPS + k // DEPTH
        if LEFT:
            product = tl.dot(tile, rows.T, out_dtype=tl.int32)
        else:
            product = tl.dot(rows, tile.T, out_dtype=tl.int32)
        total += product.to(tl.float32) * along(tl.load(scales + at, mask=inside, other=0.0), LEFT)
        if offsets is not None:
            sums = tl.sum(rows.to(tl.int32), 1).to(tl.float32)
            total += along(tl.load(offsets + at, mask=inside, other=0.0), LEFT) * across(sums, LEFT)
    return total


@triton.jit
def apply_scales(total, sums, scales, offsets, outputs, inside, GROUPS: tl.constexpr, LEFT: tl.constexpr):
    """Apply the weight's scales (not the rows') to the sum of all tiles -> fp32. sums: int32 [ROWS], the rows' sums."""
    if GROUPS == 1:
        result = total.to(tl.float32) * along(tl.load(scales + outputs, mask=inside, other=0.0), LEFT)
        if offsets is not None:
            offset = tl.load(offsets + outputs, mask=inside, other=0.0)
            result += along(offset, LEFT) * across(sums.to(tl.float32), LEFT)
        return result
    else:
        return total


@triton.jit
def along(vector, LEFT: tl.constexpr):
    """Broadcast one value per output over a tile."""
    return vector[:, None] if LEFT else vector[None, :]


@triton.jit
def across(vector, LEFT: tl.constexpr):
    """Broadcast one value per row of activations over a tile."""
    return vector[None, :] if LEFT else vector[:, None]
