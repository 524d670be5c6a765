"""Image files: headers, limits, decoding, damaged and hostile files."""

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from autoglm.config import LimitsConfig
from autoglm.errors import ErrorCode, RequestError
from autoglm.media.image_file import decode_image, media_hash, read_image

LIMITS = LimitsConfig()
PHOTO = Path(__file__).parents[1] / "vision" / "photos" / "rocket.jpg"
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP"]
ORIENTATION = 0x0112


def photo(width: int = 96, height: int = 64) -> Image.Image:
    return Image.open(PHOTO).convert("RGB").resize((width, height))


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def rotated(format: str, orientation: int, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encode(photo(), format, exif=exif.tobytes(), **options)


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG whose header claims a size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND")


def reference(data: bytes) -> Image.Image:
    """The file decoded by transformers."""
    return load_image("data:image/png;base64," + base64.b64encode(data).decode())


def check_equal_to_reference(data: bytes) -> None:
    expected = reference(data)
    info = read_image(data, LIMITS)
    decoded = decode_image(data, LIMITS)
    assert (info.width, info.height) == expected.size
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), np.asarray(expected))


def refused(data: bytes, limits: LimitsConfig = LIMITS) -> str:
    """The error of a file whose header is already rejected."""
    with pytest.raises(RequestError) as caught:
        read_image(data, limits, "IMAGES[1]")
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert caught.value.message.startswith("IMAGES[1] ")
    with pytest.raises(RequestError):
        decode_image(data, limits, "IMAGES[1]")
    return caught.value.message


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_read_and_decoded(format: str) -> None:
    data = encode(photo(), format)
    info = read_image(data, LIMITS)
    assert (info.format, info.width, info.height, info.orientation) == (format, 96, 64, 1)
    check_equal_to_reference(data)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_applied_to_size_and_pixels(format: str, orientation: int) -> None:
    data = rotated(format, orientation)
    check_equal_to_reference(data)
    info = read_image(data, LIMITS)
    assert info.orientation == orientation
    assert (info.width, info.height) == ((64, 96) if orientation >= 5 else (96, 64))


def test_exif_after_the_pixels_of_a_png_is_applied() -> None:
    data = rotated("PNG", 6)
    start = data.index(b"eXIf") - 4
    end = start + 12 + struct.unpack_from(">I", data, start)[0]
    moved = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    assert moved.index(b"eXIf") > moved.index(b"IDAT")
    check_equal_to_reference(moved)
    assert read_image(moved, LIMITS).width == 64


@pytest.mark.parametrize("value", [0, 9, 77])
def test_unknown_exif_orientations_are_ignored(value: int) -> None:
    check_equal_to_reference(rotated("JPEG", value))


@pytest.mark.parametrize("mode, format", [
    ("CMYK", "JPEG"), ("L", "JPEG"), ("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("P", "GIF"), ("LA", "PNG"),
    ("RGBA", "PNG"), ("RGBA", "WEBP"), ("L", "GIF"), ("P", "BMP"),
])  # fmt: skip
def test_colour_modes_become_rgb_as_in_transformers(mode: str, format: str) -> None:
    image = photo()
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(np.tile(np.arange(96, dtype=np.uint8) * 2, (64, 1))))
    check_equal_to_reference(encode(image.convert(mode), format))


def test_a_transparent_palette_becomes_rgb() -> None:
    check_equal_to_reference(encode(photo().convert("P"), "PNG", transparency=3))


def test_progressive_jpeg_and_interlaced_options() -> None:
    check_equal_to_reference(encode(photo(), "JPEG", progressive=True))
    check_equal_to_reference(encode(photo(), "JPEG") + b"bytes that a phone appends")


def test_sixteen_bit_grey_is_scaled() -> None:
    levels = (np.arange(64 * 64, dtype=np.uint32).reshape(64, 64) * 16).astype(np.uint16)
    decoded = np.asarray(decode_image(encode(Image.fromarray(levels)), LIMITS))
    assert np.array_equal(decoded, np.repeat((levels >> 8).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(format: str) -> None:
    frames = [photo(), Image.new("RGB", (96, 64), "red")]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
    assert Image.open(io.BytesIO(data)).n_frames == 2  # type: ignore[attr-defined]
    check_equal_to_reference(data)


def test_one_pixel_is_an_image() -> None:
    check_equal_to_reference(encode(photo(1, 1)))


def test_empty_files_and_other_formats_are_rejected() -> None:
    assert "an empty file" in refused(b"")
    assert "begins with 7b 22 61 22" in refused(b'{"a": 1}')
    assert "PNG, JPEG, WebP, GIF or BMP" in refused(b"hello, I am a text file\n" * 100)
    assert "PNG, JPEG, WebP, GIF or BMP" in refused(encode(photo(), "TIFF"))
    assert "PNG, JPEG, WebP, GIF or BMP" in refused(b"%PDF-1.7\n")


def test_limits_are_checked_from_the_header() -> None:
    data = encode(photo())
    assert f"at most {len(data) - 1} bytes" in refused(data, LimitsConfig(max_image_bytes=len(data) - 1))
    message = refused(data, LimitsConfig(max_image_pixels=96 * 64 - 1))
    assert message == "IMAGES[1] must be an image of at most 6143 pixels (got 96x64 = 6144 pixels)"
    assert read_image(data, LimitsConfig(max_image_pixels=96 * 64)).width == 96


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 20_000, 2**31 - 1])
def test_a_decompression_bomb_is_rejected_without_decoding(side: int) -> None:
    bomb = png(side, side, chunk(b"IDAT", zlib.compress(bytes(10**6))))
    assert "at most 67108864 pixels" in refused(bomb)


@pytest.mark.parametrize("keep", [8, 20, 60, 0.5, 0.99, -1, -12])
def test_a_truncated_png_is_rejected_from_its_structure(keep: float) -> None:
    data = encode(photo())
    end = int(len(data) * keep) if isinstance(keep, float) else int(keep)
    message = refused(data[:end])
    assert "PNG" in message


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_truncated_files_are_rejected_at_the_latest_when_decoded(format: str, keep: float) -> None:
    data = encode(photo(), format)
    with pytest.raises(RequestError, match=rf"^IMAGES\[0\] .*{format}[^<>]*$"):
        decode_image(data[: int(len(data) * keep)], LIMITS, "IMAGES[0]")


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_files_only_raise_request_errors(format: str) -> None:
    data = encode(photo(), format)
    random = np.random.default_rng(5)
    for _ in range(60):
        damaged = bytearray(data)
        for position in random.integers(0, len(data), 3):
            damaged[position] = random.integers(256)
        try:
            info = read_image(bytes(damaged), LIMITS)
            image = decode_image(bytes(damaged), LIMITS)
        except RequestError:
            continue
        assert image.size == (info.width, info.height)


def test_files_that_would_keep_a_parser_busy_are_rejected() -> None:
    start = encode(photo(), "JPEG")[:2]
    assert "segments" in refused(start + b"\xff\xe0\x00\x02" * 10**6)
    assert "segments" in refused(start + b"\xff" * 10**6)
    scans = encode(photo(), "JPEG", progressive=True)
    position = scans.rindex(b"\xff\xda")
    assert "scans" in refused(scans[:position] + scans[position:-2] * 500 + b"\xff\xd9")
    assert "chunks" in refused(png(9, 9, chunk(b"tEXt") * 20_000))
    gif = encode(photo(), "GIF")
    first = gif.index(b"\x2c", 13 + 3 * 256)
    comment = b"\x21\xfe" + (b"\xff" + b"x" * 255) * 10_000 + b"\x00"
    assert "blocks" in refused(gif[:first] + comment + gif[first:])
    assert read_image(gif[:first] + b"\x21\xfe\x03abc\x00" + gif[first:], LIMITS).width == 96


def test_the_hash_depends_on_file_and_grid() -> None:
    data = encode(photo())
    known = media_hash(data, (1, 4, 8))
    assert known == media_hash(bytes(bytearray(data)), (1, 4, 8))
    assert len(known) == 64
    others = {media_hash(data + b"\0", (1, 4, 8)), media_hash(data, (1, 8, 4)), media_hash(b"", (1, 4, 8))}
    assert len(others | {known}) == 4
