"""What the encoders of images and of sound have in common: files of many requests in, their features out."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

import torch

from autoglm.errors import ErrorCode, Exact, RequestError, invalid
from autoglm.media.feature_cache import FeatureCache

log = logging.getLogger(__name__)

# Features are handed over and kept in this dtype, whatever an encoder computes in.
FEATURE_DTYPE = torch.bfloat16


class MediaFile(Protocol):
    """An encoded file, the identity of what is made of it, and the request's field that it came from."""

    @property
    def data(self) -> bytes: ...
    @property
    def hash(self) -> str: ...
    @property
    def name(self) -> str: ...


class Decoded(Protocol):
    """What a file holds, under its key in the cache."""

    @property
    def key(self) -> str: ...


F = TypeVar("F", bound=MediaFile)
D = TypeVar("D", bound=Decoded)


class MediaEncoder(ABC, Generic[F, D]):
    """Decodes in a pool of threads and encodes the files of all given requests in as few passes as the bound allows.

    What it has encoded it keeps, within bounds: a known file is not even decoded. May be called by several threads;
    a file that they bring at the same time is encoded once.
    """

    kind: str  # what it is called in messages

    def __init__(self, device: torch.device, decode_threads: int) -> None:
        self.device = device
        self.cache = FeatureCache(device, 0)
        self._threads = ThreadPoolExecutor(decode_threads, "decode", self._enter_thread)
        self._ahead = 2 * decode_threads  # files decoded beyond the pass that is being filled

    def close(self) -> None:
        self._threads.shutdown()

    @abstractmethod
    def _key(self, file: F) -> str:
        """Under which name the file's features are kept."""

    @abstractmethod
    def _identity(self, file: F) -> str:
        """What the file's hash must be."""

    @abstractmethod
    def _read(self, file: F) -> D:
        """Decode it. Messages of errors begin after the file's name: several requests may share them."""

    @abstractmethod
    def _fits(self, group: Sequence[D], another: D) -> bool:
        """Whether one pass may take a file more."""

    @abstractmethod
    def _features(self, group: list[D]) -> list[torch.Tensor]:
        """One pass: the features of each file, each in a storage of its own."""

    def _encode(self, requests: Sequence[Sequence[F]]) -> Iterator[tuple[int, list[torch.Tensor] | RequestError]]:
        """Which request, and the features of its files, shared with the cache; or the error of its first file that
        cannot be used, which other requests do not notice. Each as soon as its last file is computed."""
        claimed: list[tuple[F, Future[torch.Tensor]]] = []
        shares: dict[int, list[Future[torch.Tensor]]] = {}
        try:
            for index, files in enumerate(requests):
                claims = [(file, *self.cache.claim(self._key(file))) for file in files]
                shares[index] = [future for _, future, _ in claims]
                claimed += [(file, future) for file, future, is_mine in claims if is_mine]
            yield from _collect_done(requests, shares)
            for group in self._passes(self._decoded(file for file, _ in claimed)):
                self._run(group)
                yield from _collect_done(requests, shares)
        finally:  # whatever has happened, nobody may wait for ever
            for file, future in claimed:
                if not future.done():
                    self.cache.fail(self._key(file), RequestError(f": the {self.kind} failed", ErrorCode.INTERNAL))
        for index, futures in shares.items():  # of files that other threads encode
            yield index, _collect(requests[index], futures)

    def _join(self, features: Sequence[torch.Tensor], size: int) -> torch.Tensor:
        """One request's features one after another, in memory of their own: the cache's are handed to nobody who could
        write them. [rows, size]"""
        return torch.cat([torch.empty(0, size, dtype=FEATURE_DTYPE, device=self.device), *features])

    def _finish(self) -> None:
        """Wait for the features: they may go to another process, which knows no stream of ours."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _enter_thread(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # each thread has its own; Triton's kernels run on that

    def _decoded(self, files: Iterable[F]) -> Iterator[D]:
        """The files that can be used, in order; the others' claims are answered with the reason.

        Threads decode ahead of whoever takes them, but not further than memory is meant to be filled.
        """
        jobs: deque[Future[D | None]] = deque()
        for file in files:
            jobs.append(self._threads.submit(self._decode, file))
            if len(jobs) > self._ahead and (decoded := jobs.popleft().result()):
                yield decoded
        while jobs:
            if decoded := jobs.popleft().result():
                yield decoded

    def _decode(self, file: F) -> D | None:
        key = self._key(file)
        try:
            # Who calls an encoder by itself may say any hash. A false one finds what it names, but puts nothing there.
            if self._identity(file) != file.hash:
                raise invalid("", Exact("a hash that is not this file's"), "the SHA-256 that preprocess gives it")
            return self._read(file)
        except RequestError as error:
            self.cache.fail(key, RequestError(error.message, error.code))
        except Exception as error:  # such as a want of memory: this file's alone
            log.exception("a file could not be decoded")
            self.cache.fail(key, RequestError(f": could not be decoded: {error}", ErrorCode.INTERNAL))
        return None

    def _passes(self, files: Iterable[D]) -> Iterator[list[D]]:
        """Cut the files into runs that fit into one pass; one that does not fit at all goes alone."""
        group: list[D] = []
        for file in files:
            if group and not self._fits(group, file):
                yield group
                group = []
            group.append(file)
        if group:
            yield group

    def _run(self, group: list[D]) -> None:
        """One pass; it answers the claims of its files."""
        try:
            features = self._features(group)
        except Exception as error:
            log.exception("a pass over %d files failed", len(group))
            fault = RequestError(f": the {self.kind} failed: {error}", ErrorCode.INTERNAL)
            for file in group:
                self.cache.fail(file.key, fault)
        else:
            for file, part in zip(group, features, strict=True):
                self.cache.put(file.key, part)


def _collect_done(
    requests: Sequence[Sequence[F]], shares: dict[int, list[Future[torch.Tensor]]]
) -> Iterator[tuple[int, list[torch.Tensor] | RequestError]]:
    """What is done already; it is taken out of the shares."""
    for index in [index for index, futures in shares.items() if all(future.done() for future in futures)]:
        yield index, _collect(requests[index], shares.pop(index))


def _collect(files: Sequence[F], shares: Sequence[Future[torch.Tensor]]) -> list[torch.Tensor] | RequestError:
    found: list[torch.Tensor] = []
    for file, share in zip(files, shares, strict=True):
        # Not raised: an error would keep this frame alive, and the frame the error, with all that they hold.
        fault = share.exception()
        if isinstance(fault, RequestError):
            return RequestError(file.name + fault.message, fault.code)
        found.append(share.result())
    return found
