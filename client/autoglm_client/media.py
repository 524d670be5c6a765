"""Images and audio clips as encoded files."""

import io
import os
from pathlib import Path

from PIL import Image

from autoglm_client.errors import InvalidRequest

AudioSource = bytes | bytearray | memoryview | str | os.PathLike[str]
ImageSource = AudioSource | Image.Image


def image_bytes(source: ImageSource) -> bytes:
    """The encoded file of an image: a PIL image becomes a PNG file, other sources are treated as by `audio_bytes`."""
    if not isinstance(source, Image.Image):
        return _file_bytes(source, "images must contain bytes, paths, data URLs or PIL images")
    buffer = io.BytesIO()
    try:
        source.save(buffer, "PNG")
    except OSError as error:
        raise InvalidRequest(f"images must have modes that PNG can store (got mode {source.mode})") from error
    return buffer.getvalue()


def audio_bytes(source: AudioSource) -> bytes:
    """The encoded file of an audio clip (WAV, FLAC, OGG or MP3).

    Bytes and `data:` URLs are returned unchanged (the server decodes the latter); a path is read. Raises OSError if the
    file cannot be read, TypeError for other types.
    """
    return _file_bytes(source, "audio must contain bytes, paths or data URLs")


def _file_bytes(source: object, accepted: str) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, str) and source.startswith("data:"):
        return source.encode()
    if isinstance(source, (str, os.PathLike)):
        return Path(source).read_bytes()
    raise TypeError(f"{accepted} (got {type(source).__name__})")
