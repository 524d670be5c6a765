"""Screenshots to measure with: their content does not matter, but no two may be equal."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

SIZE = (1080, 2400)


def random_screen(seed: int, size: tuple[int, int] = SIZE) -> bytes:
    """An encoded PNG: 68x150 random pixels, enlarged."""
    pixels = np.random.default_rng(seed).integers(0, 256, (150, 68, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def random_screens(first: int, count: int, size: tuple[int, int] = SIZE) -> Iterator[bytes]:
    """`random_screen` of so many seeds, made at once, on all processors."""
    with ThreadPoolExecutor() as threads:
        return iter(list(threads.map(lambda seed: random_screen(seed, size), range(first, first + count))))
