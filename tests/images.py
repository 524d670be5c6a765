"""Small images in many formats."""

import io
from typing import Any

import numpy as np
from PIL import Image


def picture(width: int = 120, height: int = 200, seed: int = 0) -> Image.Image:
    """Smooth random colours, which survive resizing and differ between seeds."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated_by_exif(image: Image.Image) -> bytes:
    """A PNG with rotated pixels and the EXIF orientation that restores `image`."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(image.transpose(Image.Transpose.ROTATE_90), exif=exif)
