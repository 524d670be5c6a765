"""From token ids back to text, piece by piece."""

from pathlib import Path

from tokenizers import Tokenizer

# Part of the model's answers wherever a checkpoint has them as tokens. `</answer>` is not: it ends the answer.
VISIBLE_TAGS = ("<think>", "</think>", "<answer>")
HIDDEN_TAG = "</answer>"
LONGEST_CHARACTER = 8  # tokens that one character can take at the most, with a margin


class Vocabulary:
    """A checkpoint's tokenizer, and which of its tokens never show in an answer."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        added = self.tokenizer.get_added_tokens_decoder()
        self.hidden = frozenset(
            id_
            for id_, token in added.items()
            if (token.special and token.content not in VISIBLE_TAGS) or token.content == HIDDEN_TAG
        )

    def decode(self, token_ids: list[int]) -> str:
        """The text of some tokens, hidden ones left out."""
        shown = [id_ for id_ in token_ids if id_ not in self.hidden]
        return self.tokenizer.decode(shown, skip_special_tokens=False)


class Detokenizer:
    """Turns one answer's tokens into text as they come, never cutting a character in two."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._held: list[int] = []

    def add(self, token_id: int) -> str:
        """The text that is complete now; empty while a character is unfinished."""
        self._held.append(token_id)
        text = self.vocabulary.decode(self._held)
        if text.endswith("\ufffd") and len(self._held) < LONGEST_CHARACTER:
            return ""
        self._held.clear()
        return text

    def flush(self) -> str:
        """What is still held, unfinished characters as U+FFFD."""
        text = self.vocabulary.decode(self._held)
        self._held.clear()
        return text
