"""How the units of a layer are split over the ranks of a tensor-parallel group."""

from typing import NamedTuple


class Shard(NamedTuple):
    """One rank of a tensor-parallel group."""

    rank: int = 0
    size: int = 1

    def of(self, count: int) -> slice:
        """This rank's units out of `count`. If there are fewer units than ranks, neighbouring ranks share one."""
        if count < self.size:
            unit = self.rank * count // self.size
            return slice(unit, unit + 1)
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)
