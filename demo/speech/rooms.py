"""Augmentation of batches of synthesized clips on the device: tempo, room, microphone and noise."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from demo.speech.voices import RATE

REVERB = 2 * RATE // 5  # samples of a room's impulse response
MAX_SILENCE = 3 * RATE // 10  # at either end of a clip
PAD_TO = RATE // 2  # lengths are multiples: each distinct one needs a CUDA graph (demo.speech.graphs)


@dataclass(frozen=True)
class ClipBatch:
    """Inputs of the encoder."""

    samples: torch.Tensor  # [B, T], each clip of zero mean and unit variance, padded with zeros
    lengths: torch.Tensor  # [B], on the CPU


def augment(samples: torch.Tensor, lengths: torch.Tensor, generator: torch.Generator, tempo: float) -> ClipBatch:
    """Simulate recordings of clips by a phone.

    Args:
        samples: fp32 [B, T], padded with zeros.
        lengths: [B], in samples, on the CPU.
        generator: on the CPU, so that nothing waits for the device.
        tempo: factor of the speed and the pitch.
    """
    device, count = samples.device, samples.shape[0]
    noise_generator = torch.Generator(device).manual_seed(int(torch.randint(2**31, (), generator=generator)))

    def drawn(low: float, high: float, columns: int = 1) -> torch.Tensor:
        return low + (high - low) * torch.rand((count, columns), generator=generator)

    def uniform(low: float, high: float, columns: int = 1) -> torch.Tensor:
        return drawn(low, high, columns).to(device, non_blocking=True)

    def normal(columns: int) -> torch.Tensor:
        return torch.randn((count, columns), generator=noise_generator, device=device)

    samples = F.interpolate(samples[:, None], size=math.ceil(samples.shape[1] / tempo), mode="linear")[:, 0]
    lengths = (lengths / tempo).long()
    ends = lengths[:, None].to(device, non_blocking=True)
    silences = drawn(0.1, 1.0, 2).mul(MAX_SILENCE).long()  # [B, 2]: before and after
    before = silences[:, :1].to(device, non_blocking=True)
    total = samples.shape[1] + 2 * MAX_SILENCE
    indices = torch.arange(total, device=device)[None] - before
    inside = (indices >= 0) & (indices < ends)
    signal = samples.gather(1, indices.clamp(0, samples.shape[1] - 1)) * inside

    size = 2 ** math.ceil(math.log2(total + REVERB))
    frequencies = torch.linspace(0, 1, size // 2 + 1, device=device)[None]
    # The room's impulse response: a unit impulse, then decaying noise of -6 to -30 dB.
    time = torch.arange(REVERB, device=device)[None] / RATE
    echo = normal(REVERB) * torch.exp(-6.9 * time / uniform(0.05, 0.4))
    echo = echo / echo.square().sum(1, keepdim=True).sqrt() * 10 ** (-uniform(6, 30) / 20)
    echo[:, 0] += 1
    # The microphone's frequency response: -8 to 8 dB in eight interpolated bands.
    bands = F.interpolate(uniform(-8, 8, 8)[:, None], size=size // 2 + 1, mode="linear", align_corners=True)[:, 0]
    spectrum = torch.fft.rfft(signal, size) * torch.fft.rfft(echo, size) * 10 ** (bands / 20)
    signal = torch.fft.irfft(spectrum, size)[:, :total]

    white = torch.fft.rfft(normal(total), size)
    noise = torch.fft.irfft(white * (frequencies + 0.01) ** -uniform(0.0, 1.0), size)[:, :total]
    loudness = signal.square().sum(1, keepdim=True).div(ends.clamp(min=1)).sqrt()
    signal = signal + noise * loudness * 10 ** (-uniform(10, 40) / 20) / noise.square().mean(1, keepdim=True).sqrt()
    return normalize(signal, lengths + silences.sum(1))


def normalize(samples: torch.Tensor, lengths: torch.Tensor) -> ClipBatch:
    """Normalize clips as the checkpoint's preprocessor does, and pad them to PAD_TO; `lengths` [B] are on the CPU."""
    size = lengths[:, None].clamp(min=1).to(samples.device, non_blocking=True)
    own = torch.arange(samples.shape[1], device=samples.device)[None] < size
    samples = (samples - (samples * own).sum(1, keepdim=True) / size) * own
    samples = samples / (samples.square().sum(1, keepdim=True) / size + 1e-7).sqrt()
    longest = math.ceil(int(lengths.max()) / PAD_TO) * PAD_TO
    return ClipBatch(F.pad(samples, (0, max(0, longest - samples.shape[1])))[:, :longest], lengths)
