"""Preprocesses images into the ViT's patches, bit for bit like transformers' `Glm4vImageProcessorPil`.

`patches` uses Pillow; `device_patches` computes the same on the device, from decoded pixels.

transformers' other backend, torchvision (its default if torchvision is installed), resizes with torch's antialiased
bicubic kernel. It differs by, in levels of 0-255 (1 level is 0.015 after normalisation):
- on the CPU (integer kernel), photos and screens: mean 0.001-0.08, at most 7; 93-99.97 % of the values are equal;
- on a GPU (float kernel, rounded at the end): mean 0.01-0.2, at most 16, at sharp edges; 24 on pure noise.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from autoglm.errors import Verbatim, invalid
from autoglm.kernels import get_kernels
from autoglm.vision.resample import resize

if TYPE_CHECKING:
    from autoglm.checkpoint import ImageLimits

MAX_ASPECT_RATIO = 200


def smart_resize(height: int, width: int, limits: ImageLimits, name: str = "image") -> tuple[int, int]:
    """The size (height, width) in pixels that an image is resized to: multiples of patch_size * merge_size.

    The limits count the `temporal_patch_size` equal frames that an image consists of.

    Raises:
        RequestError: one side is more than 200 times the other.
    """
    factor = limits.patch_size * limits.merge_size
    frames = limits.temporal_patch_size
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        ratio = max(height, width) / min(height, width)
        raise invalid(name, Verbatim(f"{ratio:.0f}"), f"an image with an aspect ratio of at most {MAX_ASPECT_RATIO}")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if frames * new_height * new_width > limits.max_pixels:
        shrink = math.sqrt((frames * height * width) / limits.max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif frames * new_height * new_width < limits.min_pixels:
        grow = math.sqrt(limits.min_pixels / (frames * height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def grid_of(size: tuple[int, int], limits: ImageLimits) -> tuple[int, int, int]:
    """The grid (1, rows, columns) of patches of a resized image, transformers' image_grid_thw."""
    return 1, size[0] // limits.patch_size, size[1] // limits.patch_size


def tokens_of(grid: tuple[int, int, int], limits: ImageLimits) -> int:
    """Number of visual tokens of a grid: one per merge_size x merge_size patches."""
    return grid[0] * grid[1] * grid[2] // limits.merge_size**2


def check_grid(grid: tuple[int, int, int], limits: ImageLimits, name: str = "image") -> None:
    """Reject a grid that no image can have.

    Args:
        limits: the server's, which bound those of requests.

    Raises:
        RequestError: the grid does not consist of whole tokens, or is too large.
    """
    merge = limits.merge_size
    # A narrow image is at least one token high, whatever max_pixels is.
    most = max(
        limits.max_pixels // (limits.temporal_patch_size * limits.patch_size**2), MAX_ASPECT_RATIO * merge * merge
    )
    frames, rows, columns = grid
    if frames != 1 or min(rows, columns) < merge or rows % merge or columns % merge or rows * columns > most:
        got, accepted = f"{frames} x {rows} x {columns}", f"1 x multiples of {merge}, at most {most} patches"
        raise invalid(name, Verbatim(got), f"sent with a grid of {accepted}")


def patches(image: Image.Image, size: tuple[int, int], limits: ImageLimits) -> NDArray[np.float32]:
    """Resize an RGB image to `size` (height, width), normalise it and cut it into patches.

    Returns:
        fp32 [N, 1176]: N = rows * columns patches, merge block after merge block, each patch as
        (channel, frame, row, column) with the frame repeated.
    """
    patch, merge, frames = limits.patch_size, limits.merge_size, limits.temporal_patch_size
    rows, columns = size[0] // patch // merge, size[1] // patch // merge
    resized = image.resize((size[1], size[0]), resample=Image.Resampling(limits.resample))
    bands = np.asarray(resized).reshape(rows, merge, patch, columns, merge, patch, 3)
    table = _normalised_levels(limits)
    result = np.empty((rows, columns, merge, merge, 3, frames, patch, patch), np.float32)
    for band, target in zip(bands, result, strict=True):  # a band of pixels stays in the CPU's cache
        band = band.transpose(2, 0, 3, 5, 1, 4)  # [columns, merge, merge, channel, patch, patch]
        for channel in range(3):
            values = table[channel].take(band[:, :, :, channel], mode="clip")
            for frame in range(frames):
                target[:, :, :, channel, frame] = values
    return result.reshape(rows * columns * merge * merge, 3 * frames * patch * patch)


def device_patches(
    pixels: torch.Tensor, size: tuple[int, int], limits: ImageLimits, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """`patches`, computed on the pixels' device without synchronising.

    Args:
        pixels: uint8 [H, W, 3].
        size: (height, width) in pixels to resize to, always bicubic.

    Returns:
        [N, 1176] in `dtype`.
    """
    return get_kernels(pixels.device).patchify(
        pixels=resize(pixels, size),
        levels=_device_levels(limits, pixels.device, dtype),
        patch_size=limits.patch_size,
        merge_size=limits.merge_size,
        temporal_patch_size=limits.temporal_patch_size,
    )


@lru_cache(maxsize=4)
def _device_levels(limits: ImageLimits, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """`_normalised_levels` rounded to `dtype`, on the device."""
    return torch.from_numpy(_normalised_levels(limits)).to(device, dtype)


@lru_cache(maxsize=4)
def _normalised_levels(limits: ImageLimits) -> NDArray[np.float32]:
    """fp32 [3, 256]: each level of each channel, normalised in the order and dtypes of transformers.

    Resized pixels have 256 levels, so a lookup table is exact, whereas a fused scale and shift would round differently.
    """
    scaled = (np.arange(256, dtype=np.float64) * limits.rescale_factor).astype(np.float32)
    mean, std = np.array(limits.mean, np.float32), np.array(limits.std, np.float32)
    levels: NDArray[np.float32] = (scaled[None, :] - mean[:, None]) / std[:, None]
    return levels
