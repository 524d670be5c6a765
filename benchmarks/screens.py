"""Random screenshots: distinct images, so that caches never hit; speed does not depend on their content."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

SIZE = (1080, 2400)


def random_screen(seed: int, size: tuple[int, int] = SIZE) -> bytes:
    """A PNG file: 68x150 random pixels, upscaled."""
    pixels = np.random.default_rng(seed).integers(0, 256, (150, 68, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def random_screens(first: int, count: int, size: tuple[int, int] = SIZE) -> Iterator[bytes]:
    """`random_screen` for `count` seeds, created on all cores before the first is returned."""
    with ThreadPoolExecutor() as threads:
        return iter(list(threads.map(lambda seed: random_screen(seed, size), range(first, first + count))))
