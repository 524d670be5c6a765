"""Spoken commands: synthesized in the background, stored on the device, and batched by length."""

import multiprocessing
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.pool import AsyncResult

import numpy as np
import torch

from demo.elements import Split
from demo.speech.commands import Command, commands
from demo.speech.rooms import ClipBatch, augment
from demo.speech.voices import RATE, Samples, Voice, draw_voice, require_synthesizers, speak

Job = tuple[Command, Voice]
CHUNK = 16_000  # clips synthesized together
TEMPO = 0.25  # largest change of the tempo in training


@dataclass(frozen=True)
class Clips:
    """Clip i is samples[starts[i] : starts[i] + lengths[i]], int16. Only the samples are on the device."""

    jobs: list[Job]
    samples: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor

    def to(self, device: torch.device) -> "Clips":
        return replace(self, samples=self.samples.to(device))

    @property
    def seconds(self) -> list[float]:
        return (self.lengths / RATE).tolist()  # type: ignore[no-any-return]

    def batch(self, indices: list[int], generator: torch.Generator) -> ClipBatch:
        """The clips of these indices, augmented; the generator is on the CPU."""
        device = self.samples.device
        lengths = self.lengths[indices]
        starts, ends = (t.to(device, non_blocking=True)[:, None] for t in (self.starts[indices], lengths))
        offsets = torch.arange(int(lengths.max()), device=device)[None]
        samples = self.samples[(starts + offsets).clamp(max=len(self.samples) - 1)]
        draw = float(torch.rand((), generator=generator))
        tempo = 1 + TEMPO * (2 * draw - 1)
        return augment(samples.float() * (offsets < ends) / 32768, lengths, generator, tempo)

    def batches(self, size: int, rng: random.Random) -> list[list[int]]:
        """Indices of batches of clips of similar length; each clip occurs at most once, a partial batch is dropped."""
        seconds = self.seconds
        order = sorted(range(len(self.jobs)), key=lambda i: seconds[i] * rng.uniform(0.9, 1.1))
        return [order[start : start + size] for start in range(0, len(order) - size + 1, size)]


Batch = tuple[Clips, list[int]]
Pending = tuple[list[Job], "AsyncResult[list[Samples]]"]


def jobs(count: int, split: Split, seed: int = 0) -> list[Job]:
    """Draw commands with their voices; deterministic."""
    rng = random.Random(f"voices/{split}/{seed}")
    return [(command, draw_voice(command.language, split, rng)) for command in commands(count, split, seed)]


def _synthesize(job: Job) -> Samples:
    return speak(job[0].text, job[1])


class SpeechCorpus:
    """Synthesizes clips in forked processes while training draws from those so far. Create it before CUDA is used."""

    def __init__(self, *, num_held_out: int, num_clips: int, workers: int) -> None:
        """Start synthesizing the held-out and the training clips.

        Raises:
            SynthesizerMissing: espeak-ng or flite is not installed.
        """
        require_synthesizers()
        self._pool = multiprocessing.get_context("fork").Pool(workers)
        self._held_out = self._start(num_held_out, "test", 0)
        self._chunks: list[Clips] = []
        self._num_remaining = num_clips
        self._start_chunk()

    def wait(self, device: torch.device) -> Clips:
        """Wait for the held-out clips, which are returned, and the first training clips."""
        self._device = device
        held_out = _clips(*self._held_out).to(device)
        self._add_chunk()
        return held_out

    def close(self) -> None:
        self._pool.terminate()

    @property
    def size(self) -> int:
        return sum(len(clips.jobs) for clips in self._chunks)

    def epoch(self, size: int, rng: random.Random) -> Iterator[Batch]:
        """Shuffled batches of clips of similar length over all clips that are done."""
        if self._pending is not None and self._pending[1].ready():
            self._add_chunk()
        batches = [(clips, indices) for clips in self._chunks for indices in clips.batches(size, rng)]
        rng.shuffle(batches)
        yield from batches

    def _start(self, count: int, split: Split, seed: int) -> Pending:
        pending = jobs(count, split, seed)
        return pending, self._pool.map_async(_synthesize, pending, chunksize=16)

    def _start_chunk(self) -> None:
        count = min(CHUNK, self._num_remaining)
        self._pending = self._start(count, "train", len(self._chunks)) if count else None
        self._num_remaining -= count

    def _add_chunk(self) -> None:
        assert self._pending is not None
        self._chunks.append(_clips(*self._pending).to(self._device))
        self._start_chunk()


def _clips(pending: list[Job], result: AsyncResult[list[Samples]]) -> Clips:
    clips = [(job, samples) for job, samples in zip(pending, result.get(), strict=True) if len(samples)]
    lengths = torch.tensor([len(samples) for _, samples in clips])
    flat = torch.from_numpy(np.concatenate([samples for _, samples in clips]))
    return Clips([job for job, _ in clips], flat, lengths.cumsum(0) - lengths, lengths)
