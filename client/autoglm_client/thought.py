"""Separates the thought of an answer from its action."""

import re

_TAGGED_CALL = re.compile(r"<answer>\s*(?=(?:do|finish)\s*\()")
_BARE_CALL = re.compile(r"do\(\s*\w+\s*=|finish\(\s*(?:message\s*=|\))")
# Agents store their history with doubled tags: `<think><think>..</think>\n<answer></think><answer>do(..)`.
_LEADING = re.compile(r"^(?:\s|<think>)+")
_TRAILING = re.compile(r"(?:\s|</?think>|</?answer>)+$")
_TAG = re.compile(r"</?think>")
_END_OF_THOUGHT = re.compile(r"<answer>|do\(action=|finish\(message=")
_MARKERS = ("<think>", "</think>", "<answer>", "do(action=", "finish(message=")


def find_action(text: str) -> tuple[str, int | None]:
    """The thought without its tags, and the offset of `do(` or `finish(` (None: not found)."""
    tagged = _TAGGED_CALL.search(text)
    if tagged:
        return _clean(text[: tagged.start()]), tagged.end()
    bare = _BARE_CALL.search(text, text.rfind("</think>") + 1)
    if bare:
        return _clean(text[: bare.start()]), bare.start()
    return _clean(text.partition("<answer>")[0]), None


def _clean(thought: str) -> str:
    return _TRAILING.sub("", _LEADING.sub("", thought))


class ThoughtFilter:
    """Extracts the thought from the pieces of a streamed answer."""

    def __init__(self) -> None:
        self._text = ""
        self._shown = 0

    def feed(self, piece: str) -> str:
        """Add a piece; returns new text of the thought. Text that may begin a tag or a call is held back."""
        self._text += piece
        return self._newly_certain(len(self._text) - self._uncertain())

    def end(self) -> str:
        """End the answer; returns the text that was held back."""
        return self._newly_certain(len(self._text))

    def _newly_certain(self, length: int) -> str:
        end = _END_OF_THOUGHT.search(self._text)
        thought = _TAG.sub("", self._text[: end.start() if end else length]).strip()
        new = thought[self._shown :]
        self._shown = max(self._shown, len(thought))
        return new

    def _uncertain(self) -> int:
        """Length of the longest suffix of the text that is a prefix of a marker."""
        longest = min(len(self._text), max(map(len, _MARKERS)) - 1)
        return next((n for n in range(longest, 0, -1) if any(m.startswith(self._text[-n:]) for m in _MARKERS)), 0)
