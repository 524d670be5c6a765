"""Asynchronous copies between host and device. Only `DeviceResult.wait` blocks."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]
ALIGNMENT = 4  # int32 values: kernels are specialised for pointers aligned to 16 bytes


def aligned(count: int) -> int:
    """`count` rounded up to the alignment of the parts of a packed array."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def stage(array: Int32Array, device: torch.device) -> torch.Tensor:
    """A copy in pinned memory, from which the device copies asynchronously.

    torch's pinned allocator does not reuse the memory before the copies started from it are complete.
    """
    staged = torch.empty(array.shape, dtype=torch.int32, pin_memory=device.type == "cuda")
    staged.numpy()[...] = array
    return staged


def send(arrays: Sequence[Int32Array], device: torch.device) -> list[torch.Tensor]:
    """Copy arrays to the device, packed into one transfer."""
    starts = np.cumsum([0, *(aligned(array.size) for array in arrays)]).tolist()
    packed = np.zeros(starts[-1], np.int32)
    for start, array in zip(starts, arrays, strict=False):
        packed[start : start + array.size] = array.ravel()
    sent = stage(packed, device).to(device, non_blocking=True)
    return [sent[start : start + array.size].view(array.shape) for start, array in zip(starts, arrays, strict=False)]


class DeviceResult:
    """A tensor being copied to the host."""

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
