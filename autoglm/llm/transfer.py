"""Numbers on their way to the device and back. Nothing here waits but `Arrival.wait`."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Numbers = NDArray[np.int32]
ALIGNMENT = 4  # numbers: kernels are compiled once for pointers to multiples of 16 bytes


def aligned(numbers: int) -> int:
    """So many, rounded up to what the next part of a packed array may begin at."""
    return -(-numbers // ALIGNMENT) * ALIGNMENT


def stage(array: Numbers, device: torch.device) -> torch.Tensor:
    """A copy in memory from which the device can fetch it while the host goes on.

    It comes from torch's own pool, which gives it to nobody else before a copy that was started from it has run.
    """
    staged = torch.empty(array.shape, dtype=torch.int32, pin_memory=device.type == "cuda")
    staged.numpy()[...] = array
    return staged


def send(arrays: Sequence[Numbers], device: torch.device) -> list[torch.Tensor]:
    """Arrays to the device, all by one copy."""
    starts = np.cumsum([0, *(aligned(array.size) for array in arrays)]).tolist()
    packed = np.zeros(starts[-1], np.int32)
    for start, array in zip(starts, arrays, strict=False):
        packed[start : start + array.size] = array.ravel()
    sent = stage(packed, device).to(device, non_blocking=True)
    return [sent[start : start + array.size].view(array.shape) for start, array in zip(starts, arrays, strict=False)]


class Arrival:
    """Numbers that come back once the device has computed them."""

    def __init__(self, values: torch.Tensor) -> None:
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        self._host.copy_(values, non_blocking=True)
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> torch.Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host
