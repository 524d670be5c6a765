"""Audio files: headers, limits, hashes and decoding to one channel.

`read_audio` reads only the header, so it is cheap. `decode_audio` returns the samples, after the same checks, in memory
bounded by the limits.
"""

import hashlib
import io
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from autoglm.config import AudioSection
from autoglm.errors import RequestError, Verbatim, invalid
from autoglm.media.payload import detect_format

log = logging.getLogger(__name__)

MAGIC = (
    (re.compile(rb"RIFF....WAVE|RF64....WAVE", re.DOTALL), "WAV"),
    (re.compile(rb"fLaC"), "FLAC"),
    (re.compile(rb"OggS"), "OGG"),
    (re.compile(rb"ID3|\xff[\xe2-\xe7\xf2-\xf7\xfa-\xff]"), "MP3"),
)
ACCEPTED = "a WAV, FLAC, OGG or MP3 file"

MIN_RATE, MAX_RATE = 4000, 192_000
MAX_CHANNELS = 32
MAX_LEVEL = 2.0**31  # files of floats may be scaled like integers
BLOCK = 2**16  # frames decoded at once, of which only the mean over the channels is kept

Samples = npt.NDArray[np.float32]


@dataclass(frozen=True)
class AudioPart:
    """An encoded audio clip of a request; `name` is the request's field, for error messages."""

    data: bytes
    name: str


@dataclass(frozen=True)
class AudioFile:
    """An input of the speech encoder.

    data: the encoded file.
    num_tokens: number of its embeddings in the prompt; 0 for a clip that is replaced by its transcript.
    media_hash: `media_hash(data, models)`.
    name: the request's field, for error messages.
    """

    data: bytes
    num_tokens: int
    media_hash: str
    name: str


@dataclass(frozen=True)
class AudioInfo:
    """The header of an audio file. `rate` is in Hz, `frames` are samples per channel."""

    format: str
    rate: int
    channels: int
    frames: int

    def resampled(self, rate: int) -> int:
        """Number of samples per channel at another rate."""
        return (2 * self.frames * rate + self.rate) // (2 * self.rate)


def read_audio(data: bytes, limits: AudioSection, name: str = "audio") -> AudioInfo:
    """Format and length of an audio file. Only an MP3 is decoded, because its header may lack the length.

    Args:
        name: the request's field, for error messages.

    Raises:
        RequestError: the file is empty, too large, of an unknown format, has a damaged header, no samples, or is too
            long. Damage of the compressed samples is only found by `decode_audio`.
    """
    file, info = _open(data, limits, name)
    with file:
        if info.format == "MP3":
            info = replace(info, frames=sum(len(block) for block in _blocks(file, info, limits, name)))
    _check_length(info, limits, name)
    return info


def decode_audio(data: bytes, limits: AudioSection, rate: int, name: str = "audio") -> Samples:
    """Decode an audio file to the mean of its channels at `rate` Hz: fp32 [`AudioInfo.resampled(rate)`].

    Raises:
        RequestError: as `read_audio`, or the samples are truncated, damaged or not finite.
    """
    file, info = _open(data, limits, name)
    if info.format != "MP3":
        _check_length(info, limits, name)
    with file:
        samples: Samples = np.concatenate([np.empty(0, np.float32), *_blocks(file, info, limits, name)])
    if info.format != "MP3" and len(samples) < info.frames:
        found, announced = len(samples) / info.rate, info.frames / info.rate
        raise RequestError(f"{name} is a truncated {info.format} file: it has {found:.2f} s of {announced:.2f} s")
    info = replace(info, frames=len(samples))
    _check_length(info, limits, name)
    if not np.abs(samples).max() <= MAX_LEVEL:  # false for NaN too
        raise invalid(name, Verbatim("NaN, infinite or larger samples"), "audio with samples between -2^31 and 2^31")
    if info.rate == rate:
        return samples
    resampled = np.zeros(info.resampled(rate), np.float32)
    output = soxr.resample(samples, info.rate, rate)[: len(resampled)]  # its rounding of halves is undocumented
    resampled[: len(output)] = output
    return resampled


def media_hash(data: bytes, models: str) -> str:
    """The hash that identifies a clip in caches: hex SHA-256 of the file and of `models`, the digest of the encoder and
    the projector."""
    digest = hashlib.sha256(data)
    digest.update(f"speech:{models}".encode())
    return digest.hexdigest()


def _open(data: bytes, limits: AudioSection, name: str) -> tuple[soundfile.SoundFile, AudioInfo]:
    """Open a file after checking its limits; only the header is read."""
    kind = detect_format(data, MAGIC, accepted=ACCEPTED, limit=limits.max_audio_bytes, name=name)
    try:
        file = soundfile.SoundFile(io.BytesIO(data))
    except (soundfile.SoundFileError, RuntimeError, ValueError) as error:
        log.info("soundfile cannot read the header of a %s file: %s", kind, error)
        raise RequestError(f"{name} is a damaged {kind} file: its header cannot be read") from None
    info = AudioInfo(kind, file.samplerate, file.channels, file.frames)
    if MIN_RATE <= info.rate <= MAX_RATE and info.channels <= MAX_CHANNELS:
        return file, info
    file.close()
    if info.channels > MAX_CHANNELS:
        raise invalid(name, Verbatim(f"{info.channels} channels"), f"audio with at most {MAX_CHANNELS} channels")
    raise invalid(name, Verbatim(f"{info.rate} Hz"), f"audio with a sample rate between {MIN_RATE} and {MAX_RATE} Hz")


def _check_length(info: AudioInfo, limits: AudioSection, name: str) -> None:
    if info.frames > limits.max_audio_seconds * info.rate:
        got = Verbatim(f"{info.frames / info.rate:.1f} s or more")
        raise invalid(name, got, f"at most {limits.max_audio_seconds} s long")
    if info.frames < 1:
        raise invalid(name, Verbatim(f"a {info.format} file of 0 s"), "audio with at least one sample")


def _blocks(file: soundfile.SoundFile, info: AudioInfo, limits: AudioSection, name: str) -> Iterator[Samples]:
    """The mean of the channels in blocks, up to at most one block more than the longest accepted clip."""
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
        log.info("soundfile cannot decode the samples of a %s file: %s", info.format, error)
        raise RequestError(f"{name} is a damaged {info.format} file: its samples cannot be decoded") from None
