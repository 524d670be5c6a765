"""Encoded media in requests: data URLs, base64, and the checks of size and format that all files share."""

import base64
import re
from collections.abc import Sequence
from contextlib import suppress

import pybase64

from autoglm.errors import Verbatim, invalid, shorten

DATA_URL = re.compile(r"data:(image|audio)/[a-z0-9.+-]+(;[a-z]+=[a-z0-9.,]+)*;base64,", re.IGNORECASE)
NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/=]")
EXAMPLES = {"image": "data:image/png;base64,...", "audio": "data:audio/wav;base64,..."}


def decode_data_url(url: str, kind: str, limit: int, name: str) -> bytes:
    """The bytes of a data URL of an image or audio file. Its media type is ignored; the file's own format counts.

    Args:
        kind: `image` or `audio`.
        limit: bytes at most.
        name: the request's field, for error messages.

    Raises:
        RequestError: another kind of URL, invalid base64, or too many bytes.
    """
    prefix = DATA_URL.match(url)
    if prefix is None or prefix[1].lower() != kind:
        raise invalid(name, url, f"a data URL such as {EXAMPLES[kind]}")
    return decode_base64(url[prefix.end() :], limit, name)


def decode_base64(text: str, limit: int, name: str) -> bytes:
    """Decode base64 to about `limit` bytes at most; the readers of the files check the exact number.

    Raises:
        RequestError: invalid base64, or too many bytes.
    """
    size = len(text) * 3 // 4
    if size > limit + 2:
        raise invalid(name, Verbatim(f"about {size} bytes"), f"at most {limit} bytes")
    with suppress(ValueError):
        return pybase64.b64decode(text, validate=True)
    try:
        return base64.b64decode(text, validate=True)  # also accepts excess padding
    except ValueError:
        wrong = NOT_BASE64.search(text)
        got = f"{shorten(wrong[0])} at position {wrong.start()}" if wrong else "wrong padding"
        raise invalid(name, Verbatim(got), "valid base64") from None


def detect_format(
    data: bytes, formats: Sequence[tuple[re.Pattern[bytes], str]], *, accepted: str, limit: int, name: str
) -> str:
    """The format whose magic bytes a file begins with.

    Raises:
        RequestError: the file is empty, has more than `limit` bytes, or none of the formats.
    """
    if not data:
        raise invalid(name, Verbatim("an empty file"), accepted)
    if len(data) > limit:
        raise invalid(name, Verbatim(f"{len(data)} bytes"), f"at most {limit} bytes")
    for magic, found in formats:
        if magic.match(data):
            return found
    raise invalid(name, Verbatim(f"a file that begins with {data[:12].hex(' ')}"), accepted)
