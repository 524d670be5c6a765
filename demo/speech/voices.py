"""Speech synthesis with Debian's espeak-ng (English and Mandarin) and flite (English). Some voices are held out.

    apt-get install --no-install-recommends espeak-ng flite

AUTOGLM_ESPEAK and AUTOGLM_FLITE are the paths of the programs if they are not on PATH.
"""

import io
import os
import random
import shutil
import subprocess
import wave
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from demo.elements import Split

RATE = 16_000
Samples = NDArray[np.int16]

# Variants of espeak-ng's speaker, without whispers, croaks and robots.
VARIANTS: dict[Split, tuple[str, ...]] = {
    "train": (
        *("", "f1", "f2", "f3", "f5", "m1", "m2", "m3", "m4", "m6", "m7", "Alex", "Alicia", "Andrea", "Andy"),
        *("Denis", "Diogo", "Gene", "Gene2", "Henrique", "Jacky", "Lee", "Marco", "Mario", "Michael", "Mr serious"),
        *("Nguyen", "RicishayMax", "RicishayMax2", "Storm", "adam", "announcer", "antonio", "aunty", "belinda"),
        *("benjamin", "boris", "david", "ed", "edward", "grandma", "gustave", "iven", "iven2", "iven4", "john"),
        *("kaukovalta", "klatt", "klatt2", "klatt4", "linda", "marcelo", "max", "michel", "miguel", "norbert"),
        *("pablo", "paul", "pedro", "rob", "sandro", "shelby", "steph", "steph2", "travis", "victor"),
    ),
    "test": (
        *("f4", "m5", "m8", "Annie", "Hugo", "Mike", "anika", "caleb", "grandpa", "iven3", "klatt3", "quincy"),
        *("robert", "steph3", "zac"),
    ),
}
ACCENTS: dict[str, dict[Split, tuple[str, ...]]] = {
    "en": {
        "train": ("en-us", "en-us", "en-gb", "en-gb-scotland", "en-gb-x-gbclan", "en-029"),
        "test": ("en-us", "en-gb", "en-gb-x-rp"),
    },
    # The voice "cmn" reads pinyin as English letters; this one pronounces it.
    "zh": {"train": ("cmn-latn-pinyin",), "test": ("cmn-latn-pinyin",)},
}
# The two most natural ones are twice as likely.
FLITE: dict[Split, tuple[str, ...]] = {"train": ("slt", "slt", "awb", "awb", "kal", "kal16"), "test": ("rms",)}
FLITE_SHARE: dict[Split, float] = {"train": 0.5, "test": 0.25}  # of English clips
# Corrections for espeak-ng, which reads each character separately: music, camera and photos, maps, application.
READINGS = {"音乐": "yin1yue4", "相": "xiang4", "地": "di4", "应": "ying4"}


class SynthesizerMissing(RuntimeError):
    """A synthesizer is not installed; the message has the apt-get command."""


@dataclass(frozen=True)
class Voice:
    """A speaker of a program, with a pace (1 is normal) and a pitch (0..1)."""

    program: Literal["espeak-ng", "flite"]
    name: str
    pace: float
    pitch: float

    @property
    def speaker(self) -> str:
        """The speaker without pace and pitch."""
        return f"{self.program} {self.name}"


def draw_voice(language: str, split: Split, rng: random.Random) -> Voice:
    pace, pitch = rng.uniform(0.8, 1.3), rng.random()
    if language == "en" and rng.random() < FLITE_SHARE[split]:
        return Voice("flite", rng.choice(FLITE[split]), pace, pitch)
    variant = rng.choice(VARIANTS[split])
    return Voice("espeak-ng", rng.choice(ACCENTS[language][split]) + f"+{variant}" * bool(variant), pace, pitch)


@cache
def program(name: str) -> str | None:
    """The path of a synthesizer; None if it is not installed."""
    return shutil.which(os.environ.get(f"AUTOGLM_{name.removesuffix('-ng').upper()}", name))


def require_synthesizers() -> None:
    """Raise SynthesizerMissing if one is not installed."""
    if absent := [name for name in ("espeak-ng", "flite") if program(name) is None]:
        raise SynthesizerMissing(f"not found: apt-get install --no-install-recommends {' '.join(absent)}")


def speak(text: str, voice: Voice) -> Samples:
    """Synthesize a clip at RATE, without silence at its ends."""
    for written, reading in READINGS.items():
        text = text.replace(written, reading)
    path = program(voice.program)
    if path is None:
        raise SynthesizerMissing(f"not found: apt-get install --no-install-recommends {voice.program}")
    if voice.program == "flite":
        settings = [f"duration_stretch={1 / voice.pace:.3f}", f"int_f0_target_mean={80 + 140 * voice.pitch:.0f}"]
        options = [option for setting in settings for option in ("--setf", setting)]
        command = [path, "-voice", voice.name, *options, "-t", text, "-o", "/dev/stdout"]
    else:
        speed, pitch = f"{165 * voice.pace:.0f}", f"{20 + 60 * voice.pitch:.0f}"
        command = [path, "-v", voice.name, "-s", speed, "-p", pitch, "--stdout", text]
    wav = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    with wave.open(io.BytesIO(wav)) as file:
        samples = np.frombuffer(wav[44:], np.int16)  # the header of a piped file lacks the length
        rate = file.getframerate()
    return trim(resample(samples, rate))


def resample(samples: Samples, rate: int) -> Samples:
    """Resample to RATE by truncating or zero-padding the spectrum."""
    if rate == RATE or not len(samples):
        return samples
    count = len(samples) * RATE // rate
    spectrum = np.fft.rfft(samples.astype(np.float64))
    resized = np.zeros(count // 2 + 1, np.complex128)
    resized[: len(spectrum)] = spectrum[: len(resized)]
    return np.clip(np.fft.irfft(resized, count) * (count / len(samples)), -32768, 32767).astype(np.int16)


def trim(samples: Samples) -> Samples:
    """Cut off both ends where samples are below a hundredth of the peak."""
    loud = np.flatnonzero(np.abs(samples.astype(np.int32)) * 100 > np.abs(samples.astype(np.int32)).max(initial=1))
    return samples[loud[0] : loud[-1] + 1] if len(loud) else samples[:0]
