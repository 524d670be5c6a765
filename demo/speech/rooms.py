"""Rooms, microphones, noise and tempo for clips that came out of a synthesizer, on the device and in whole batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from demo.speech.voices import RATE

REVERB = 2 * RATE // 5  # samples that a room rings at the most
SILENCE = 3 * RATE // 10  # around a clip, at either end, at the most
PAD_TO = RATE // 2  # few lengths: a GPU's passes are captured for each anew (demo.speech.graphs)


@dataclass(frozen=True)
class Heard:
    """What the encoder gets: clips [B, T] of zero mean and unit variance, zero behind their ends; their lengths [B], on
    the CPU."""

    clips: torch.Tensor
    lengths: torch.Tensor


def listen(clips: torch.Tensor, lengths: torch.Tensor, generator: torch.Generator, tempo: float) -> Heard:
    """Clips as a phone may hear them.

    Args:
        clips: fp32 [B, T], zero behind their ends.
        lengths: [B], in samples, on the CPU.
        generator: on the CPU, as nothing here waits for the device.
        tempo: played so many times as fast, and as high.
    """
    device, count = clips.device, clips.shape[0]
    hiss = torch.Generator(device).manual_seed(int(torch.randint(2**31, (), generator=generator)))

    def drawn(low: float, high: float, columns: int = 1) -> torch.Tensor:
        return low + (high - low) * torch.rand((count, columns), generator=generator)

    def uniform(low: float, high: float, columns: int = 1) -> torch.Tensor:
        return drawn(low, high, columns).to(device, non_blocking=True)

    def normal(columns: int) -> torch.Tensor:
        return torch.randn((count, columns), generator=hiss, device=device)

    clips = F.interpolate(clips[:, None], size=math.ceil(clips.shape[1] / tempo), mode="linear")[:, 0]
    lengths = (lengths / tempo).long()
    spoken = lengths[:, None].to(device, non_blocking=True)
    silences = drawn(0.1, 1.0, 2).mul(SILENCE).long()  # [B, 2]: before and after
    before = silences[:, :1].to(device, non_blocking=True)
    total = clips.shape[1] + 2 * SILENCE
    at = torch.arange(total, device=device)[None] - before
    inside = (at >= 0) & (at < spoken)
    sound = clips.gather(1, at.clamp(0, clips.shape[1] - 1)) * inside

    size = 2 ** math.ceil(math.log2(total + REVERB))
    frequencies = torch.linspace(0, 1, size // 2 + 1, device=device)[None]
    # A room: the direct sound, then noise that dies away, between half as loud and next to nothing.
    time = torch.arange(REVERB, device=device)[None] / RATE
    echo = normal(REVERB) * torch.exp(-6.9 * time / uniform(0.05, 0.4))
    echo = echo / echo.square().sum(1, keepdim=True).sqrt() * 10 ** (-uniform(6, 30) / 20)
    echo[:, 0] += 1
    # A microphone: up to 8 dB more or less in eight bands that flow into each other.
    bands = F.interpolate(uniform(-8, 8, 8)[:, None], size=size // 2 + 1, mode="linear", align_corners=True)[:, 0]
    spectrum = torch.fft.rfft(sound, size) * torch.fft.rfft(echo, size) * 10 ** (bands / 20)
    sound = torch.fft.irfft(spectrum, size)[:, :total]

    white = torch.fft.rfft(normal(total), size)
    noise = torch.fft.irfft(white * (frequencies + 0.01) ** -uniform(0.0, 1.0), size)[:, :total]
    loudness = sound.square().sum(1, keepdim=True).div(spoken.clamp(min=1)).sqrt()
    sound = sound + noise * loudness * 10 ** (-uniform(10, 40) / 20) / noise.square().mean(1, keepdim=True).sqrt()
    return normalize(sound, lengths + silences.sum(1))


def normalize(sound: torch.Tensor, lengths: torch.Tensor) -> Heard:
    """Zero mean and unit variance over each clip's own samples, as the checkpoint's preprocessor wants it; `lengths`
    are on the CPU."""
    size = lengths[:, None].clamp(min=1).to(sound.device, non_blocking=True)
    own = torch.arange(sound.shape[1], device=sound.device)[None] < size
    sound = (sound - (sound * own).sum(1, keepdim=True) / size) * own
    sound = sound / (sound.square().sum(1, keepdim=True) / size + 1e-7).sqrt()
    longest = math.ceil(int(lengths.max()) / PAD_TO) * PAD_TO
    return Heard(F.pad(sound, (0, max(0, longest - sound.shape[1])))[:, :longest], lengths)
