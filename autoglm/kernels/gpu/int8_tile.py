"""What the products with INT8 weights share: adding one tile's product, and applying scales."""

import triton
import triton.language as tl


@triton.jit
def add_product(
    total, tile, rows, scales, offsets, outputs, inside, k, GROUPS: tl.constexpr, DEPTH: tl.constexpr,
    LEFT: tl.constexpr,
):  # fmt: skip
    """Add the product of a weight's tile [BLOCK, DEPTH], whose columns begin at k, and rows [ROWS, DEPTH].

    total is [BLOCK, ROWS] where the weight is the LEFT operand, else [ROWS, BLOCK]; int32 for a weight with one scale a
    row, else fp32 with the scales and offsets of the tile's group applied (DEPTH is the group's size then).
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
    """The sum of all tiles -> fp32, the weight's scales applied, not yet the rows'. sums int32 [ROWS]: of each row."""
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
    """One value for each output, ready to be broadcast over a tile's sums."""
    return vector[:, None] if LEFT else vector[None, :]


@triton.jit
def across(vector, LEFT: tl.constexpr):
    """One value for each row of activations, ready to be broadcast over a tile's sums."""
    return vector[None, :] if LEFT else vector[:, None]
