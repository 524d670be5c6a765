"""Decompressed and unfiltered PNG files against Pillow."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from autoglm.kernels.reference import dispatch as reference
from autoglm.vision.png import read_scanlines

SIGNATURE = b"\x89PNG\r\n\x1a\n"
Pixels = NDArray[np.uint8]


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def header(width: int, height: int, channels: int, depth: int = 8, interlace: int = 0) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, {3: 2, 4: 6}[channels], 0, 0, interlace))


def noise_file(width: int, height: int, channels: int, parts: int = 3) -> bytes:
    """Random bytes with every filter type."""
    rng = np.random.default_rng(width)
    rows = rng.integers(0, 256, (height, 1 + width * channels), dtype=np.uint8)
    rows[:, 0] = rng.integers(0, 5, height)
    packed = zlib.compress(rows.tobytes())
    step = -(-len(packed) // parts)
    pixels = b"".join(chunk(b"IDAT", packed[i : i + step]) for i in range(0, len(packed), step))
    return SIGNATURE + header(width, height, channels) + chunk(b"tEXt", b"a\0b") + pixels + chunk(b"IEND", b"")


def decode(data: bytes) -> Pixels:
    lines = read_scanlines(data)
    assert lines is not None
    return reference.unfilter(rows=torch.from_numpy(lines.rows.copy()), channels=lines.channels).numpy()


def decode_with_pillow(data: bytes) -> Pixels:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (37, 61)], ids=str)
def test_pixels_equal_pillow(size: tuple[int, int], channels: int) -> None:
    data = noise_file(*size, channels)
    assert np.array_equal(decode(data), decode_with_pillow(data))


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_pixels_of_files_written_by_pillow_are_equal(mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (15, 7, len(mode)), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((90, 200)).save(file, "PNG")
    assert np.array_equal(decode(file.getvalue()), decode_with_pillow(file.getvalue()))


def damaged(data: bytes) -> dict[str, bytes]:
    at = data.index(b"IDAT")
    flipped = bytearray(data)
    flipped[at + 9] ^= 1
    small = SIGNATURE + header(5, 5, 3)
    end = chunk(b"IEND", b"")

    def packed(rows: bytes) -> bytes:
        return chunk(b"IDAT", zlib.compress(rows))

    return {
        "a flipped bit": bytes(flipped),
        "truncated": data[: at + 20],
        "no end": data[: -len(end)],
        "too few pixels": small + packed(bytes(16 * 4)) + end,
        "too many pixels": small + packed(bytes(16 * 6)) + end,
        "a bomb": small + packed(bytes(10**7)) + end,
        "an unknown filter": small + packed(b"\5" + bytes(79)) + end,
        "a broken stream": small + chunk(b"IDAT", b"\x78\x9c\xff\xff") + end,
        "no stream": small + end,
        "scattered pixels": small + packed(bytes(80)) + chunk(b"tEXt", b"a\0b") + packed(b"") + end,
        "16 bits": SIGNATURE + header(5, 5, 3, depth=16) + packed(bytes(5 * 31)) + end,
        "interlaced": SIGNATURE + header(5, 5, 3, interlace=1) + packed(bytes(80)) + end,
        "animated": small + chunk(b"acTL", bytes(8)) + packed(bytes(80)) + end,
        "a short header": SIGNATURE + chunk(b"IHDR", b"\0\0") + end,
        "only a signature": SIGNATURE,
    }


@pytest.mark.parametrize("kind", list(damaged(noise_file(3, 3, 3))))
def test_damaged_and_unusual_files_are_left_to_pillow(kind: str) -> None:
    assert read_scanlines(damaged(noise_file(30, 30, 3))[kind]) is None


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "I;16"])
def test_other_colour_types_are_left_to_pillow(mode: str) -> None:
    file = io.BytesIO()
    Image.new(mode, (4, 4)).save(file, "PNG")
    assert read_scanlines(file.getvalue()) is None
