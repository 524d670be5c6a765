"""INT8 weights, and the quantisation of float weights to INT8."""

from dataclasses import dataclass, replace

import torch

GROUP = 128  # inputs that share a scale in a grouped weight
BLOCK = 2**24  # elements quantised at once: 64 MiB in fp32
SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Int8Weight:
    """W[n, k] = values[n, k] * scales[n, g] + offsets[n, g], g = (k + group_offset) // GROUP, or 0 for a scale per row.

    values int8 [N, K]; scales fp32 [N, G]; offsets fp32 [N, G], None for a symmetric weight.
    group_offset: columns of the first group that are in the shard of another rank.
    """

    values: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None = None
    group_offset: int = 0

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def groups(self) -> int:
        return self.scales.shape[1]

    def rows(self, part: slice) -> "Int8Weight":
        """A view of some rows."""
        return replace(
            self,
            values=self.values[part],
            scales=self.scales[part],
            offsets=None if self.offsets is None else self.offsets[part],
        )

    def columns(self, part: slice) -> "Int8Weight":
        """A view of some columns, with the scales of all groups that they touch."""
        if self.groups == 1:
            return replace(self, values=self.values[:, part])
        first, end = part.start + self.group_offset, part.stop + self.group_offset
        groups = slice(first // GROUP, -(-end // GROUP))
        return Int8Weight(
            self.values[:, part],
            self.scales[:, groups],
            None if self.offsets is None else self.offsets[:, groups],
            first % GROUP,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[N, K] in `dtype`."""
        group: slice | torch.Tensor = slice(None)
        if self.groups > 1:
            group = (torch.arange(self.shape[1], device=self.values.device) + self.group_offset) // GROUP
        weight = self.values.float() * self.scales[:, group]
        return (weight if self.offsets is None else weight + self.offsets[:, group]).to(dtype)


def empty(
    rows: int,
    columns: int,
    *,
    symmetric: bool,
    grouped: bool,
    group_offset: int = 0,
    device: torch.device | None = None,
) -> Int8Weight:
    """An uninitialised weight."""
    group_offset = group_offset if grouped else 0
    groups = -(-(columns + group_offset) // GROUP) if grouped else 1
    scales = torch.empty(rows, groups, dtype=torch.float32, device=device)
    values = torch.empty(rows, columns, dtype=torch.int8, device=device)
    return Int8Weight(values, scales, None if symmetric else torch.empty_like(scales), group_offset)


def quantize(weight: torch.Tensor, symmetric: bool = True, grouped: bool = False) -> Int8Weight:
    """Quantise a float weight [N, K] by the largest magnitude (symmetric) or the range of each row or group.

    Computed in fp32, a block of rows at a time. The scale of a constant row or group is tiny, never 0.
    """
    rows, columns = weight.shape
    quantized = empty(rows, columns, symmetric=symmetric, grouped=grouped, device=weight.device)
    quantize_into(quantized, weight)
    return quantized


def quantize_into(target: Int8Weight, weight: torch.Tensor) -> None:
    """`quantize` into existing memory, in the format of `target`."""
    rows = max(1, BLOCK // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        _quantize_rows(target.rows(part), weight[part])


def copy_weight(target: torch.Tensor | Int8Weight, source: torch.Tensor | Int8Weight) -> None:
    """Copy a weight of the same shape, converting between formats. Symmetric INT8 with one scale per row is copied
    exactly."""
    if isinstance(target, torch.Tensor):
        target.copy_(source if isinstance(source, torch.Tensor) else source.dequantize(target.dtype))
    elif isinstance(source, torch.Tensor):
        quantize_into(target, source)
    elif target.groups == 1 and target.offsets is None:
        target.values.copy_(source.values)
        target.scales.copy_(source.scales)
    else:
        quantize_into(target, source.dequantize())


def _quantize_rows(target: Int8Weight, weight: torch.Tensor) -> None:
    rows, columns = weight.shape
    size = columns if target.groups == 1 else GROUP
    wide = weight.float()
    if padding := target.groups * size - columns:
        # Pad the last group with copies of the last column, which change neither its range nor its magnitude.
        wide = torch.cat((wide, wide[:, -1:].expand(-1, padding)), dim=1)
    wide = wide.view(rows, target.groups, size)
    if target.offsets is None:
        scales = (wide.abs().amax(-1) / 127).clamp_min(SMALLEST)
        levels = wide / scales.unsqueeze(-1)
    else:
        lowest, highest = wide.amin(-1), wide.amax(-1)
        scales = ((highest - lowest) / 255).clamp_min(SMALLEST)
        target.offsets.copy_(lowest + 128 * scales)
        levels = (wide - target.offsets.unsqueeze(-1)) / scales.unsqueeze(-1)
    target.scales.copy_(scales)
    target.values.copy_(levels.round_().clamp_(-128, 127).flatten(1)[:, :columns])
