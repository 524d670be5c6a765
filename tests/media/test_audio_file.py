"""Audio files: formats, rates, channels, limits and invalid files."""

import struct
import time
from dataclasses import replace

import numpy as np
import pytest

from autoglm.config import AudioSection
from autoglm.errors import RequestError
from autoglm.media.audio_file import decode_audio, read_audio
from tests.audio.speech_checkpoints import sound_file, tone
from tests.images import encode, picture

LIMITS = AudioSection()
RATE = 16000
FORMATS = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)]


def refused(data: bytes, limits: AudioSection = LIMITS) -> str:
    """The error of a file, from its header or from decoding it."""
    with pytest.raises(RequestError) as caught:
        read_audio(data, limits, "AUDIO[0]")
        decode_audio(data, limits, RATE, "AUDIO[0]")
    return caught.value.message


@pytest.mark.parametrize("format, subtype", FORMATS)
@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000, 96000])
def test_every_format_and_rate_decodes_to_the_same_samples(format: str, subtype: str | None, rate: int) -> None:
    if (subtype == "OPUS" and rate not in (8000, 16000, 48000)) or (format == "MP3" and rate == 96000):
        return  # not supported by these formats
    times = np.arange(rate + 17) / rate
    wave = (0.4 * np.sin(2 * np.pi * 440 * times)).astype(np.float32)
    data = sound_file(np.stack((wave, 0.5 * wave), axis=1), rate, format, subtype=subtype)
    info = read_audio(data, LIMITS)
    assert (info.format, info.rate, info.channels, info.frames) == (format, rate, 2, len(wave))
    samples = decode_audio(data, LIMITS, RATE)
    assert samples.dtype == np.float32 and len(samples) == info.resampled(RATE)
    expected = 0.3 * np.sin(2 * np.pi * 440 * np.arange(len(samples)) / RATE)
    middle = slice(1600, -1600)  # without the ends, where codecs differ
    assert np.abs(samples - expected)[middle].max() < (0.002 if format in ("WAV", "FLAC") else 0.05)


@pytest.mark.parametrize("samples", [1, 399, 12345])
@pytest.mark.parametrize("channels", [1, 6])
def test_short_files_and_many_channels(samples: int, channels: int) -> None:
    data = sound_file(np.tile(tone(1)[:samples, None], channels), 96000)
    assert len(decode_audio(data, LIMITS, RATE)) == read_audio(data, LIMITS).resampled(RATE)


def test_an_mp3_without_a_length_in_its_header_is_decoded_to_count_its_samples() -> None:
    samples = tone(3)
    samples[:RATE] = 0  # a low bit rate at the start, from which the library would estimate a much longer clip
    whole = sound_file(samples, RATE, "MP3")
    headless = whole[whole.find(whole[:2], 4) :]  # without the first frame, which has the length
    info = read_audio(headless, LIMITS)
    assert info.frames == len(decode_audio(headless, LIMITS, RATE)) and abs(info.frames - 3 * RATE) < 3000
    message = refused(headless, replace(LIMITS, max_audio_seconds=2))
    assert message == "AUDIO[0] must be at most 2 s long (got 3.1 s or more)"


def with_samples(*values: float) -> bytes:
    samples = tone(0.5)
    samples[100 : 100 + len(values)] = values
    return sound_file(samples, subtype="FLOAT")


LONG = sound_file(np.zeros(600 * 8000, np.float32), 8000, "FLAC")
WHOLE = sound_file(tone(2))
WRONG_LENGTH = WHOLE[:40] + struct.pack("<I", 2**31) + WHOLE[44:]
REFUSED = {
    "empty": (b"", "AUDIO[0] must be a WAV, FLAC, OGG or MP3 file (got an empty file)"),
    "no samples": (
        sound_file(np.empty(0, np.float32)),
        "AUDIO[0] must be audio with at least one sample (got a WAV fi",
    ),
    "ten minutes": (LONG, "AUDIO[0] must be at most 60 s long (got 600.0 s or more)"),
    "a PNG": (encode(picture(8, 8)), "AUDIO[0] must be a WAV, FLAC, OGG or MP3 file (got a file that begins with"),
    "text": (b"hello, this is no audio", "AUDIO[0] must be a WAV, FLAC, OGG or MP3 file (got a file that begins with"),
    "NaN": (with_samples(float("nan")), "AUDIO[0] must be audio with samples between -2^31 and 2^31 (got NaN, inf"),
    "infinite": (
        with_samples(float("inf")),
        "AUDIO[0] must be audio with samples between -2^31 and 2^31 (got NaN, inf",
    ),
    "huge": (with_samples(1e38), "AUDIO[0] must be audio with samples between -2^31 and 2^31 (got NaN, inf"),
    "a low rate": (
        sound_file(tone(1), 1000),
        "AUDIO[0] must be audio with a sample rate between 4000 and 192000 Hz (got 1000 Hz)",
    ),
    "many channels": (
        sound_file(np.zeros((99, 40), np.float32)),
        "AUDIO[0] must be audio with at most 32 channels (got 40 channels)",
    ),
    "a truncated header": (WHOLE[:30], "AUDIO[0] is a damaged WAV file: its header cannot be read"),
    "a truncated FLAC": (
        sound_file(tone(2), format="FLAC")[:-20000],
        "AUDIO[0] is a damaged FLAC file: its samples cannot be decoded",
    ),
    "half an Ogg page": (
        sound_file(tone(2), format="OGG")[:100],
        "AUDIO[0] is a damaged OGG file: its header cannot be read",
    ),
    "an MP3 frame": (
        sound_file(tone(2), format="MP3")[:30],
        "AUDIO[0] is a damaged MP3 file: its header cannot be read",
    ),
    "junk after the magic": (b"ID3" + bytes(10_000), "AUDIO[0] is a damaged MP3 file: its header cannot be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_files_are_rejected_with_the_reason(name: str) -> None:
    data, message = REFUSED[name]
    begin = time.perf_counter()
    assert refused(data).startswith(message)
    assert time.perf_counter() - begin < 2


@pytest.mark.parametrize("format", ["WAV", "OGG", "MP3"])
def test_the_rest_of_a_truncated_file_is_decoded(format: str) -> None:
    whole = sound_file(tone(4), format=format)
    samples = decode_audio(whole[: len(whole) // 2], LIMITS, RATE)
    assert 0.5 * RATE < len(samples) < 3 * RATE


def test_a_wrong_length_in_the_header_is_ignored() -> None:
    assert len(decode_audio(WRONG_LENGTH, LIMITS, RATE)) == 2 * RATE


def test_the_number_of_bytes_is_limited() -> None:
    message = refused(WHOLE, replace(LIMITS, max_audio_bytes=1000))
    assert message == "AUDIO[0] must be at most 1000 bytes (got 64044 bytes)"
