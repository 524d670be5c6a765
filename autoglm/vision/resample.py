"""Pillow's bicubic resize on any device, bit for bit.

Pillow (src/libImaging/Resample.c, 8 bits a channel) computes weights in double precision, rounds them to fixed point
with 22 binary places, and resizes one side after the other; each pass is rounded and clipped to 8 bits.
"""

import math
from functools import lru_cache

import numpy as np
import PIL
import torch
from numpy.typing import NDArray

from autoglm.kernels import get_kernels
from autoglm.kernels.base import Taps

PILLOW = tuple(int(part) for part in PIL.__version__.split(".")[:2])
SUPPORT = 2.0  # how far the cubic reaches, in pixels of the smaller side
SHARPNESS = -0.5  # the cubic's parameter `a`


def resize(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 [H, W, 3] -> uint8 [height, width, 3], on the pixels' device; nothing waits for it."""
    source = pixels.shape[0], pixels.shape[1]
    for axis in (0, 1) if _height_first(source, size) else (1, 0):
        if source[axis] != size[axis]:
            pixels = get_kernels(pixels.device).resample(pixels, taps(source[axis], size[axis], pixels.device), axis)
    return pixels


def _height_first(source: tuple[int, int], target: tuple[int, int]) -> bool:
    """Whether the installed Pillow begins with the height; which side is first changes roundings. (height, width).

    Pillow 13 does where the height loses more than twice what the width does, 12.2 and 12.3 where the image is more
    than a hundred times as high as wide, older ones never.
    """
    lost_height, lost_width = source[0] - target[0], source[1] - target[1]
    if PILLOW >= (13, 0):
        return lost_height > max(0, 2 * lost_width)
    return PILLOW >= (12, 2) and lost_height > 0 and source[0] > 100 * source[1]


@lru_cache(maxsize=64)
def taps(source: int, target: int, device: torch.device) -> Taps:
    """The weights that resize a side of `source` pixels to `target`, on the device."""
    starts, weights = _weights(source, target)
    return Taps(torch.from_numpy(starts).to(device), torch.from_numpy(weights).to(device))


def _weights(source: int, target: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """First source pixel [target] of each target pixel, and the weights [target, n] from there on, 0 behind the end."""
    scale = source / target
    stretch = max(scale, 1.0)
    reach = SUPPORT * stretch
    centers = (np.arange(target) + 0.5) * scale
    starts = np.maximum(centers - reach + 0.5, 0).astype(np.int32)
    ends = np.minimum(centers + reach + 0.5, source).astype(np.int32)
    places = np.arange(math.ceil(reach) * 2 + 1)
    weights = _cubic((places + starts[:, None] - centers[:, None] + 0.5) * (1 / stretch))
    weights[places >= (ends - starts)[:, None]] = 0
    total = np.zeros(target)
    for column in weights.T:  # in Pillow's order: a sum's last bit depends on it
        total += column
    weights /= total[:, None]
    scaled = weights * (1 << Taps.PLACES)
    return starts, np.trunc(scaled + np.where(scaled < 0, -0.5, 0.5)).astype(np.int32)


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic convolution (1981), in Pillow's order of operations."""
    x = np.abs(x)
    near = ((SHARPNESS + 2.0) * x - (SHARPNESS + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * SHARPNESS
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
