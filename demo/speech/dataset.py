"""Spoken commands: rendered in the background, kept on the device, and drawn in batches of about equal length."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.pool import AsyncResult

import numpy as np
import torch

from demo.elements import Split
from demo.speech.commands import Command, commands
from demo.speech.rooms import Heard, listen
from demo.speech.voices import RATE, Samples, Voice, draw, require_synthesizers, speak

Job = tuple[Command, Voice]
PORTION = 16_000  # clips that are spoken together
TEMPO = 0.25  # faster or slower, at the most, in training


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
        """Clips as they are heard in some room at some tempo; the generator is on the CPU."""
        device = self.samples.device
        lengths = self.lengths[index]
        starts, ends = (t.to(device, non_blocking=True)[:, None] for t in (self.starts[index], lengths))
        places = torch.arange(int(lengths.max()), device=device)[None]
        at = (starts + places).clamp(max=len(self.samples) - 1)
        sound = self.samples[at].float() * (places < ends) / 32768
        draw = float(torch.rand((), generator=generator))
        return listen(sound, lengths, generator, 1 + TEMPO * (2 * draw - 1))

    def batches(self, size: int, rng: random.Random) -> list[list[int]]:
        """Indices of batches of `size`, of about equal length, that hold every clip once, but for a rest."""
        seconds = self.seconds
        order = sorted(range(len(self.jobs)), key=lambda i: seconds[i] * rng.uniform(0.9, 1.1))
        return [order[start : start + size] for start in range(0, len(order) - size + 1, size)]


Batch = tuple[Clips, list[int]]
Coming = tuple[list[Job], "AsyncResult[list[Samples]]"]


def jobs(count: int, split: Split, seed: int = 0) -> list[Job]:
    """Commands with their speakers; the same every time."""
    rng = random.Random(f"voices/{split}/{seed}")
    return [(command, draw(command.language, split, rng)) for command in commands(count, split, seed)]


def _render(job: Job) -> Samples:
    return speak(job[0].text, job[1])


class Corpus:
    """Clips of held-out commands, and those for training, of which more and more are there. Forks: to be made before
    the device is touched."""

    def __init__(self, held_out: int, clips: int, workers: int) -> None:
        """Begin to have so many commands of either split spoken.

        Raises:
            SynthesizerMissing: espeak-ng or flite is not there.
        """
        require_synthesizers()
        self._pool = multiprocessing.get_context("fork").Pool(workers)
        self._held_out = self._ask(held_out, "test", 0)
        self._portions: list[Clips] = []
        self._missing = clips
        self._ask_for_more()

    def begin(self, device: torch.device) -> Clips:
        """Wait until training can begin; returns what is held out."""
        self._device = device
        held_out = _clips(*self._held_out).to(device)
        self._take_in()
        return held_out

    def close(self) -> None:
        self._pool.terminate()

    @property
    def size(self) -> int:
        return sum(len(clips.jobs) for clips in self._portions)

    def epoch(self, size: int, rng: random.Random) -> Iterator[Batch]:
        """Batches of `size`, of about equal length, that hold every clip that is there once, but for a rest."""
        if self._coming is not None and self._coming[1].ready():
            self._take_in()
        batches = [(clips, index) for clips in self._portions for index in clips.batches(size, rng)]
        rng.shuffle(batches)
        yield from batches

    def _ask(self, count: int, split: Split, seed: int) -> Coming:
        asked = jobs(count, split, seed)
        return asked, self._pool.map_async(_render, asked, chunksize=16)

    def _ask_for_more(self) -> None:
        count = min(PORTION, self._missing)
        self._coming = self._ask(count, "train", len(self._portions)) if count else None
        self._missing -= count

    def _take_in(self) -> None:
        assert self._coming is not None
        self._portions.append(_clips(*self._coming).to(self._device))
        self._ask_for_more()


def _clips(asked: list[Job], spoken: AsyncResult[list[Samples]]) -> Clips:
    kept = [(job, samples) for job, samples in zip(asked, spoken.get(), strict=True) if len(samples)]
    lengths = torch.tensor([len(samples) for _, samples in kept])
    flat = torch.from_numpy(np.concatenate([samples for _, samples in kept]))
    return Clips([job for job, _ in kept], flat, lengths.cumsum(0) - lengths, lengths)
