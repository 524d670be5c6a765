"""Linear layers in float and INT8, whole or one tensor-parallel rank's shard. Each maps its weight to the checkpoint's
tensors."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from autoglm.distributed.shard import Shard
from autoglm.quantization.int8 import GROUP, Int8Weight, copy_weight, empty

Tensor: TypeAlias = torch.Tensor | Int8Weight


@dataclass(frozen=True)
class Source:
    """The rows and columns that a layer has of a checkpoint tensor of this shape."""

    shape: tuple[int, int]
    rows: tuple[slice, ...]
    columns: slice

    @property
    def num_rows(self) -> int:
        return sum(part.stop - part.start for part in self.rows)

    @property
    def is_whole(self) -> bool:
        return (self.num_rows, self.columns.stop - self.columns.start) == self.shape


@dataclass(frozen=True)
class WeightShard:
    """The memory of a shard, which is filled from the whole checkpoint tensor; or that of its bias."""

    memory: Tensor
    source: Source
    grouped: bool = False

    @property
    def shape(self) -> torch.Size:
        """Of the checkpoint tensor."""
        shape = self.source.shape
        return torch.Size(shape if len(self.memory.shape) == 2 else shape[:1])

    def load(self, tensor: Tensor) -> None:
        """Copy the shard's part of a checkpoint tensor. Scales are those of the whole rows and groups."""
        memory, source = self.memory, self.source
        rows = _take_rows(tensor, source.rows)
        if len(memory.shape) == 1 or source.columns == slice(0, source.shape[1]):
            copy_weight(memory, rows)
        elif isinstance(memory, torch.Tensor):
            rows = rows if isinstance(rows, torch.Tensor) else rows.dequantize(memory.dtype)
            memory.copy_(rows[:, source.columns])
        else:
            device, symmetric = memory.values.device, memory.offsets is None
            whole = empty(*rows.shape, symmetric=symmetric, grouped=self.grouped, device=device)
            copy_weight(whole, rows)
            part = whole.columns(source.columns)
            memory.values.copy_(part.values)
            memory.scales.copy_(part.scales)
            if memory.offsets is not None and part.offsets is not None:
                memory.offsets.copy_(part.offsets)


CheckpointTensors: TypeAlias = Iterator[tuple[str, Tensor | WeightShard]]
"""Names in the checkpoint, relative to the parent module, and the memory that each tensor is copied to."""


@dataclass(frozen=True)
class ExternalLinear:
    """A linear layer computed by another library, bias included. float [T, K] -> [T, N]; shape is (N, K)."""

    compute: Callable[[torch.Tensor], torch.Tensor]
    shape: torch.Size

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(x)


class Linear(nn.Linear):
    """`nn.Linear` whose weight may be several of the checkpoint's layers, stacked along the outputs.

    Args:
        parts: the checkpoint's names of these layers and their numbers of outputs, in order; empty for a single layer.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = False, parts: Mapping[str, int] | None = None) -> None:
        sizes = parts or {"": outputs}
        self._build({name: Source((n, inputs), (slice(0, n),), slice(0, inputs)) for name, n in sizes.items()}, bias)

    def _build(self, sources: Mapping[str, Source], bias: bool) -> None:
        columns = next(iter(sources.values())).columns
        super().__init__(columns.stop - columns.start, sum(source.num_rows for source in sources.values()), bias)
        self.sources = dict(sources)

    @property
    def parts(self) -> tuple[str, ...]:
        """The checkpoint's names of the stacked layers; empty for a single layer."""
        return tuple(name for name in self.sources if name)

    def checkpoint_tensors(self, name: str) -> CheckpointTensors:
        """The checkpoint's tensors of this layer, named `name` in its parent."""
        return _split(name, self.sources, self.weight.data, self.bias)

    def to_int8(self, *, symmetric: bool, grouped: bool) -> "Int8Linear":
        """An uninitialised INT8 layer of the same shape."""
        return Int8Linear(self, symmetric=symmetric, grouped=grouped)


class ColumnParallelLinear(Linear):
    """A linear layer whose outputs are split over the ranks.

    Args:
        parts: the checkpoint's names of the stacked layers, and for each the sizes of its blocks of outputs. Each block
            is split, in units of `unit` outputs; "" is the layer's own name.
    """

    def __init__(
        self, inputs: int, parts: Mapping[str, tuple[int, ...]], shard: Shard, *, bias: bool = False, unit: int = 1
    ) -> None:
        sources = {}
        for name, blocks in parts.items():
            start, rows = 0, []
            for outputs in blocks:
                own = shard.of(outputs // unit)
                rows.append(slice(start + own.start * unit, start + own.stop * unit))
                start += outputs
            sources[name] = Source((start, inputs), tuple(rows), slice(0, inputs))
        self._build(sources, bias)


class RowParallelLinear(Linear):
    """A linear layer whose inputs are split over the ranks, in units of `unit`: the outputs of all ranks add up."""

    def __init__(self, inputs: int, outputs: int, shard: Shard, *, unit: int = 1) -> None:
        own = shard.of(inputs // unit)
        columns = slice(own.start * unit, own.stop * unit)
        self._build({"": Source((outputs, inputs), (slice(0, outputs),), columns)}, bias=False)


class VocabParallelEmbedding(nn.Embedding):
    """A table of embeddings whose rows are split over the ranks: this one has `num_embeddings` rows from `start`."""

    def __init__(self, vocab_size: int, size: int, shard: Shard) -> None:
        own = shard.of(vocab_size)
        super().__init__(own.stop - own.start, size)
        self.start = own.start
        self.sources = {"": Source((vocab_size, size), (own,), slice(0, size))}

    def checkpoint_tensors(self, name: str) -> CheckpointTensors:
        """See `Linear.checkpoint_tensors`."""
        return _split(name, self.sources, self.weight.data, None)


class Int8Linear(nn.Module):
    """Replaces a `Linear`. It has no `forward`: the kernels compute with `weight` and `bias`.

    Casting the module (`.to(dtype)`) would cast its scales, so create it after the model has its dtype.
    """

    values: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None
    bias: nn.Parameter | None

    def __init__(self, layer: Linear, *, symmetric: bool, grouped: bool) -> None:
        super().__init__()
        self.sources = layer.sources
        self.grouped = grouped
        columns = next(iter(layer.sources.values())).columns
        weight = empty(
            *layer.weight.shape,
            symmetric=symmetric,
            grouped=grouped,
            group_offset=columns.start % GROUP,
            device=layer.weight.device,
        )
        self.group_offset = weight.group_offset
        self.register_buffer("values", weight.values)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("offsets", weight.offsets)
        bias = None if layer.bias is None else nn.Parameter(torch.empty_like(layer.bias), requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Int8Weight:
        return Int8Weight(self.values, self.scales, self.offsets, self.group_offset)

    def checkpoint_tensors(self, name: str) -> CheckpointTensors:
        """See `Linear.checkpoint_tensors`."""
        return _split(name, self.sources, self.weight, self.bias, self.grouped)


def _split(
    name: str, sources: Mapping[str, Source], weight: Tensor, bias: torch.Tensor | None, grouped: bool = False
) -> CheckpointTensors:
    start = 0
    for part, source in sources.items():
        rows = slice(start, start + source.num_rows)
        start = rows.stop
        memory = weight.rows(rows) if isinstance(weight, Int8Weight) else weight[rows]
        yield f"{part or name}.weight", memory if source.is_whole else WeightShard(memory, source, grouped)
        if bias is not None:
            yield f"{part or name}.bias", bias.data[rows] if source.is_whole else WeightShard(bias.data[rows], source)


def _take_rows(tensor: Tensor, parts: tuple[slice, ...]) -> Tensor:
    if isinstance(tensor, torch.Tensor):
        return torch.cat([tensor[part] for part in parts])
    found = [tensor.rows(part) for part in parts]
    offsets = [part.offsets for part in found if part.offsets is not None]
    return Int8Weight(
        torch.cat([part.values for part in found]),
        torch.cat([part.scales for part in found]),
        torch.cat(offsets) if offsets else None,
    )
