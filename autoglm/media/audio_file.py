"""Sound files: what their headers say, their limits, their identity, and decoding them to one channel.

`read_audio` needs only the header: it runs before anything is paid for. `decode_audio` gives the samples, with the same
checks before it starts, in memory that the limits bound.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from autoglm.config import AudioSection
from autoglm.errors import Exact, RequestError, invalid, shorten
from autoglm.media.image_file import decode_base64

MAGIC = (
    (re.compile(rb"RIFF....WAVE|RF64....WAVE", re.DOTALL), "WAV"),
    (re.compile(rb"fLaC"), "FLAC"),
    (re.compile(rb"OggS"), "OGG"),
    (re.compile(rb"ID3|\xff[\xe2-\xe7\xf2-\xf7\xfa-\xff]"), "MP3"),
)
FORMATS = "WAV, FLAC, OGG or MP3"
DATA_URL = re.compile(r"data:audio/[a-z0-9.+-]+(;[a-z]+=[a-z0-9.,]+)*;base64,", re.IGNORECASE)

MIN_RATE, MAX_RATE = 4000, 192_000
MAX_CHANNELS = 32
MAX_LEVEL = 2.0**31  # files of floats may be scaled like integers, not beyond
BLOCK = 2**16  # frames that are decoded at once: only their mean over the channels is kept

Samples = npt.NDArray[np.float32]


@dataclass(frozen=True)
class AudioPart:
    """An encoded audio clip of a request; `name` is the request's field, for error messages."""

    data: bytes
    name: str


@dataclass(frozen=True)
class AudioFile:
    """A clip as it goes to the speech encoder: the encoded file, the tokens that it stands for in the prompt (0 where
    its transcript does), the `audio_hash`, and the request's field that it came from, for messages."""

    data: bytes
    tokens: int
    hash: str
    name: str


@dataclass(frozen=True)
class AudioInfo:
    """What the header of a sound file says; `frames` are samples of one channel, `rate` how many a second has."""

    format: str
    rate: int
    channels: int
    frames: int

    def resampled(self, rate: int) -> int:
        """Samples that the clip has at another rate."""
        return (2 * self.frames * rate + self.rate) // (2 * self.rate)


def read_audio(data: bytes, limits: AudioSection, name: str = "audio") -> AudioInfo:
    """Format and length of a sound file, without decoding it; but an MP3 is decoded to be counted, as its header may
    not know its length.

    Args:
        name: the request's field, for messages.

    Raises:
        RequestError: the file is empty, too large, of another format, has a broken header, no samples, or lasts too
            long. Damage inside the compressed samples is found by `decode_audio` only.
    """
    file, info = _open(data, limits, name)
    with file:
        if info.format == "MP3":
            info = replace(info, frames=sum(len(block) for block in _blocks(file, info, limits, name)))
    _check_length(info, limits, name)
    return info


def decode_audio(data: bytes, limits: AudioSection, rate: int, name: str = "audio") -> Samples:
    """The samples of a sound file: the mean of its channels, at `rate`, fp32 [`AudioInfo.resampled(rate)`].

    Raises:
        RequestError: as `read_audio`; the samples are truncated or broken, or are no finite numbers.
    """
    file, info = _open(data, limits, name)
    if info.format != "MP3":
        _check_length(info, limits, name)
    with file:
        samples: Samples = np.concatenate([np.empty(0, np.float32), *_blocks(file, info, limits, name)])
    if info.format != "MP3" and len(samples) < info.frames:
        got = Exact(f"a truncated {info.format} file of {len(samples) / info.rate:.2f} s")
        raise invalid(name, got, f"whole files: its header says {info.frames / info.rate:.2f} s")
    info = replace(info, frames=len(samples))
    _check_length(info, limits, name)
    if not np.abs(samples).max() <= MAX_LEVEL:  # of NaN nothing is true
        raise invalid(name, Exact("samples that are NaN, infinite or beyond 2^31"), "finite samples, usually -1 to 1")
    if info.rate == rate:
        return samples
    resampled = np.zeros(info.resampled(rate), np.float32)
    made = soxr.resample(samples, info.rate, rate)[: len(resampled)]  # how it rounds halves is not documented
    resampled[: len(made)] = made
    return resampled


def decode_audio_url(url: str, limits: AudioSection, name: str) -> bytes:
    """The bytes of a `data:audio/...;base64,` URL. The format that it names is not trusted, the file's own counts.

    Raises:
        RequestError: another kind of URL, broken base64, or more bytes than allowed.
    """
    prefix = DATA_URL.match(url)
    if prefix is None:
        raise invalid(name, url, "a data URL (data:audio/wav;base64,...); other URLs are not fetched")
    return decode_base64(url[prefix.end() :], limits.max_audio_bytes, name, "per audio file")


def audio_hash(data: bytes, identity: str) -> str:
    """Identity of what an encoder and a projector, named by `identity`, make of a sound file: hex SHA-256."""
    digest = hashlib.sha256(data)
    digest.update(f"speech:{identity}".encode())
    return digest.hexdigest()


def _open(data: bytes, limits: AudioSection, name: str) -> tuple[soundfile.SoundFile, AudioInfo]:
    """Check the file's limits and open it; only the header is read."""
    if not data:
        raise invalid(name, Exact("an empty file"), f"{FORMATS} files")
    if len(data) > limits.max_audio_bytes:
        raise invalid(name, Exact(f"{len(data)} bytes"), f"at most {limits.max_audio_bytes} bytes per audio file")
    kind = next((kind for magic, kind in MAGIC if magic.match(data)), None)
    if kind is None:
        raise invalid(name, Exact(f"a file that begins with {bytes(data[:12])!r}"), f"{FORMATS} files")
    try:
        file = soundfile.SoundFile(io.BytesIO(data))
    except (soundfile.SoundFileError, RuntimeError, ValueError) as error:
        raise RequestError(f"{name}: the header of this {kind} cannot be read: {_reason(error)}") from None
    info = AudioInfo(kind, file.samplerate, file.channels, file.frames)
    if MIN_RATE <= info.rate <= MAX_RATE and info.channels <= MAX_CHANNELS:
        return file, info
    file.close()
    if info.channels > MAX_CHANNELS:
        raise invalid(name, Exact(f"{info.channels} channels"), f"at most {MAX_CHANNELS}")
    raise invalid(name, Exact(f"{info.rate} samples a second"), f"from {MIN_RATE} to {MAX_RATE}")


def _check_length(info: AudioInfo, limits: AudioSection, name: str) -> None:
    if info.frames > limits.max_audio_seconds * info.rate:
        got = Exact(f"{info.frames / info.rate:.1f} s or more")
        raise invalid(name, got, f"at most {limits.max_audio_seconds} s per audio file")
    if info.frames < 1:
        raise invalid(name, Exact(f"a {info.format} file of 0 s"), "files that hold sound")


def _blocks(file: soundfile.SoundFile, info: AudioInfo, limits: AudioSection, name: str) -> Iterator[Samples]:
    """The mean of the channels, piece by piece, not much further than a file may last."""
    done = 0
    share = np.full(info.channels, 1 / info.channels, np.float32)
    try:
        while done <= limits.max_audio_seconds * info.rate:
            block: Samples = file.read(BLOCK, "float32", always_2d=True)
            if not len(block):
                return
            done += len(block)
            yield block @ share
    except soundfile.SoundFileError as error:
        raise RequestError(f"{name}: the samples of this {info.format} cannot be decoded: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """The library's message without the place in memory of the file, which it begins with."""
    return shorten(re.sub(r"^Error opening <.*?>: ", "", str(error)))
