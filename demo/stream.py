"""Worker processes that draw screens for ever, and the pool on the device that training samples from."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import random
import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from demo.elements import Split
from demo.records import GRIDS, Arrays, Layout, Writer

BLOCK = 32  # records in a block of shared memory


def _views(memory: Any, layout: Layout, count: int) -> Arrays:
    """Arrays for `count` records over raw shared memory."""
    arrays: Arrays = {}
    offset = 0
    for name, (shape, dtype) in layout.fields().items():
        items = count * int(np.prod(shape))
        array: NDArray[Any] = np.frombuffer(memory, dtype, items, offset)
        arrays[name] = array.reshape(count, *shape)
        offset += -(-array.nbytes // 64) * 64
    return arrays


def _bytes(layout: Layout, count: int) -> int:
    sizes = (count * int(np.prod(s)) * np.dtype(t).itemsize for s, t in layout.fields().values())
    return sum(-(-size // 64) * 64 for size in sizes)


def _grid_choice(rng: random.Random) -> int:
    return 0 if rng.random() < 0.72 else 1


def _work(writer: Writer, memories: list[Any], free: Any, ready: Any, first_seed: int, only_taps: Any) -> None:
    rng = random.Random(first_seed)
    seeds = itertools.count(first_seed)
    while True:
        slot = free.get()
        if slot is None:
            return
        which = _grid_choice(rng)
        arrays = _views(memories[slot], Layout(GRIDS[which]), BLOCK)
        for row in range(BLOCK):
            writer.write(arrays, row, next(seeds), "train", bool(only_taps.value), GRIDS[which])
        ready.put((slot, which))


class Stream:
    """Starts the workers (by fork: create it before CUDA) and keeps a pool of recent records per grid on the device."""

    def __init__(self, writer: Writer, workers: int, first_seed: int, capacity: int) -> None:
        context = multiprocessing.get_context("fork")
        size = max(_bytes(Layout(grid), BLOCK) for grid in GRIDS)
        self.memories = [context.RawArray(ctypes.c_uint8, size) for _ in range(3 * workers)]
        self.free, self.ready = context.Queue(), context.Queue()
        self.only_taps = context.Value(ctypes.c_bool, True)
        for slot in range(len(self.memories)):
            self.free.put(slot)
        self.workers = [
            context.Process(
                target=_work,
                args=(writer, self.memories, self.free, self.ready, first_seed + k * 10**9, self.only_taps),
                daemon=True,
            )
            for k in range(workers)
        ]
        for worker in self.workers:
            worker.start()
        self.capacity = capacity // BLOCK * BLOCK
        self.written = [0 for _ in GRIDS]
        self.pools: list[dict[str, torch.Tensor]] = []

    def open(self, device: torch.device) -> None:
        """Begin to move records to `device`."""
        for grid in GRIDS:
            arrays = Layout(grid).empty(1)
            self.pools.append(
                {
                    name: torch.empty((self.capacity, *a.shape[1:]), dtype=torch.from_numpy(a).dtype, device=device)
                    for name, a in arrays.items()
                }
            )
        threading.Thread(target=self._move, args=(device,), daemon=True).start()

    def _move(self, device: torch.device) -> None:
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        while True:
            slot, which = self.ready.get()
            arrays = _views(self.memories[slot], Layout(GRIDS[which]), BLOCK)
            start = self.written[which] % self.capacity
            with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
                for name, array in arrays.items():
                    self.pools[which][name][start : start + BLOCK].copy_(torch.from_numpy(array))
            if stream:
                stream.synchronize()
            self.written[which] += BLOCK
            self.free.put(slot)

    def sample(self, which: int, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """`count` records of grid number `which`, drawn at random from the pool."""
        filled = min(self.written[which], self.capacity)
        index = torch.randint(filled, (count,), generator=generator, device=generator.device)
        return {name: tensor[index] for name, tensor in self.pools[which].items()}

    def ready_for(self, count: int) -> bool:
        return min(self.written) >= count

    def close(self) -> None:
        for worker in self.workers:
            worker.terminate()


def _batch(job: tuple[Writer, int, Split, int, int]) -> Arrays:
    writer, which, split, first_seed, count = job
    arrays = Layout(GRIDS[which]).empty(count)
    for row in range(count):
        writer.write(arrays, row, first_seed + row, split, False, GRIDS[which])
    return arrays


def records(writer: Writer, which: int, split: Split, count: int, workers: int) -> dict[str, torch.Tensor]:
    """`count` records of one grid, made by a short-lived pool of processes (by fork: before CUDA)."""
    share = max(1, count // max(1, workers))
    jobs = [(writer, which, split, 1_000_000 * (k + 1), share) for k in range(count // share)]
    if workers <= 1:
        parts = [_batch(job) for job in jobs]
    else:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            parts = pool.map(_batch, jobs)
    return {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}
