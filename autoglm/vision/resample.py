"""Pillow's bicubic resize on any device, bit for bit.

Pillow (src/libImaging/Resample.c, 8 bits per channel) computes weights in double precision, rounds them to fixed point
with 22 fraction bits, and resizes one axis after the other; each pass is rounded and clipped to 8 bits.
"""

import math
from functools import lru_cache

import numpy as np
import PIL
import torch
from numpy.typing import NDArray

from autoglm.kernels import get_kernels
from autoglm.kernels.base import ResampleFilter

PILLOW = tuple(int(part) for part in PIL.__version__.split(".")[:2])
SUPPORT = 2.0  # radius of the cubic, in pixels of the shorter axis
SHARPNESS = -0.5  # parameter `a` of the cubic


def resize(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 [H, W, 3] -> uint8 [height, width, 3] on the pixels' device, without synchronising."""
    source = pixels.shape[0], pixels.shape[1]
    for axis in (0, 1) if _height_first(source, size) else (1, 0):
        if source[axis] != size[axis]:
            axis_filter = resample_filter(source[axis], size[axis], pixels.device)
            pixels = get_kernels(pixels.device).resample(pixels=pixels, resample_filter=axis_filter, axis=axis)
    return pixels


def _height_first(source: tuple[int, int], target: tuple[int, int]) -> bool:
    """Whether the installed Pillow resizes the height first, which affects rounding. Sizes are (height, width).

    Pillow 13 does if the height shrinks by more than twice as much as the width, 12.2 and 12.3 if the image is more
    than a hundred times as high as wide, older versions never.
    """
    lost_height, lost_width = source[0] - target[0], source[1] - target[1]
    if PILLOW >= (13, 0):
        return lost_height > max(0, 2 * lost_width)
    return PILLOW >= (12, 2) and lost_height > 0 and source[0] > 100 * source[1]


@lru_cache(maxsize=64)
def resample_filter(source: int, target: int, device: torch.device) -> ResampleFilter:
    """The filter that resizes an axis of `source` pixels to `target`."""
    starts, weights = _weights(source, target)
    return ResampleFilter(torch.from_numpy(starts).to(device), torch.from_numpy(weights).to(device))


def _weights(source: int, target: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """See `ResampleFilter`."""
    scale = source / target
    stretch = max(scale, 1.0)
    reach = SUPPORT * stretch
    centers = (np.arange(target) + 0.5) * scale
    starts = np.maximum(centers - reach + 0.5, 0).astype(np.int32)
    ends = np.minimum(centers + reach + 0.5, source).astype(np.int32)
    offsets = np.arange(math.ceil(reach) * 2 + 1)
    weights = _cubic((offsets + starts[:, None] - centers[:, None] + 0.5) * (1 / stretch))
    weights[offsets >= (ends - starts)[:, None]] = 0
    total = np.zeros(target)
    for column in weights.T:  # in Pillow's order, which determines the last bit
        total += column
    weights /= total[:, None]
    scaled = weights * (1 << ResampleFilter.FRACTION_BITS)
    return starts, np.trunc(scaled + np.where(scaled < 0, -0.5, 0.5)).astype(np.int32)


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic convolution (1981), in Pillow's order of operations."""
    x = np.abs(x)
    near = ((SHARPNESS + 2.0) * x - (SHARPNESS + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * SHARPNESS
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
