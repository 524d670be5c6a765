"""The collectives of a tensor-parallel group."""

from typing import Protocol

import torch
from torch import distributed as dist

from autoglm.distributed.shard import Shard


class Communicator(Protocol):
    """All ranks call the same operations in the same order, and get bitwise equal results."""

    shard: Shard

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' `x`, which may be changed in place."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """All ranks' `x`, concatenated along the last dimension."""

    def minimum(self, value: int) -> int:
        """The smallest of all ranks' values."""


class SingleRank:
    """A group of one."""

    shard = Shard()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def minimum(self, value: int) -> int:
        return value


class ProcessGroup:
    """Collectives of torch.distributed: NCCL between GPUs, gloo between CPUs."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.shard = Shard(group.rank(), group.size())
        self._group = group

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x, group=self._group)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(self.shard.size)]
        dist.all_gather(parts, x.contiguous(), group=self._group)
        return torch.cat(parts, -1)

    def minimum(self, value: int) -> int:
        values: list[int] = [0] * self.shard.size
        dist.all_gather_object(values, value, group=self._group)
        return min(values)
