"""Error rates of transcripts: word error rate in English, character error rate in Chinese."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from demo.speech.commands import Command


def edit_distance(reference: Sequence[Any], hypothesis: Sequence[Any]) -> int:
    """Levenshtein distance."""
    row = list(range(len(hypothesis) + 1))
    for i, a in enumerate(reference, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(hypothesis, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def _units(text: str, language: str) -> list[str]:
    """Words or characters in lower case."""
    return text.lower().split() if language == "en" else list(text.lower().replace(" ", ""))


def error_rates(transcripts: Iterable[tuple[Command, str]]) -> dict[str, float]:
    """Language -> errors per word or character of the reference."""
    errors: dict[str, int] = defaultdict(int)
    lengths: dict[str, int] = defaultdict(int)
    for command, transcript in transcripts:
        reference, hypothesis = (_units(text, command.language) for text in (command.text, transcript))
        errors[command.language] += edit_distance(reference, hypothesis)
        lengths[command.language] += len(reference)
    return {language: errors[language] / lengths[language] for language in sorted(lengths)}
