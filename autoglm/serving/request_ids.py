"""The ids of running requests."""

import itertools
import threading
from collections import defaultdict


class RequestIds:
    """Maps callers' ids to the engine's: callers choose theirs, and may use one for several requests."""

    def __init__(self) -> None:
        self._next = map(str, itertools.count())
        self._running: defaultdict[str, set[str]] = defaultdict(set)
        self._lock = threading.Lock()

    def add(self, caller_id: str) -> str:
        """A new request's id for the engine."""
        with self._lock:
            request_id = next(self._next)
            self._running[caller_id].add(request_id)
            return request_id

    def find(self, caller_id: str) -> list[str]:
        """The engine's ids of the running requests with this caller's id."""
        with self._lock:
            return list(self._running.get(caller_id, ()))

    def remove(self, caller_id: str, request_id: str) -> None:
        with self._lock:
            self._running[caller_id].discard(request_id)
            if not self._running[caller_id]:
                del self._running[caller_id]
