"""Image files: what their headers say, their limits, their identity, and decoding them.

`read_image` needs only the header: it runs before anything is paid for, and no file makes it allocate pixels or loop
for long. `decode_image` gives the pixels, with the same checks before it starts.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import struct
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pybase64
from PIL import ExifTags, Image

from autoglm.config import LimitsConfig
from autoglm.errors import Exact, RequestError, invalid, shorten

MAGIC = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "PNG"),
    (re.compile(rb"\xff\xd8\xff"), "JPEG"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "WEBP"),
    (re.compile(rb"GIF8[79]a"), "GIF"),
    (re.compile(rb"BM"), "BMP"),
)
FORMATS = "PNG, JPEG, WebP, GIF or BMP"
DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)

# Chunks of a file before its pixels end. Real files hold hundreds; a crafted one of millions would keep a parser busy
# for minutes (GIF comments even quadratically).
MAX_CHUNKS = 16384
MAX_GIF_BLOCKS = 4096
MAX_JPEG_SCANS = 128

# Instead of Pillow's own limit the configured one holds, checked before anything is decoded.
Image.MAX_IMAGE_PIXELS = None

TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImagePart:
    """An encoded image of a request; `name` is the request's field, for error messages."""

    data: bytes
    name: str


@dataclass(frozen=True)
class ImageFile:
    """An image as it goes to the vision encoder: the encoded file, the grid (1, rows, columns) of patches that it is
    resized to, the `media_hash` of both, and the request's field that it came from, for messages."""

    data: bytes
    grid: tuple[int, int, int]
    hash: str
    name: str


@dataclass(frozen=True)
class ImageInfo:
    """What the header of an image file says. Width and height are those of the upright image, in pixels."""

    format: str
    width: int
    height: int
    orientation: int = 1


def read_image(data: bytes, limits: LimitsConfig, name: str = "image") -> ImageInfo:
    """Format and upright size of an image file, without decoding pixels.

    Args:
        name: the request's field, for messages.

    Raises:
        RequestError: the file is empty, too large, of another format, visibly truncated or broken, or has too many
            pixels. Damage inside the compressed pixels is found by `decode_image` only.
    """
    image, info = _open(data, limits, name)
    image.close()
    return info


def decode_image(data: bytes, limits: LimitsConfig, name: str = "image") -> Image.Image:
    """The pixels of an image file as an upright RGB image.

    As transformers' `load_image`: EXIF orientation is applied, the first frame of an animation is taken, and Pillow
    converts to RGB, which drops alpha and leaves the colours that lie under it. One difference: 16-bit grey is scaled
    to 8 bits, where Pillow would clip nearly all of it to white.

    Raises:
        RequestError: as `read_image`, and when the pixels are truncated or broken.
    """
    image, info = _open(data, limits, name)
    try:
        image.load()
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert("RGB") if image.mode != "RGB" else image
        if info.orientation in TRANSPOSES:
            image = image.transpose(TRANSPOSES[info.orientation])
    except Exception as error:  # Pillow's decoders raise a dozen kinds
        raise RequestError(f"{name}: the pixels of this {info.format} cannot be decoded: {shorten(error)}") from None
    if image.size != (info.width, info.height):
        raise RequestError(f"{name}: the pixels of this {info.format} are not of the size that its header says")
    return image


def decode_data_url(url: str, limits: LimitsConfig, name: str) -> bytes:
    """The bytes of a `data:image/...;base64,` URL. The format that it names is not trusted, the file's own counts.

    Raises:
        RequestError: another kind of URL, broken base64, or more bytes than allowed.
    """
    prefix = DATA_URL.match(url)
    if prefix is None:
        raise invalid(name, url, "a data URL (data:image/png;base64,...); other URLs are not fetched")
    return decode_base64(url[prefix.end() :], limits.max_image_bytes, name, "per image")


def decode_base64(text: str, limit: int, name: str, per: str) -> bytes:
    """The bytes that a text stands for, of which there may be `limit`.

    Raises:
        RequestError: broken base64, or more bytes than allowed.
    """
    size = len(text) * 3 // 4
    if size > limit + 2:
        raise invalid(name, Exact(f"about {size} bytes"), f"at most {limit} bytes {per}")
    with suppress(ValueError):
        return pybase64.b64decode(text, validate=True)
    try:
        return base64.b64decode(text, validate=True)  # says what is wrong
    except ValueError as error:
        raise RequestError(f"{name}: got broken base64 ({error}); allowed: the whole of a file") from None


def media_hash(data: bytes, grid: tuple[int, int, int]) -> str:
    """Identity of an encoded image for caches: hex SHA-256 over the file and the grid it is resized to."""
    digest = hashlib.sha256(data)
    digest.update(b"grid:%d,%d,%d" % grid)
    return digest.hexdigest()


def _open(data: bytes, limits: LimitsConfig, name: str) -> tuple[Image.Image, ImageInfo]:
    """Check the file's structure and limits and open it; Pillow reads the header only."""
    if not data:
        raise invalid(name, Exact("an empty file"), f"{FORMATS} files")
    if len(data) > limits.max_image_bytes:
        raise invalid(name, Exact(f"{len(data)} bytes"), f"at most {limits.max_image_bytes} bytes per image")
    kind = next((kind for magic, kind in MAGIC if magic.match(data)), None)
    if kind is None:
        raise invalid(name, Exact(f"a file that begins with {bytes(data[:12])!r}"), f"{FORMATS} files")
    try:
        late_exif = _check_structure(kind, data)
    except (struct.error, IndexError):
        raise RequestError(f"{name}: got a truncated {kind} file; allowed: whole files") from None
    except _BrokenFile as error:
        raise RequestError(f"{name}: got a broken {kind} file ({error}); allowed: whole files") from None
    try:
        image = Image.open(io.BytesIO(data), formats=[kind])
        width, height = image.size
        orientation = _orientation(image, late_exif)
    except Exception as error:  # Pillow's parsers raise a dozen kinds
        raise RequestError(f"{name}: the header of this {kind} cannot be read: {shorten(error)}") from None
    if width * height > limits.max_image_pixels:
        got = Exact(f"{width}x{height} = {width * height} pixels")
        raise invalid(name, got, f"at most {limits.max_image_pixels} pixels per image")
    if orientation >= 5:
        width, height = height, width
    return image, ImageInfo(kind, width, height, orientation)


def _orientation(image: Image.Image, late_exif: bytes | None) -> int:
    """The EXIF (or XMP) orientation 1-8, as `ImageOps.exif_transpose` finds it."""
    if late_exif is not None:
        image.info.setdefault("exif", b"Exif\x00\x00" + late_exif)
    # The base class reads `info`; PngImageFile.getexif would decode the pixels to look for EXIF behind them.
    value: Any = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    return value if value in TRANSPOSES else 1


class _BrokenFile(ValueError):
    pass


def _check_structure(kind: str, data: bytes) -> bytes | None:
    """Walk the file's chunks; returns a PNG's EXIF block. struct.error or IndexError: the file ends too early."""
    if kind == "PNG":
        return _check_png(data)
    if kind == "JPEG":
        _check_jpeg(data)
    elif kind == "GIF":
        _check_gif(data)
    elif kind == "WEBP" and struct.unpack_from("<I", data, 4)[0] + 8 > len(data):
        raise struct.error
    return None


def _check_png(data: bytes) -> bytes | None:
    position, exif = 8, None
    for _ in range(MAX_CHUNKS):
        length, kind = struct.unpack_from(">I4s", data, position)
        body = position + 8
        position = body + length + 4
        if position > len(data):
            raise struct.error
        if kind == b"IEND":
            return exif
        if kind == b"eXIf":
            exif = data[body : body + length]
    raise _BrokenFile(f"more than {MAX_CHUNKS} chunks")


def _check_jpeg(data: bytes) -> None:
    """Up to the first scan. Whether the scans are whole is left to the decoder: their end marker may be missing from
    files that are otherwise complete."""
    position = 2
    for _ in range(MAX_CHUNKS):
        if data[position] != 0xFF:
            raise _BrokenFile("no marker where one must be")
        marker = data[position + 1]
        position += 2
        if marker == 0xDA:
            if data.count(b"\xff\xda", position) >= MAX_JPEG_SCANS:
                raise _BrokenFile(f"more than {MAX_JPEG_SCANS} scans")
            return
        if marker == 0xFF:
            position -= 1  # a fill byte
        elif not (marker == 0x01 or 0xD0 <= marker <= 0xD8):
            position += struct.unpack_from(">H", data, position)[0]
    raise _BrokenFile(f"more than {MAX_CHUNKS} segments")


def _check_gif(data: bytes) -> None:
    """Up to the first frame."""
    flags = data[10]
    position = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    blocks = 0
    while blocks < MAX_GIF_BLOCKS:
        kind = data[position]
        if kind == 0x2C:
            return
        if kind != 0x21:
            raise _BrokenFile("no frame")
        position += 2
        while data[position] and blocks < MAX_GIF_BLOCKS:
            position += 1 + data[position]
            blocks += 1
        position += 1
        blocks += 1
    raise _BrokenFile(f"more than {MAX_GIF_BLOCKS} blocks before the first frame")
