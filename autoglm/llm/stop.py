"""When an answer ends, and which of its text may be shown already."""

from collections.abc import Collection, Iterable


class StopStrings:
    """Finds stop strings in growing text, and holds back what may yet become one."""

    def __init__(self, stops: Iterable[str]) -> None:
        self.stops = tuple(stops)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Take the next piece; returns the text that is safe to show, and whether a stop string was met.

        The first stop string in the text ends it and is not shown.
        """
        self._held += text
        found = [place for stop in self.stops if (place := self._held.find(stop)) >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        keep = max((self._overlap(stop) for stop in self.stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """What was held back for a stop string that did not come."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the text that begins `stop`."""
        return next((n for n in range(min(len(stop) - 1, len(self._held)), 0, -1) if self._held.endswith(stop[:n])), 0)


def stop_ids(eos: Collection[int], extra: Collection[int], ignore_eos: bool) -> frozenset[int]:
    """Token ids that end an answer."""
    return frozenset(extra) if ignore_eos else frozenset(eos) | frozenset(extra)
