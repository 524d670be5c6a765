"""The demo's tokenizer: GLM-4's pre-tokenization and special tokens, with a small vocabulary."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = [
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>"),
]
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# As in GLM-4: a word includes one preceding character, digits are grouped by up to three.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
[gMASK]<sop>
{%- macro content(parts) -%}
  {%- if parts is string -%}
    {{- parts -}}
  {%- else -%}
    {%- for part in parts -%}
      {%- if part.type == 'image' or 'image' in part -%}
        <|begin_of_image|><|image|><|end_of_image|>
      {%- elif part.type == 'text' -%}
        {{- part.text -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
  {%- if message.role in ('system', 'user', 'assistant') -%}
    {{- '<|' + message.role + '|>\\n' + content(message.content) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|assistant|>\\n' -}}
{%- endif -%}
"""


def _splitter() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def build_tokenizer(corpus: list[str], merges: int) -> Tokenizer:
    """Byte-level BPE with one token for each number 0..999, at most `merges` merges learnt from `corpus`, and GLM-4's
    special tokens."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = _splitter()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + merges, initial_alphabet=alphabet, min_frequency=2, show_progress=False
    )
    learner.train_from_iterator(corpus, trainer)
    learnt = json.loads(learner.to_str())["model"]["merges"]
    # Both ways to build each three-digit number: it becomes one token whichever pair of digits is merged first.
    digits = [(str(n)[:-1], str(n)[-1]) for n in range(10, 1000)]
    digits += [(str(n)[0], str(n)[1:]) for n in range(100, 1000) if str(n)[1] != "0"]
    pairs = digits + [(left, right) for left, right in learnt if not (left + right).isdigit()]
    vocab = {token: index for index, token in enumerate(alphabet)}
    for left, right in pairs:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, pairs))
    tokenizer.pre_tokenizer = _splitter()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS])
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that the vocabulary has."""
    found: int | None = tokenizer.token_to_id(token)
    assert found is not None, token
    return found


def number_ids(tokenizer: Tokenizer) -> list[int]:
    """The token ids of the numbers 0..999."""
    return [token_id(tokenizer, str(n)) for n in range(1000)]


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": token in SPECIAL,
            }
            for token in (*SPECIAL, *TAGS)
        },
        "additional_special_tokens": SPECIAL[1:],
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 8192,
    }
    text = json.dumps(config, ensure_ascii=False, indent=2)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
