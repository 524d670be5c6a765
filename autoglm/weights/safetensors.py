"""Reads and writes safetensors files at the speed of the disk: threads read into pinned memory and copy to the GPU.

The format (huggingface/safetensors): the length of the JSON header in 8 bytes, the header, the bytes of the tensors.
"""

import json
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from autoglm.weights.cache import DamagedEntry

SHARD_BYTES = 2 * 10**9
PIECE_BYTES = 16 << 20
THREADS = 8
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8}


@dataclass(frozen=True)
class Piece:
    """Bytes of a file and their destination, contiguous uint8 [n]."""

    file: int
    offset: int
    target: torch.Tensor


def write_tensors(directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write shards of at most SHARD_BYTES; a larger tensor gets its own shard.

    Raises:
        OSError: a file cannot be written.
    """
    shards: list[dict[str, torch.Tensor]] = []
    free = 0  # bytes left in the last shard
    for name, tensor in tensors.items():
        if not shards or free < tensor.nbytes:
            shards.append({})
            free = SHARD_BYTES
        shards[-1][name] = tensor
        free -= tensor.nbytes
    for number, shard in enumerate(shards):
        try:
            save_file(shard, directory / f"{number:05d}.safetensors")
        except SafetensorError as error:
            raise OSError(str(error)) from None


def read_tensors(directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Read `tensors`, on any device, from the files of a directory.

    Raises:
        DamagedEntry: the files contain other tensors, or are truncated.
        OSError: a file cannot be read.
    """
    locations: dict[str, tuple[int, int]] = {}
    handles: list[int] = []
    try:
        for path in sorted(directory.glob("*.safetensors")):
            handles.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            for name, offset in _read_header(handles[-1], path.name, tensors).items():
                locations[name] = handles[-1], offset
        if missing := tensors.keys() - locations.keys():
            raise DamagedEntry(f"{len(missing)} tensors are missing, one of them is {min(missing)}")
        pieces = []
        for name, (handle, offset) in locations.items():
            flat = tensors[name].view(-1).view(torch.uint8)
            pieces += [
                Piece(handle, offset + start, flat[start : start + PIECE_BYTES])
                for start in range(0, len(flat), PIECE_BYTES)
            ]
        _read_pieces(pieces)
    finally:
        for handle in handles:
            os.close(handle)


def _read_header(handle: int, file: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The offset of each tensor in the file, after comparing it with its target."""
    try:
        length = int.from_bytes(os.pread(handle, 8, 0), "little")
        header = json.loads(os.pread(handle, min(length, os.fstat(handle).st_size), 8))
        offsets = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            target = tensors[name]
            start, end = entry["data_offsets"]
            matches = DTYPES[entry["dtype"]] == target.dtype and entry["shape"] == list(target.shape)
            if not matches or end - start != target.nbytes:
                raise DamagedEntry(f"{file}: {name} must be {target.dtype} {list(target.shape)} (got {entry})")
            offsets[name] = 8 + length + start
        return offsets
    except (ValueError, LookupError, TypeError, AttributeError):
        raise DamagedEntry(f"the header of {file} is damaged or lists other tensors") from None


def _read_pieces(pieces: list[Piece]) -> None:
    staging = threading.local()
    devices = {piece.target.device for piece in pieces if piece.target.is_cuda}
    for device in devices:
        torch.cuda.synchronize(device)  # earlier users of this memory

    def read(piece: Piece) -> None:
        if piece.target.device.type == "cpu":
            _read_into(piece.target, piece)
            return
        if not hasattr(staging, "stage"):
            staging.stage = _Stage(piece.target.device)
        staging.stage.copy(piece)

    with ThreadPoolExecutor(THREADS, "weights") as pool:
        for _ in pool.map(read, pieces):
            pass
    for device in devices:
        torch.cuda.synchronize(device)


class _Stage:
    """Two pinned buffers of one thread: the file is read into one while the other is copied to the GPU."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.buffers = [torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.copied = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]

    def copy(self, piece: Piece) -> None:
        self.buffers.reverse()
        self.copied.reverse()
        buffer = self.buffers[0][: len(piece.target)]
        self.copied[0].synchronize()
        _read_into(buffer, piece)
        with torch.cuda.stream(self.stream):
            piece.target.copy_(buffer, non_blocking=True)
            self.copied[0].record()


def _read_into(buffer: torch.Tensor, piece: Piece) -> None:
    view = buffer.numpy().data
    done = 0
    while done < len(view):
        count = os.preadv(piece.file, [view[done:]], piece.offset + done)
        if count == 0:
            raise DamagedEntry("a file is truncated")
        done += count
