"""Small random checkpoints of the real architecture, written by transformers in the published file layouts."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from demo.tokenizer import SPECIAL, TAGS

# Renders like GLM-4.1V's template.
TEMPLATE = """\
[gMASK]<sop>
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '<|user|>\\n' }}
{%- if message.content is string %}{{ message.content }}
{%- else %}{%- for item in message.content %}
{%- if item.type == 'image' or 'image' in item %}{{ '<|begin_of_image|><|image|><|end_of_image|>' }}
{%- elif item.type == 'text' %}{{ item.text }}
{%- endif %}{%- endfor %}{%- endif %}
{%- elif message.role == 'assistant' %}{{ '<|assistant|>\\n' + message.content }}
{%- elif message.role == 'system' %}{{ '<|system|>\\n' + message.content }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""


@dataclass(frozen=True)
class Shape:
    """The parameters in which the tests' checkpoints differ."""

    hidden: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    section: tuple[int, int, int] = (2, 3, 3)
    vision_hidden: int = 64
    vision_heads: int = 4
    vision_depth: int = 2
    rope_theta: float = 1e4
    ends_at_answer: bool = True  # `</answer>` is among the eos ids
    old_layout: bool = False
    shard_size: str = "5GB"
    tied: bool = False


SHAPES = {
    "plain": Shape(),
    "one-kv-head": Shape(hidden=96, heads=6, kv_heads=1, section=(1, 1, 2), layers=3),
    "no-grouping": Shape(heads=4, kv_heads=4, vision_hidden=96, vision_heads=3, vision_depth=3),
    "old-layout-sharded": Shape(old_layout=True, shard_size="700KB"),
    "like-4.6v-flash": Shape(rope_theta=5e5, ends_at_answer=False),
    "tied": Shape(tied=True),
}


def make_tokenizer(extra_text: tuple[str, ...] = ()) -> Tokenizer:
    """A byte-level BPE with GLM's special tokens in GLM's order; the four tags are not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    corpus = ['do(action="Tap", element=[517,233])', "open the settings page", "打开设置", *extra_text]
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False) for text in TAGS])
    return tokenizer


def make_checkpoint(directory: Path, shape: Shape = SHAPES["plain"], seed: int = 0) -> Any:
    """Write a random checkpoint and return the same model in transformers (fp32, eval)."""
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration, PreTrainedTokenizerFast

    tokenizer = make_tokenizer()
    ids: dict[str, int] = {text: tokenizer.token_to_id(text) or 0 for text in (*SPECIAL, *TAGS)}
    eos = [ids["<|endoftext|>"], ids["<|user|>"], ids["<|observation|>"]]
    if shape.ends_at_answer:
        eos.append(ids["</answer>"])
    config = Glm4vConfig(
        text_config={
            "vocab_size": 384, "hidden_size": shape.hidden, "intermediate_size": 2 * shape.hidden,
            "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads, "max_position_embeddings": 8192, "attention_bias": True,
            "eos_token_id": eos, "pad_token_id": ids["<|endoftext|>"],
            "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta, "partial_rotary_factor": 0.5,
                                "mrope_section": list(shape.section)},
        },
        vision_config={
            "depth": shape.vision_depth, "hidden_size": shape.vision_hidden, "num_heads": shape.vision_heads,
            "out_hidden_size": shape.hidden, "intermediate_size": 2 * shape.hidden, "image_size": 336,
            "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2,
        },
        image_token_id=ids["<|image|>"], image_start_token_id=ids["<|begin_of_image|>"],
        image_end_token_id=ids["<|end_of_image|>"], video_token_id=ids["<|video|>"],
        video_start_token_id=ids["<|begin_of_video|>"], video_end_token_id=ids["<|end_of_video|>"],
        tie_word_embeddings=shape.tied,
    )  # fmt: skip
    torch.manual_seed(seed)
    model: Any = Glm4vForConditionalGeneration(config)  # type: ignore[no-untyped-call]
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        # With transformers' std of 0.02 and norms of 1 all answers would be identical.
        spread = torch.randn(parameter.shape, generator=generator)
        embedding = "embed" in name and parameter.dim() == 2
        fan_in = 1 if embedding else parameter[0].numel()
        parameter.data = 1 + 0.2 * spread if "norm" in name and parameter.dim() == 1 else 0.8 * fan_in**-0.5 * spread
    if shape.tied:
        model.tie_weights()
    model.save_pretrained(directory, max_shard_size=shape.shard_size)
    fast: Any = PreTrainedTokenizerFast
    fast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|endoftext|>", padding_side="left"
    ).save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (directory / "generation_config.json").write_text(
        json.dumps({"eos_token_id": eos, "pad_token_id": eos[0], "do_sample": False}), encoding="utf-8"
    )
    _write_processor(directory, shape.old_layout)
    if shape.old_layout:
        _to_old_layout(directory / "config.json")
    return model


def _write_processor(directory: Path, old_layout: bool) -> None:
    processor = {
        "size": {"shortest_edge": 12544, "longest_edge": 9633792}, "patch_size": 14, "temporal_patch_size": 2,
        "merge_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711], "image_processor_type": "Glm4vImageProcessor",
    }  # fmt: skip
    name, content = ("preprocessor_config.json", processor) if old_layout else (
        "processor_config.json", {"image_processor": processor, "processor_class": "Glm4vProcessor"})  # fmt: skip
    (directory / name).write_text(json.dumps(content), encoding="utf-8")


def _to_old_layout(path: Path) -> None:
    """RoPE in the layout of GLM-4.1V-9B-Thinking: theta and factor outside of `rope_scaling`."""
    config = json.loads(path.read_text(encoding="utf-8"))
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"], text["partial_rotary_factor"] = rope["rope_theta"], rope["partial_rotary_factor"]
    text["rope_scaling"] = {"type": "default", "mrope_section": rope["mrope_section"]}
    path.write_text(json.dumps(config), encoding="utf-8")
