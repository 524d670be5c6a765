"""Turning what the caller has at hand into the bytes of an image file."""

from __future__ import annotations

import io
import os
from pathlib import Path

from PIL import Image

ImageSource = bytes | bytearray | memoryview | str | os.PathLike[str] | Image.Image


def image_bytes(source: ImageSource) -> bytes:
    """The encoded file of one image.

    Bytes pass unchanged, a path is read, a `data:` URL is sent as it is (the server decodes it), and a PIL image is
    encoded as PNG. Raises OSError when a file cannot be read and TypeError for anything else.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, Image.Image):
        buffer = io.BytesIO()
        source.save(buffer, "PNG")
        return buffer.getvalue()
    if isinstance(source, str) and source.startswith("data:"):
        return source.encode()
    if isinstance(source, (str, os.PathLike)):
        return Path(source).read_bytes()
    raise TypeError(f"image: {type(source).__name__} given; allowed are bytes, a path, a data URL or a PIL image")
