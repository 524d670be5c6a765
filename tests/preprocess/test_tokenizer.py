"""Incremental decoding never splits characters."""

from autoglm.preprocess.tokenizer import Detokenizer, Vocabulary
from tests.conftest import Pair


def test_pieces_form_the_text_without_splitting_characters(plain: Pair) -> None:
    vocabulary = Vocabulary(plain.checkpoint.path)
    text = 'do(action="Type", text="打开设置 👩‍👩‍👧 née naïve")\n'
    detokenizer = Detokenizer(vocabulary)
    pieces = [detokenizer.add(i) for i in vocabulary.tokenizer.encode(text, add_special_tokens=False).ids]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces  # while a character of several tokens is incomplete
    assert detokenizer.flush() == ""


def test_an_incomplete_character_is_flushed(plain: Pair) -> None:
    vocabulary = Vocabulary(plain.checkpoint.path)
    detokenizer = Detokenizer(vocabulary)
    first = vocabulary.tokenizer.encode("👩", add_special_tokens=False).ids[0]
    assert detokenizer.add(first) == ""
    assert detokenizer.flush() == "\ufffd"


def test_invalid_bytes_are_not_held_back(plain: Pair) -> None:
    vocabulary = Vocabulary(plain.checkpoint.path)
    detokenizer = Detokenizer(vocabulary)
    first = vocabulary.tokenizer.encode("👩", add_special_tokens=False).ids[0]
    assert "".join(detokenizer.add(first) for _ in range(100)).count("\ufffd") > 80


def test_tags_are_shown_and_control_tokens_are_not(plain: Pair) -> None:
    vocabulary = Vocabulary(plain.checkpoint.path)
    tokens = ("<think>", "<|user|>", "</think>", "<answer>", "</answer>")
    ids = [vocabulary.tokenizer.token_to_id(token) or 0 for token in tokens]
    assert vocabulary.decode(ids) == "<think></think><answer>"
