"""Worker processes that draw screens, and the pool of records on the device that training samples from."""

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
from demo.records import GRIDS, Arrays, RecordSpec, RecordWriter

BLOCK = 32  # records in a block of shared memory
FIRST_GRID_SHARE = 0.72  # of screens with GRIDS[0]; the others have GRIDS[1]


def _views(memory: Any, spec: RecordSpec, count: int) -> Arrays:
    """Arrays of `count` records in shared memory, each aligned to 64 bytes."""
    arrays: Arrays = {}
    offset = 0
    for name, (shape, dtype) in spec.fields().items():
        items = count * int(np.prod(shape))
        array: NDArray[Any] = np.frombuffer(memory, dtype, items, offset)
        arrays[name] = array.reshape(count, *shape)
        offset += -(-array.nbytes // 64) * 64
    return arrays


def _bytes(spec: RecordSpec, count: int) -> int:
    sizes = (count * int(np.prod(s)) * np.dtype(t).itemsize for s, t in spec.fields().values())
    return sum(-(-size // 64) * 64 for size in sizes)


def _work(writer: RecordWriter, blocks: list[Any], free: Any, ready: Any, first_seed: int, only_taps: Any) -> None:
    """Fill the blocks whose indices are in `free`; the indices of filled ones go to `ready`."""
    rng = random.Random(first_seed)
    seeds = itertools.count(first_seed)
    while True:
        block = free.get()
        grid_index = 0 if rng.random() < FIRST_GRID_SHARE else 1
        grid = GRIDS[grid_index]
        arrays = _views(blocks[block], RecordSpec(grid), BLOCK)
        for row in range(BLOCK):
            writer.write(arrays, row, next(seeds), "train", only_taps=bool(only_taps.value), grid=grid)
        ready.put((block, grid_index))


class Stream:
    """Forks the workers and keeps a pool of recent records per grid on the device. Create it before CUDA is used."""

    def __init__(self, writer: RecordWriter, workers: int, first_seed: int, capacity: int) -> None:
        context = multiprocessing.get_context("fork")
        size = max(_bytes(RecordSpec(grid), BLOCK) for grid in GRIDS)
        self.blocks = [context.RawArray(ctypes.c_uint8, size) for _ in range(3 * workers)]
        self.free, self.ready = context.Queue(), context.Queue()
        self.only_taps = context.Value(ctypes.c_bool, True)
        for block in range(len(self.blocks)):
            self.free.put(block)
        self.workers = [
            context.Process(
                target=_work,
                args=(writer, self.blocks, self.free, self.ready, first_seed + k * 10**9, self.only_taps),
                daemon=True,
            )
            for k in range(workers)
        ]
        for worker in self.workers:
            worker.start()
        self.capacity = capacity // BLOCK * BLOCK
        self.written = [0 for _ in GRIDS]  # records so far
        self.pools: list[dict[str, torch.Tensor]] = []

    def open(self, device: torch.device) -> None:
        """Start moving records to a device."""
        for grid in GRIDS:
            arrays = RecordSpec(grid).empty(1)
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
            block, grid_index = self.ready.get()
            arrays = _views(self.blocks[block], RecordSpec(GRIDS[grid_index]), BLOCK)
            start = self.written[grid_index] % self.capacity
            with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
                for name, array in arrays.items():
                    self.pools[grid_index][name][start : start + BLOCK].copy_(torch.from_numpy(array))
            if stream:
                stream.synchronize()
            self.written[grid_index] += BLOCK
            self.free.put(block)

    def sample(self, grid_index: int, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Draw `count` records of one grid from the pool."""
        filled = min(self.written[grid_index], self.capacity)
        index = torch.randint(filled, (count,), generator=generator, device=generator.device)
        return {name: tensor[index] for name, tensor in self.pools[grid_index].items()}

    def ready_for(self, count: int) -> bool:
        return min(self.written) >= count

    def close(self) -> None:
        for worker in self.workers:
            worker.terminate()


def _batch(job: tuple[RecordWriter, int, Split, int, int]) -> Arrays:
    writer, grid_index, split, first_seed, count = job
    arrays = RecordSpec(GRIDS[grid_index]).empty(count)
    for row in range(count):
        writer.write(arrays, row, first_seed + row, split, only_taps=False, grid=GRIDS[grid_index])
    return arrays


def records(writer: RecordWriter, grid_index: int, split: Split, count: int, workers: int) -> dict[str, torch.Tensor]:
    """Create `count` records of one grid in forked processes; call it before CUDA is used."""
    share = max(1, count // max(1, workers))
    jobs = [(writer, grid_index, split, 1_000_000 * (k + 1), share) for k in range(count // share)]
    if workers <= 1:
        parts = [_batch(job) for job in jobs]
    else:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            parts = pool.map(_batch, jobs)
    return {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}
