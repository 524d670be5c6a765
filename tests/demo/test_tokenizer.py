from pathlib import Path

import pytest
from tokenizers import Tokenizer

from demo import model as demo_model
from demo import phrases, vocabulary
from demo.tokenizer import SPECIAL, TAGS, number_ids


@pytest.fixture(scope="module")
def tokenizer(checkpoint_directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint_directory / "tokenizer.json"))


def test_the_committed_tokenizer_is_reproducible(tokenizer: Tokenizer) -> None:
    assert tokenizer.to_str() == demo_model.tokenizer().to_str()


@pytest.mark.parametrize(
    "text",
    [
        "打开设置",
        "  Tap\tthe\r\n\n button  ",
        '** Screen Info **\n\n{"current_app": "微信"}',
        "naïve café ÆØÅ ß 🙂👨‍👩‍👧 \u202e٣٤ ​",
        "0123456789 007 100000",
        '<think>“设置”在屏幕上，点击它。</think><answer>do(action="Tap", element=[517,233])</answer>',
    ],
)
def test_any_text_is_decoded_exactly(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_numbers_are_single_tokens(tokenizer: Tokenizer) -> None:
    assert len(set(number_ids(tokenizer))) == 1000
    for number in (0, 9, 10, 99, 100, 412, 533, 805, 999):
        ids = tokenizer.encode(f"[{number},{999 - number}]").ids
        assert [tokenizer.decode([i]) for i in ids] == ["[", str(number), ",", str(999 - number), "]"]


def test_special_tokens_are_in_the_order_of_glm(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.token_to_id(token) or 0 for token in (*SPECIAL, *TAGS)]
    assert ids == list(range(ids[0], ids[0] + len(ids)))
    assert ids[-1] == tokenizer.get_vocab_size() - 1
    added = tokenizer.get_added_tokens_decoder()
    assert [added[i].special for i in ids] == [True] * len(SPECIAL) + [False] * len(TAGS)


def test_labels_have_the_same_tokens_in_98_percent_of_phrases(tokenizer: Tokenizer) -> None:
    whole = []
    for label in vocabulary.labels():
        for language in vocabulary.LANGUAGES:
            name = vocabulary.name_of(label, language)
            forms = [tokenizer.encode(text).ids for text in (name, f" {name}")]
            for phrase in (*phrases.TAP[language], *phrases.OPEN[language]):
                ids = tokenizer.encode(phrase.format(name)).ids
                whole.append(any(ids[i : i + len(form)] == form for form in forms for i in range(len(ids))))
    assert len(whole) > 5000 and sum(whole) >= 0.98 * len(whole)
