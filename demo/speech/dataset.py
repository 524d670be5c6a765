"""Spoken commands: rendered by all cores at once, kept on the device, and drawn in batches of about equal length."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from demo.elements import Split
from demo.speech.commands import Command, commands
from demo.speech.rooms import Heard, listen
from demo.speech.voices import RATE, Samples, Voice, draw, require_synthesizers, speak

Job = tuple[Command, Voice]
TEMPO = 0.15  # faster or slower, at the most, in training


@dataclass(frozen=True)
class Clips:
    """Clip i is samples[starts[i] : starts[i] + lengths[i]], int16; everything but the samples is on the CPU."""

    jobs: list[Job]
    samples: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor

    def to(self, device: torch.device) -> Clips:
        return replace(self, samples=self.samples.to(device))

    @property
    def seconds(self) -> list[float]:
        return (self.lengths / RATE).tolist()  # type: ignore[no-any-return]

    def batch(self, index: list[int], generator: torch.Generator) -> Heard:
        """Clips as they are heard in some room at some tempo."""
        device = self.samples.device
        lengths, starts = self.lengths[index], self.starts[index].to(device)
        places = torch.arange(int(lengths.max()), device=device)[None]
        at = (starts[:, None] + places).clamp(max=len(self.samples) - 1)
        sound = self.samples[at].float() * (places < lengths.to(device)[:, None]) / 32768
        draw = torch.rand((), generator=generator, device=device)
        return listen(sound, lengths, generator, 1 + TEMPO * (2 * float(draw) - 1))

    def epoch(self, size: int, rng: random.Random) -> Iterator[list[int]]:
        """Indices of batches of `size`, of about equal length, that hold every clip once, but for a rest."""
        seconds = self.seconds
        order = sorted(range(len(self.jobs)), key=lambda i: seconds[i] * rng.uniform(0.9, 1.1))
        batches = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
        rng.shuffle(batches)
        yield from batches


def jobs(count: int, split: Split, seed: int = 0) -> list[Job]:
    """Commands with their speakers; the same every time."""
    rng = random.Random(f"voices/{split}/{seed}")
    return [(command, draw(command.language, split, rng)) for command in commands(count, split, seed)]


def _render(job: Job) -> Samples:
    return speak(job[0].text, job[1])


def render(count: int, split: Split, workers: int, seed: int = 0) -> Clips:
    """Have `count` commands spoken. Forks: call it before the device is touched.

    Raises:
        SynthesizerMissing: espeak-ng or flite is not there.
    """
    require_synthesizers()
    asked = jobs(count, split, seed)
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        spoken = pool.map(_render, asked, chunksize=16)
    kept = [(job, samples) for job, samples in zip(asked, spoken, strict=True) if len(samples)]
    lengths = torch.tensor([len(samples) for _, samples in kept])
    flat = torch.from_numpy(np.concatenate([samples for _, samples in kept]))
    return Clips([job for job, _ in kept], flat, lengths.cumsum(0) - lengths, lengths)
