"""The base of the vision and speech encoders: files of many requests in, their features out."""

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

import torch

from autoglm.errors import ErrorCode, RequestError, Verbatim, invalid
from autoglm.media.feature_cache import FeatureCache

log = logging.getLogger(__name__)

FEATURE_DTYPE = torch.bfloat16  # of returned and cached features, whatever dtype an encoder computes in


class MediaFile(Protocol):
    """An encoded file, the hash that identifies its features, and the request's field, for error messages."""

    @property
    def data(self) -> bytes: ...
    @property
    def media_hash(self) -> str: ...
    @property
    def name(self) -> str: ...


class Decoded(Protocol):
    """A decoded file."""

    @property
    def key(self) -> str:
        """The cache key of its features."""


F = TypeVar("F", bound=MediaFile)
D = TypeVar("D", bound=Decoded)


class MediaEncoder(ABC, Generic[F, D]):
    """Decodes files in a thread pool and encodes them, across requests, in as few passes as their size limit allows.

    Features are cached: a cached file is not even decoded. Safe to call from several threads; a file that is requested
    concurrently is encoded once.
    """

    kind: str  # its name in error messages

    def __init__(self, device: torch.device, decode_threads: int) -> None:
        self.device = device
        self.cache = FeatureCache(device, 0)
        self._threads = ThreadPoolExecutor(decode_threads, "decode", self._enter_thread)
        self._lookahead = 2 * decode_threads  # files decoded ahead of the pass that is being filled

    def close(self) -> None:
        self._threads.shutdown()

    @abstractmethod
    def _cache_key(self, file: F) -> str: ...

    @abstractmethod
    def _media_hash(self, file: F) -> str:
        """The correct hash of the file."""

    @abstractmethod
    def _read(self, file: F) -> D:
        """Decode the file. Error messages omit its name, which is prepended later: several requests may share them."""

    @abstractmethod
    def _fits(self, group: Sequence[D], another: D) -> bool:
        """Whether one pass can take another file."""

    @abstractmethod
    def _features(self, group: list[D]) -> list[torch.Tensor]:
        """Run one pass; returns the features of each file, each in its own storage."""

    def _encode(self, requests: Sequence[Sequence[F]]) -> Iterator[tuple[int, list[torch.Tensor] | RequestError]]:
        """Yield the index of each request as soon as its last file is encoded, with the features of its files.

        The features are shared with the cache. If a file is unusable, its request gets the error of the first such
        file; other requests are not affected.
        """
        claimed: list[tuple[F, Future[torch.Tensor]]] = []
        pending: dict[int, list[Future[torch.Tensor]]] = {}
        try:
            for index, files in enumerate(requests):
                claims = [(file, *self.cache.claim(self._cache_key(file))) for file in files]
                pending[index] = [future for _, future, _ in claims]
                claimed += [(file, future) for file, future, is_mine in claims if is_mine]
            yield from _pop_done(requests, pending)
            for group in self._passes(self._decoded(file for file, _ in claimed)):
                self._run(group)
                yield from _pop_done(requests, pending)
        finally:  # resolve every claim whatever happens: other threads wait for them
            for file, future in claimed:
                if not future.done():
                    error = RequestError(f" could not be encoded: the {self.kind} failed", ErrorCode.INTERNAL)
                    self.cache.fail(self._cache_key(file), error)
        for index, futures in pending.items():  # these wait for other threads
            yield index, _collect(requests[index], futures)

    def _join(self, features: Sequence[torch.Tensor], size: int) -> torch.Tensor:
        """One request's features, [rows, size]: a copy, because callers may write to it and the cache is shared."""
        return torch.cat([torch.empty(0, size, dtype=FEATURE_DTYPE, device=self.device), *features])

    def _finish(self) -> None:
        """Wait for the features: another process, which does not know our streams, may read them."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _enter_thread(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # it is per thread, and Triton's kernels run on the current device

    def _decoded(self, files: Iterable[F]) -> Iterator[D]:
        """Yield the usable files in order; the claims of the others are resolved with their errors.

        The threads decode ahead of the consumer, by a bounded number of files.
        """
        jobs: deque[Future[D | None]] = deque()
        for file in files:
            jobs.append(self._threads.submit(self._decode, file))
            if len(jobs) > self._lookahead and (decoded := jobs.popleft().result()):
                yield decoded
        while jobs:
            if decoded := jobs.popleft().result():
                yield decoded

    def _decode(self, file: F) -> D | None:
        key = self._cache_key(file)
        try:
            # A direct caller may send a wrong hash: verify it before caching, or it would poison the cache.
            if self._media_hash(file) != file.media_hash:
                raise invalid("", Verbatim("another file's hash"), "sent with the hash that preprocess computes for it")
            return self._read(file)
        except RequestError as error:
            self.cache.fail(key, RequestError(error.message, error.code))
        except Exception as error:  # such as running out of memory: affects this file only
            log.exception("a file could not be decoded")
            message = f" could not be decoded: internal error ({type(error).__name__})"
            self.cache.fail(key, RequestError(message, ErrorCode.INTERNAL))
        return None

    def _passes(self, files: Iterable[D]) -> Iterator[list[D]]:
        """Split the files into passes; a file that exceeds the limit gets its own pass."""
        group: list[D] = []
        for file in files:
            if group and not self._fits(group, file):
                yield group
                group = []
            group.append(file)
        if group:
            yield group

    def _run(self, group: list[D]) -> None:
        """Run one pass and resolve the claims of its files."""
        try:
            features = self._features(group)
        except Exception as error:
            log.exception("a pass over %d files failed", len(group))
            message = f" could not be encoded: the {self.kind} failed ({type(error).__name__})"
            for file in group:
                self.cache.fail(file.key, RequestError(message, ErrorCode.INTERNAL))
        else:
            for file, part in zip(group, features, strict=True):
                self.cache.put(file.key, part)


def _pop_done(
    requests: Sequence[Sequence[F]], pending: dict[int, list[Future[torch.Tensor]]]
) -> Iterator[tuple[int, list[torch.Tensor] | RequestError]]:
    """Yield the requests that are done and remove them from `pending`."""
    for index in [index for index, futures in pending.items() if all(future.done() for future in futures)]:
        yield index, _collect(requests[index], pending.pop(index))


def _collect(files: Sequence[F], futures: Sequence[Future[torch.Tensor]]) -> list[torch.Tensor] | RequestError:
    features: list[torch.Tensor] = []
    for file, future in zip(files, futures, strict=True):
        # Not raised: the error and this frame would keep each other alive, with all they reference.
        error = future.exception()
        if isinstance(error, RequestError):
            return RequestError(file.name + error.message, error.code)
        features.append(future.result())
    return features
