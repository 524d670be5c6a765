"""Error rates of transcripts: of words in English, of characters in Chinese."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from demo.speech.commands import Command


def distance(said: Sequence[Any], heard: Sequence[Any]) -> int:
    """Insertions, deletions and substitutions that turn one sequence into the other."""
    row = list(range(len(heard) + 1))
    for i, a in enumerate(said, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(heard, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def pieces(text: str, language: str) -> list[str]:
    """What is counted, whatever its case: words, or characters."""
    return text.lower().split() if language == "en" else list(text.lower().replace(" ", ""))


def error_rates(heard: Iterable[tuple[Command, str]]) -> dict[str, float]:
    """Language -> errors per word or character said."""
    wrong: dict[str, int] = {}
    count: dict[str, int] = {}
    for command, text in heard:
        said = pieces(command.text, command.language)
        wrong[command.language] = wrong.get(command.language, 0) + distance(said, pieces(text, command.language))
        count[command.language] = count.get(command.language, 0) + len(said)
    return {language: wrong[language] / count[language] for language in sorted(count)}
