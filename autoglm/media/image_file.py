"""Image files: headers, limits, hashes and decoding.

`read_image` reads only the header, so it is cheap: no file makes it allocate pixels or loop for long. `decode_image`
returns the pixels, after the same checks.
"""

import hashlib
import io
import logging
import re
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from autoglm.config import LimitsConfig
from autoglm.errors import RequestError, Verbatim, invalid
from autoglm.media.payload import detect_format

log = logging.getLogger(__name__)

MAGIC = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "PNG"),
    (re.compile(rb"\xff\xd8\xff"), "JPEG"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "WEBP"),
    (re.compile(rb"GIF8[79]a"), "GIF"),
    (re.compile(rb"BM"), "BMP"),
)
ACCEPTED = "a PNG, JPEG, WebP, GIF or BMP file"

# Limits of a file's structure. Real files have hundreds of chunks; millions would keep a parser busy for minutes (GIF
# comments even quadratically).
MAX_CHUNKS = 16384
MAX_GIF_BLOCKS = 4096
MAX_JPEG_SCANS = 128

# Replaced by the configured limit, which is checked before anything is decoded.
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
    """An input of the vision encoder.

    data: the encoded file.
    grid: (1, rows, columns) of patches that the image is resized to.
    media_hash: `media_hash(data, grid)`.
    name: the request's field, for error messages.
    """

    data: bytes
    grid: tuple[int, int, int]
    media_hash: str
    name: str


@dataclass(frozen=True)
class ImageInfo:
    """The header of an image file. Width and height are those of the upright image, in pixels."""

    format: str
    width: int
    height: int
    orientation: int = 1


def read_image(data: bytes, limits: LimitsConfig, name: str = "image") -> ImageInfo:
    """Format and upright size of an image file, without decoding its pixels.

    Args:
        name: the request's field, for error messages.

    Raises:
        RequestError: the file is empty, too large, of an unknown format, truncated or damaged in its structure, or has
            too many pixels. Damage of the compressed pixels is only found by `decode_image`.
    """
    image, info = _open(data, limits, name)
    image.close()
    return info


def decode_image(data: bytes, limits: LimitsConfig, name: str = "image") -> Image.Image:
    """Decode an image file to an upright RGB image.

    Like transformers' `load_image`: the EXIF orientation is applied, the first frame of an animation is used, and the
    alpha channel is dropped without blending. One difference: 16-bit grey is scaled to 8 bits, where Pillow would clip
    nearly all of it to white.

    Raises:
        RequestError: as `read_image`, or the pixels are truncated or damaged.
    """
    image, info = _open(data, limits, name)
    try:
        image.load()
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert("RGB") if image.mode != "RGB" else image
        if info.orientation in TRANSPOSES:
            image = image.transpose(TRANSPOSES[info.orientation])
    except Exception as error:  # Pillow's decoders raise a dozen types
        log.info("Pillow cannot decode the pixels of a %s file: %s", info.format, error)
        raise RequestError(f"{name} is a damaged {info.format} file: its pixels cannot be decoded") from None
    if image.size != (info.width, info.height):
        raise RequestError(f"{name} is a damaged {info.format} file: its pixels do not have the size in its header")
    return image


def media_hash(data: bytes, grid: tuple[int, int, int]) -> str:
    """The hash that identifies an encoded image in caches: hex SHA-256 of the file and its grid."""
    digest = hashlib.sha256(data)
    digest.update(b"grid:%d,%d,%d" % grid)
    return digest.hexdigest()


def _open(data: bytes, limits: LimitsConfig, name: str) -> tuple[Image.Image, ImageInfo]:
    """Open a file after checking its structure and limits. Pillow reads the header only."""
    kind = detect_format(data, MAGIC, accepted=ACCEPTED, limit=limits.max_image_bytes, name=name)
    try:
        png_exif = _check_structure(kind, data)
    except (struct.error, IndexError):
        raise RequestError(f"{name} is a truncated {kind} file") from None
    except _DamagedFile as error:
        raise RequestError(f"{name} is a damaged {kind} file: {error}") from None
    try:
        image = Image.open(io.BytesIO(data), formats=[kind])
        width, height = image.size
        orientation = _orientation(image, png_exif)
    except Exception as error:  # Pillow's parsers raise a dozen types
        log.info("Pillow cannot read the header of a %s file: %s", kind, error)
        raise RequestError(f"{name} is a damaged {kind} file: its header cannot be read") from None
    if width * height > limits.max_image_pixels:
        got = Verbatim(f"{width}x{height} = {width * height} pixels")
        raise invalid(name, got, f"an image of at most {limits.max_image_pixels} pixels")
    if orientation >= 5:
        width, height = height, width
    return image, ImageInfo(kind, width, height, orientation)


def _orientation(image: Image.Image, png_exif: bytes | None) -> int:
    """The EXIF (or XMP) orientation 1-8, as in `ImageOps.exif_transpose`."""
    if png_exif is not None:
        image.info.setdefault("exif", b"Exif\x00\x00" + png_exif)
    # The base class reads `info`; PngImageFile.getexif would decode the pixels to find an EXIF chunk after them.
    value: Any = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    return value if value in TRANSPOSES else 1


class _DamagedFile(ValueError):
    """The message is the reason."""


def _check_structure(kind: str, data: bytes) -> bytes | None:
    """Walk the file's chunks and return a PNG's EXIF block. struct.error or IndexError: the file is truncated."""
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
    offset, exif = 8, None
    for _ in range(MAX_CHUNKS):
        length, kind = struct.unpack_from(">I4s", data, offset)
        body = offset + 8
        offset = body + length + 4
        if offset > len(data):
            raise struct.error
        if kind == b"IEND":
            return exif
        if kind == b"eXIf":
            exif = data[body : body + length]
    raise _DamagedFile(f"it has more than {MAX_CHUNKS} chunks")


def _check_jpeg(data: bytes) -> None:
    """Up to the first scan. The decoder checks the scans: complete files may lack their end marker."""
    offset = 2
    for _ in range(MAX_CHUNKS):
        if data[offset] != 0xFF:
            raise _DamagedFile("a marker is missing")
        marker = data[offset + 1]
        offset += 2
        if marker == 0xDA:
            if data.count(b"\xff\xda", offset) >= MAX_JPEG_SCANS:
                raise _DamagedFile(f"it has more than {MAX_JPEG_SCANS} scans")
            return
        if marker == 0xFF:
            offset -= 1  # a fill byte
        elif not (marker == 0x01 or 0xD0 <= marker <= 0xD8):
            offset += struct.unpack_from(">H", data, offset)[0]
    raise _DamagedFile(f"it has more than {MAX_CHUNKS} segments")


def _check_gif(data: bytes) -> None:
    """Up to the first frame."""
    flags = data[10]
    offset = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    blocks = 0
    while blocks < MAX_GIF_BLOCKS:
        kind = data[offset]
        if kind == 0x2C:
            return
        if kind != 0x21:
            raise _DamagedFile("its first frame is missing")
        offset += 2
        while data[offset] and blocks < MAX_GIF_BLOCKS:
            offset += 1 + data[offset]
            blocks += 1
        offset += 1
        blocks += 1
    raise _DamagedFile(f"it has more than {MAX_GIF_BLOCKS} blocks before its first frame")
