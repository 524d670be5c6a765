"""Data URLs, base64, and formats of encoded media."""

import base64
import re

import pytest

from autoglm.errors import RequestError
from autoglm.media.payload import decode_base64, decode_data_url, detect_format


def test_data_urls_are_decoded_strictly() -> None:
    data = bytes(range(256))
    text, limit = base64.b64encode(data).decode(), len(data)
    for prefix in ("data:image/png;base64,", "data:image/jpeg;base64,", "DATA:image/x-any;base64,"):
        assert decode_data_url(prefix + text, "image", limit, "url") == data
    for url in ("https://example.com/a.png", "file:///etc/passwd", text, "data:image/png," + text,
                "data:text/plain;base64," + text, "data:audio/wav;base64," + text, "data:image/png;base64," + text[:-1],
                "data:image/png;base64,!" + text[1:], "data:image/png;base64," + text[:8] + "\n" + text[8:],
                "data:image/png;base64," + "é"):  # fmt: skip
        with pytest.raises(RequestError, match=r"^url must be ") as caught:
            decode_data_url(url, "image", limit, "url")
        assert len(caught.value.message) < 250
    with pytest.raises(RequestError, match="at most"):
        decode_data_url("data:image/png;base64," + text + "AAAA", "image", limit, "url")


@pytest.mark.parametrize(
    "text", ["", "QQ==", "QR==", "AAAA", "AAAA====", "A", "AAA", "=", "AA=A", "AA\nAA", "A-_A", "@@@@", "é"]
)
def test_base64_is_accepted_as_by_the_standard_library(text: str) -> None:
    try:
        wanted = base64.b64decode(text, validate=True)
    except ValueError:
        wrong = next(((i, c) for i, c in enumerate(text) if not (c.isascii() and c.isalnum()) and c not in "+/="), None)
        got = "wrong padding" if wrong is None else f"{wrong[1]!r} at position {wrong[0]}"
        with pytest.raises(RequestError) as caught:
            decode_base64(text, 10, "url")
        assert caught.value.message == f"url must be valid base64 (got {got})"
    else:
        assert decode_base64(text, 10, "url") == wanted


def test_data_urls_of_audio_may_have_parameters() -> None:
    assert decode_data_url("data:audio/webm;codecs=opus;base64,UklGRg==", "audio", 1000, "AUDIO[0]") == b"RIFF"
    for url in ("data:image/png;base64,UklGRg==", "https://x/y.wav", "data:audio/wav,UklGRg=="):
        with pytest.raises(RequestError, match=r"AUDIO\[0\] must be a data URL such as .* \(got "):
            decode_data_url(url, "audio", 1000, "AUDIO[0]")
    with pytest.raises(RequestError, match=r"AUDIO\[0\] must be valid base64 \(got '&' at position 0\)"):
        decode_data_url("data:audio/wav;base64,&", "audio", 1000, "AUDIO[0]")


def test_formats_are_detected_from_the_first_bytes() -> None:
    formats = [(re.compile(rb"AB"), "X"), (re.compile(rb"C"), "Y")]
    assert detect_format(b"Cab", formats, accepted="an X or Y file", limit=3, name="f") == "Y"
    for data, got in ((b"", "an empty file"), (b"DAB", "a file that begins with 44 41 42")):
        with pytest.raises(RequestError) as caught:
            detect_format(data, formats, accepted="an X or Y file", limit=3, name="f")
        assert caught.value.message == f"f must be an X or Y file (got {got})"
    with pytest.raises(RequestError, match=r"^f must be at most 3 bytes \(got 4 bytes\)$"):
        detect_format(b"ABCD", formats, accepted="an X or Y file", limit=3, name="f")
