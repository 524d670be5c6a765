"""Reads the configuration of a Hugging Face checkpoint of `Glm4vForConditionalGeneration`.

Everything that differs between checkpoints of this family (sizes, token ids, RoPE, limits, template, defaults) comes
from their own files. Older files (GLM-4.1V) and newer ones (transformers 5) use different keys; only this module reads
both layouts.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from autoglm.errors import shorten

# CLIP's statistics, which the whole family normalises images with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class CheckpointError(ValueError):
    """The directory is not a checkpoint that this server can run. The message names the file and the key."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Shape of the language model. The first `rotary_dim` of the `head_dim` dimensions are rotated."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    rotary_dim: int
    mrope_section: tuple[int, int, int]
    tie_word_embeddings: bool = False

    def shard(self, num_ranks: int) -> "TextConfig":
        """With the attention heads of one tensor-parallel rank; ranks share a key-value head if there are too few."""
        return replace(
            self,
            num_attention_heads=self.num_attention_heads // num_ranks,
            num_key_value_heads=max(1, self.num_key_value_heads // num_ranks),
        )


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Shape of the ViT. `out_hidden_size` is also the width of the blocks' MLP, `intermediate_size` the merger's."""

    depth: int
    hidden_size: int
    num_heads: int
    out_hidden_size: int
    intermediate_size: int
    image_size: int = 336
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """How images are resized and normalised. The pixel limits count both frames of an image: 2 * height * width."""

    min_pixels: int
    max_pixels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale_factor: float = 1 / 255
    resample: int = 3


@dataclass(frozen=True)
class BitsandbytesInt8:
    """The checkpoint's linear layers are in bitsandbytes' INT8 format.

    skipped: suffixes of the names of modules that stay in float.
    threshold: magnitude from which bitsandbytes computes input channels in float; 0 for never.
    """

    skipped: tuple[str, ...]
    threshold: float


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The configuration of a checkpoint directory. `autoglm.weights.reader` reads its tensors."""

    path: Path
    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    image_start_token_id: int
    image_end_token_id: int
    eos_token_ids: tuple[int, ...]
    image_limits: ImageLimits
    chat_template: str
    generation_defaults: dict[str, Any] = field(default_factory=dict)
    quantization: BitsandbytesInt8 | None = None

    @property
    def audio_token_id(self) -> int:
        """The placeholder of audio in prompts: the last id of the vocabulary, which is padded beyond the tokenizer's
        ids. `ChatRenderer` checks that the tokenizer does not use it."""
        return self.text.vocab_size - 1

    @classmethod
    def open(cls, directory: str | Path) -> "Checkpoint":
        """Read the configuration of a checkpoint directory.

        Raises:
            CheckpointError: a file or key is missing, or the model has another architecture.
        """
        path = Path(directory)
        config = read_json(path / "config.json")
        if (kind := config.get("model_type")) != "glm4v":
            raise CheckpointError(f"{path}/config.json: model_type must be glm4v (got {shorten(kind)})")
        defaults = read_json(path / "generation_config.json", required=False)
        return cls(
            path=path,
            text=_text_config(config),
            vision=_vision_config(config.get("vision_config", {})),
            image_token_id=_require(config, "image_token_id"),
            image_start_token_id=_require(config, "image_start_token_id"),
            image_end_token_id=_require(config, "image_end_token_id"),
            eos_token_ids=_eos_ids(config, defaults),
            image_limits=_image_limits(path),
            chat_template=_chat_template(path),
            generation_defaults=defaults,
            quantization=_quantization(config.get("quantization_config")),
        )

    @cached_property
    def shards(self) -> tuple[Path, ...]:
        """The safetensors files, sorted by name."""
        index = self.path / "model.safetensors.index.json"
        names = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
        missing = [name for name in names if not (self.path / name).is_file()]
        if missing:
            raise CheckpointError(f"{self.path}: weight files are missing: {', '.join(missing[:3])}")
        return tuple(self.path / name for name in names)


def read_json(path: Path, required: bool = True) -> dict[str, Any]:
    """Read a JSON object; empty if the file is missing and not required.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
    """
    if not path.is_file():
        if required:
            raise CheckpointError(f"{path} does not exist")
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise CheckpointError(f"{path} is not valid JSON") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must be a JSON object")
    return content


def _require(config: Mapping[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise CheckpointError(f"config.json: {key} is missing")
    return config[key]


def _text_config(config: dict[str, Any]) -> TextConfig:
    text = config.get("text_config") or config
    rope = dict(text.get("rope_scaling") or {})
    rope |= {key: text[key] for key in ("rope_theta", "partial_rotary_factor") if key in text}
    rope |= text.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise CheckpointError(f"config.json: rope_type must be default or mrope (got {shorten(kind)})")
    heads = _require(text, "num_attention_heads")
    head_dim = _require(text, "hidden_size") // heads
    rotary_dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    section = tuple(rope.get("mrope_section", (8, 12, 12)))
    if len(section) != 3 or sum(section) * 2 != rotary_dim:
        raise CheckpointError(
            f"config.json: mrope_section must be three numbers whose sum is {rotary_dim // 2}, "
            f"half of the {rotary_dim} rotated dimensions (got {list(section)})"
        )
    return TextConfig(
        vocab_size=_require(text, "vocab_size"),
        hidden_size=text["hidden_size"],
        intermediate_size=_require(text, "intermediate_size"),
        num_hidden_layers=_require(text, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=text.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rms_norm_eps=text.get("rms_norm_eps", 1e-5),
        max_position_embeddings=_require(text, "max_position_embeddings"),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        rotary_dim=rotary_dim,
        mrope_section=(section[0], section[1], section[2]),
        tie_word_embeddings=bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
    )


def _vision_config(vision: dict[str, Any]) -> VisionConfig:
    known = {key: vision[key] for key in VisionConfig.__dataclass_fields__ if vision.get(key) is not None}
    rope = vision.get("rope_parameters") or {}
    if "rope_theta" in rope:
        known["rope_theta"] = float(rope["rope_theta"])
    for key in ("depth", "hidden_size", "num_heads", "out_hidden_size", "intermediate_size"):
        if key not in known:
            raise CheckpointError(f"config.json: vision_config.{key} is missing")
    return VisionConfig(**known)


def _eos_ids(config: dict[str, Any], defaults: dict[str, Any]) -> tuple[int, ...]:
    """The ids of all tokens that end a turn, from generation_config.json and config.json together."""
    found: list[int] = []
    for source in (defaults, config, config.get("text_config") or {}):
        value = source.get("eos_token_id")
        found += value if isinstance(value, list) else [] if value is None else [value]
    if not found:
        raise CheckpointError("eos_token_id is missing from both generation_config.json and config.json")
    return tuple(dict.fromkeys(found))


def _image_limits(path: Path) -> ImageLimits:
    processor = read_json(path / "preprocessor_config.json", required=False)
    if not processor:
        processor = read_json(path / "processor_config.json").get("image_processor", {})
    size = processor.get("size") or {}
    if "shortest_edge" not in size or "longest_edge" not in size:
        raise CheckpointError(f"{path}: size.shortest_edge or size.longest_edge of the image processor is missing")
    mean = processor.get("image_mean", CLIP_MEAN)
    std = processor.get("image_std", CLIP_STD)
    return ImageLimits(
        min_pixels=int(size["shortest_edge"]),
        max_pixels=int(size["longest_edge"]),
        patch_size=int(processor.get("patch_size", 14)),
        temporal_patch_size=int(processor.get("temporal_patch_size", 2)),
        merge_size=int(processor.get("merge_size", 2)),
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        rescale_factor=float(processor.get("rescale_factor", 1 / 255)),
        resample=int(processor.get("resample", 3)),
    )


def _quantization(config: Mapping[str, Any] | None) -> BitsandbytesInt8 | None:
    if not config:
        return None
    if not config.get("load_in_8bit"):
        got = shorten(config.get("quant_method", "unnamed"))
        raise CheckpointError(f"config.json: quantization_config must be bitsandbytes with load_in_8bit (got {got})")
    skipped = config.get("llm_int8_skip_modules") or ()
    return BitsandbytesInt8(tuple(skipped), float(config.get("llm_int8_threshold", 6.0)))


def _chat_template(path: Path) -> str:
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = read_json(path / "tokenizer_config.json", required=False).get("chat_template")
    if not isinstance(template, str):
        raise CheckpointError(f"{path}: the chat template is missing (chat_template.jinja or tokenizer_config.json)")
    return template
