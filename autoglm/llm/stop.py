"""Stop strings and stop tokens."""

from collections.abc import Collection, Iterable


class StopStrings:
    """Finds stop strings in streamed text, and holds back text that may turn out to be part of one."""

    def __init__(self, stops: Iterable[str]) -> None:
        self.stops = tuple(stops)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Add text; returns the text that can be emitted, and whether a stop string was found.

        The first stop string ends the text and is not emitted.
        """
        self._held += text
        found = [index for stop in self.stops if (index := self._held.find(stop)) >= 0]
        if found:
            text, self._held = self._held[: min(found)], ""
            return text, True
        end = len(self._held) - max((self._overlap(stop) for stop in self.stops), default=0)
        text, self._held = self._held[:end], self._held[end:]
        return text, False

    def flush(self) -> str:
        """The text that is still held back."""
        text, self._held = self._held, ""
        return text

    def _overlap(self, stop: str) -> int:
        """Length of the longest suffix of the held text that is a prefix of `stop`."""
        return next((n for n in range(min(len(stop) - 1, len(self._held)), 0, -1) if self._held.endswith(stop[:n])), 0)


def stop_token_ids(eos: Collection[int], extra: Collection[int], ignore_eos: bool) -> frozenset[int]:
    """The token ids that end an answer."""
    return frozenset(extra) if ignore_eos else frozenset(eos) | frozenset(extra)
