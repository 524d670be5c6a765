"""Sound files: formats, rates, channels, limits, and everything that a caller may get wrong."""

import struct
import time
from dataclasses import replace

import numpy as np
import pytest

from autoglm.config import AudioSection
from autoglm.errors import RequestError
from autoglm.media.audio_file import decode_audio, decode_audio_url, read_audio
from tests.audio.speech_checkpoints import sound_file, tone
from tests.images import encode, picture

LIMITS = AudioSection()
RATE = 16000
FORMATS = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)]


def refused(data: bytes, limits: AudioSection = LIMITS) -> str:
    """Why a file is refused, by whoever looks at it first."""
    with pytest.raises(RequestError) as caught:
        read_audio(data, limits, "AUDIO[0]")
        decode_audio(data, limits, RATE, "AUDIO[0]")
    return caught.value.message


@pytest.mark.parametrize("format, subtype", FORMATS)
@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000, 96000])
def test_every_format_and_rate_gives_the_same_sound(format: str, subtype: str | None, rate: int) -> None:
    if (subtype == "OPUS" and rate not in (8000, 16000, 48000)) or (format == "MP3" and rate == 96000):
        return  # these formats have no such rate
    times = np.arange(rate + 17) / rate
    wave = (0.4 * np.sin(2 * np.pi * 440 * times)).astype(np.float32)
    data = sound_file(np.stack((wave, 0.5 * wave), axis=1), rate, format, subtype=subtype)
    info = read_audio(data, LIMITS)
    assert (info.format, info.rate, info.channels, info.frames) == (format, rate, 2, len(wave))
    samples = decode_audio(data, LIMITS, RATE)
    assert samples.dtype == np.float32 and len(samples) == info.resampled(RATE)
    expected = 0.3 * np.sin(2 * np.pi * 440 * np.arange(len(samples)) / RATE)
    middle = slice(1600, -1600)  # codecs differ at the ends
    assert np.abs(samples - expected)[middle].max() < (0.002 if format in ("WAV", "FLAC") else 0.05)


@pytest.mark.parametrize("samples", [1, 399, 12345])
@pytest.mark.parametrize("channels", [1, 6])
def test_short_files_and_many_channels(samples: int, channels: int) -> None:
    data = sound_file(np.tile(tone(1)[:samples, None], channels), 96000)
    assert len(decode_audio(data, LIMITS, RATE)) == read_audio(data, LIMITS).resampled(RATE)


def test_an_mp3_is_counted_where_its_header_does_not_say_how_long_it_is() -> None:
    samples = tone(3)
    samples[:RATE] = 0  # few bytes a second where the library looks, so that it takes the rest for much longer
    whole = sound_file(samples, RATE, "MP3")
    unsaid = whole[whole.find(whole[:2], 4) :]  # without the first frame, which holds the length
    info = read_audio(unsaid, LIMITS)
    assert info.frames == len(decode_audio(unsaid, LIMITS, RATE)) and abs(info.frames - 3 * RATE) < 3000
    assert "got 3.1 s or more; allowed: at most 2 s" in refused(unsaid, replace(LIMITS, max_audio_seconds=2))


def with_samples(*values: float) -> bytes:
    samples = tone(0.5)
    samples[100 : 100 + len(values)] = values
    return sound_file(samples, subtype="FLOAT")


LONG = sound_file(np.zeros(600 * 8000, np.float32), 8000, "FLAC")
WHOLE = sound_file(tone(2))
LYING = WHOLE[:40] + struct.pack("<I", 2**31) + WHOLE[44:]
REFUSED = {
    "empty": (b"", "AUDIO[0]: got an empty file; allowed: WAV, FLAC, OGG or MP3 files"),
    "no sound": (sound_file(np.empty(0, np.float32)), "AUDIO[0]: got a WAV file of 0 s"),
    "ten minutes": (LONG, "AUDIO[0]: got 600.0 s or more; allowed: at most 60 s per audio file"),
    "a PNG": (encode(picture(8, 8)), "AUDIO[0]: got a file that begins with"),
    "text": (b"hello, this is no sound", "AUDIO[0]: got a file that begins with"),
    "NaN": (with_samples(float("nan")), "AUDIO[0]: got samples that are NaN, infinite or beyond 2^31"),
    "infinite": (with_samples(float("inf")), "AUDIO[0]: got samples that are NaN, infinite or beyond 2^31"),
    "huge": (with_samples(1e38), "AUDIO[0]: got samples that are NaN, infinite or beyond 2^31"),
    "a slow rate": (sound_file(tone(1), 1000), "AUDIO[0]: got 1000 samples a second; allowed: from 4000 to 192000"),
    "many channels": (sound_file(np.zeros((99, 40), np.float32)), "AUDIO[0]: got 40 channels; allowed: at most 32"),
    "a truncated header": (WHOLE[:30], "AUDIO[0]: the header of this WAV cannot be read"),
    "a truncated FLAC": (sound_file(tone(2), format="FLAC")[:-20000], "AUDIO[0]: the samples of this FLAC cannot be"),
    "half an Ogg page": (sound_file(tone(2), format="OGG")[:100], "AUDIO[0]: the header of this OGG cannot be read"),
    "an MP3 frame": (sound_file(tone(2), format="MP3")[:30], "AUDIO[0]: the header of this MP3 cannot be read"),
    "junk behind the magic": (b"ID3" + bytes(10_000), "AUDIO[0]: the header of this MP3 cannot be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name: str) -> None:
    data, says = REFUSED[name]
    begin = time.perf_counter()
    assert refused(data).startswith(says)
    assert time.perf_counter() - begin < 2


@pytest.mark.parametrize("format", ["WAV", "OGG", "MP3"])
def test_what_is_left_of_a_truncated_file_is_heard(format: str) -> None:
    whole = sound_file(tone(4), format=format)
    samples = decode_audio(whole[: len(whole) // 2], LIMITS, RATE)
    assert 0.5 * RATE < len(samples) < 3 * RATE


def test_a_length_that_the_header_invents() -> None:
    assert len(decode_audio(LYING, LIMITS, RATE)) == 2 * RATE


def test_the_bytes_are_bounded() -> None:
    assert "got 64044 bytes; allowed: at most 1000 bytes" in refused(WHOLE, replace(LIMITS, max_audio_bytes=1000))


def test_data_urls() -> None:
    assert decode_audio_url("data:audio/webm;codecs=opus;base64,UklGRg==", LIMITS, "AUDIO[0]") == b"RIFF"
    for url in ("data:image/png;base64,UklGRg==", "https://x/y.wav", "data:audio/wav,UklGRg=="):
        with pytest.raises(RequestError, match=r"AUDIO\[0\]: got .*; allowed: a data URL"):
            decode_audio_url(url, LIMITS, "AUDIO[0]")
    with pytest.raises(RequestError, match=r"AUDIO\[0\]: got broken base64"):
        decode_audio_url("data:audio/wav;base64,&", LIMITS, "AUDIO[0]")
