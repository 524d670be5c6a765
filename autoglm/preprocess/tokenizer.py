"""From text that is only text to token ids, and from token ids back to text, piece by piece."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

# Part of the model's answers wherever a checkpoint has them as tokens. `</answer>` is not: it ends the answer.
VISIBLE_TAGS = ("<think>", "</think>", "<answer>")
HIDDEN_TAG = "</answer>"
MARK = "\ufdd0"  # a noncharacter, which no text means to hold
LONGEST_CHARACTER = 8  # tokens that one character can take at the most, with a margin


class PlainText:
    """Encodes text of requests: control tokens that it spells out are cut in two, so that neither half is found as a
    token."""

    def __init__(self, tokenizer: Tokenizer, more: Iterable[str] = ()) -> None:
        """`more` are control tokens that the tokenizer does not call special."""
        self.tokenizer = tokenizer
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        controls = (special | set(more)) - {*VISIBLE_TAGS, HIDDEN_TAG}
        self._controls = re.compile("|".join(re.escape(text) for text in sorted(controls, key=len, reverse=True)))

    def mark(self, texts: Sequence[str], mark: str) -> list[str]:
        """The texts with a mark, which they do not hold, after the first character of every control token."""
        marked = [self._controls.sub(lambda match: match[0][:1] + mark + match[0][1:], text) for text in texts]
        if len(marked) > 1 and self._controls.search("".join(marked)):
            marked[1:] = [mark + text for text in marked[1:]]  # two texts spell a token together
        return marked

    def encode(self, text: str, mark: str) -> list[int]:
        """Ids of a text that is cut at its marks. Control tokens without a mark are taken for what they are."""
        pieces = text.split(mark)
        return [id_ for piece in pieces for id_ in self.tokenizer.encode(piece, add_special_tokens=False).ids]


class Vocabulary:
    """A checkpoint's tokenizer, and which of its tokens never show in an answer."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._plain_text = PlainText(self.tokenizer)
        added = self.tokenizer.get_added_tokens_decoder()
        self.hidden = frozenset(
            id_
            for id_, token in added.items()
            if (token.special and token.content not in VISIBLE_TAGS) or token.content == HIDDEN_TAG
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a text without control tokens: those that it spells out stay text."""
        (marked,) = self._plain_text.mark([text.replace(MARK, "")], MARK)
        return self._plain_text.encode(marked, MARK)

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
