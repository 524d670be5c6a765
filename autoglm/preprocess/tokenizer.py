"""Encodes plain text to token ids, and decodes token ids incrementally."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

# Shown in answers even where they are special tokens. `</answer>` is not shown: it ends the answer.
VISIBLE_TAGS = ("<think>", "</think>", "<answer>")
HIDDEN_TAG = "</answer>"
MARK = "\ufdd0"  # a Unicode noncharacter
MAX_TOKENS_PER_CHARACTER = 8  # an upper bound


class PlainText:
    """Encodes the text of requests so that control tokens spelled out in it become ordinary characters.

    They are split in two by a mark, so that neither half is a token.

    Args:
        extra: control tokens that are not special tokens of the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, extra: Iterable[str] = ()) -> None:
        self.tokenizer = tokenizer
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        controls = (special | set(extra)) - {*VISIBLE_TAGS, HIDDEN_TAG}
        self._controls = re.compile("|".join(re.escape(text) for text in sorted(controls, key=len, reverse=True)))

    def mark(self, texts: Sequence[str], mark: str) -> list[str]:
        """Insert a mark, which must not occur in the texts, after the first character of every control token."""
        marked = [self._controls.sub(lambda match: match[0][:1] + mark + match[0][1:], text) for text in texts]
        if len(marked) > 1 and self._controls.search("".join(marked)):
            marked[1:] = [mark + text for text in marked[1:]]  # adjacent texts form a control token
        return marked

    def encode(self, text: str, mark: str) -> list[int]:
        """Ids of a marked text. Control tokens without a mark become tokens."""
        pieces = text.split(mark)
        return [id_ for piece in pieces for id_ in self.tokenizer.encode(piece, add_special_tokens=False).ids]


class Vocabulary:
    """A checkpoint's tokenizer. `hidden` are the tokens that are never part of an answer's text."""

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
        """Ids of a plain text; control tokens spelled out in it become ordinary characters."""
        (marked,) = self._plain_text.mark([text.replace(MARK, "")], MARK)
        return self._plain_text.encode(marked, MARK)

    def decode(self, token_ids: list[int]) -> str:
        """The text of tokens, without the hidden ones."""
        shown = [id_ for id_ in token_ids if id_ not in self.hidden]
        return self.tokenizer.decode(shown, skip_special_tokens=False)


class Detokenizer:
    """Decodes one answer's tokens incrementally, never splitting a character."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._pending: list[int] = []

    def add(self, token_id: int) -> str:
        """The text completed by this token; empty while a character is incomplete."""
        self._pending.append(token_id)
        text = self.vocabulary.decode(self._pending)
        if text.endswith("\ufffd") and len(self._pending) < MAX_TOKENS_PER_CHARACTER:
            return ""
        self._pending.clear()
        return text

    def flush(self) -> str:
        """The remaining text, with U+FFFD for an incomplete character."""
        text = self.vocabulary.decode(self._pending)
        self._pending.clear()
        return text
