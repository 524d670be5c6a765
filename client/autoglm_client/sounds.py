"""Turning what the caller has at hand into the bytes of a sound file, and recording one."""

from __future__ import annotations

import io
import os
import wave
from pathlib import Path

AudioSource = bytes | bytearray | memoryview | str | os.PathLike[str]
RATE = 16000  # what speech encoders take


def audio_bytes(source: AudioSource) -> bytes:
    """The encoded file of one sound: WAV, FLAC, OGG or MP3.

    Bytes pass unchanged, a path is read, a `data:` URL is sent as it is (the server decodes it). Raises OSError when a
    file cannot be read and TypeError for anything else.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, str) and source.startswith("data:"):
        return source.encode()
    if isinstance(source, (str, os.PathLike)):
        return Path(source).read_bytes()
    raise TypeError(f"audio: {type(source).__name__} given; allowed are bytes, a path or a data URL")


def record(seconds: float) -> bytes:
    """What the microphone hears for so many seconds, as a WAV file. Raises OSError when there is no microphone, or no
    package to use it with."""
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # OSError: the package is there, the library PortAudio is not
        raise OSError(f"recording needs sounddevice: pip install 'autoglm-client[record]' ({error})") from None
    try:
        samples = sounddevice.rec(round(seconds * RATE), samplerate=RATE, channels=1, dtype="int16")
        sounddevice.wait()
    except sounddevice.PortAudioError as error:
        raise OSError(f"the microphone cannot be used: {error}") from None
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE)
        out.writeframes(samples.tobytes())
    return file.getvalue()
