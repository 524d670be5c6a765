"""Tensors in safetensors files, as fast as disk and bus allow: several threads read into pinned memory and copy on.

The format (huggingface/safetensors): the length of a JSON header in 8 bytes, the header, the tensors' bytes.
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
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
}


@dataclass(frozen=True)
class Piece:
    """Bytes of a file, and the place they belong to: uint8 [n], contiguous."""

    file: int
    offset: int
    target: torch.Tensor


def write_tensors(directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write shards of at most SHARD_BYTES (a larger tensor has one of its own).

    Raises:
        OSError: as when the disk is full.
    """
    shards: list[dict[str, torch.Tensor]] = []
    room = 0
    for name, tensor in tensors.items():
        if not shards or room < tensor.nbytes:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = tensor
        room -= tensor.nbytes
    for number, shard in enumerate(shards):
        try:
            save_file(shard, directory / f"{number:05d}.safetensors")
        except SafetensorError as error:
            raise OSError(str(error)) from None


def read_tensors(directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill every one of `tensors`, wherever it lies, with the tensor of its name.

    Raises:
        DamagedEntry: the files hold other tensors, or less than their headers say.
        OSError: a file cannot be read.
    """
    places: dict[str, tuple[int, int]] = {}
    handles: list[int] = []
    try:
        for path in sorted(directory.glob("*.safetensors")):
            handles.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            for name, offset in _read_header(handles[-1], path.name, tensors).items():
                places[name] = handles[-1], offset
        if missing := tensors.keys() - places.keys():
            raise DamagedEntry(f"{len(missing)} tensors are missing, one is {min(missing)}")
        pieces = []
        for name, (handle, offset) in places.items():
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
    """Where in the file each tensor begins; each must be as its target is."""
    try:
        length = int.from_bytes(os.pread(handle, 8, 0), "little")
        header = json.loads(os.pread(handle, min(length, os.fstat(handle).st_size), 8))
        places = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            target = tensors[name]
            start, end = entry["data_offsets"]
            same = DTYPES[entry["dtype"]] == target.dtype and entry["shape"] == list(target.shape)
            if not same or end - start != target.nbytes:
                raise DamagedEntry(f"{file}: {name} is {entry}, expected {target.dtype} {list(target.shape)}")
            places[name] = 8 + length + start
        return places
    except (ValueError, LookupError, TypeError, AttributeError):
        raise DamagedEntry(f"{file} has no header, or another one") from None


def _read_pieces(pieces: list[Piece]) -> None:
    staging = threading.local()
    devices = {piece.target.device for piece in pieces if piece.target.is_cuda}
    for device in devices:
        torch.cuda.synchronize(device)  # whoever had this memory before

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
    """Two pinned buffers of one thread: while one is copied to the GPU, the other is read into."""

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
            raise DamagedEntry("a file ends before its tensors do")
        done += count
