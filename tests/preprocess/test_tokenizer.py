"""Text comes out whole, whichever way its tokens cut it."""

from autoglm.preprocess.tokenizer import Detokenizer, Vocabulary
from tests.conftest import Pair


def test_pieces_join_to_the_text_and_cut_no_character(plain: Pair) -> None:
    vocabulary = Vocabulary(plain.checkpoint.path)
    text = 'do(action="Type", text="打开设置 👩‍👩‍👧 née naïve")\n'
    detokenizer = Detokenizer(vocabulary)
    pieces = [detokenizer.add(i) for i in vocabulary.tokenizer.encode(text, add_special_tokens=False).ids]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces  # a character of several tokens was waited for
    assert detokenizer.flush() == ""


def test_unfinished_character_is_flushed(plain: Pair) -> None:
    vocabulary = Vocabulary(plain.checkpoint.path)
    detokenizer = Detokenizer(vocabulary)
    first = vocabulary.tokenizer.encode("👩", add_special_tokens=False).ids[0]
    assert detokenizer.add(first) == ""
    assert detokenizer.flush() == "\ufffd"


def test_endless_nonsense_does_not_pile_up(plain: Pair) -> None:
    vocabulary = Vocabulary(plain.checkpoint.path)
    detokenizer = Detokenizer(vocabulary)
    first = vocabulary.tokenizer.encode("👩", add_special_tokens=False).ids[0]
    assert "".join(detokenizer.add(first) for _ in range(100)).count("\ufffd") > 80


def test_tags_show_and_control_tokens_do_not(plain: Pair) -> None:
    vocabulary = Vocabulary(plain.checkpoint.path)
    tokens = ("<think>", "<|user|>", "</think>", "<answer>", "</answer>")
    ids = [vocabulary.tokenizer.token_to_id(token) or 0 for token in tokens]
    assert vocabulary.decode(ids) == "<think></think><answer>"
