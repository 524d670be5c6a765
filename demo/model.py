"""The demo model: its configuration, its initial weights, and its export as a Hugging Face directory."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

from autoglm.checkpoint import CLIP_MEAN, CLIP_STD, ImageLimits, TextConfig, VisionConfig
from autoglm.llm.model import LanguageModel
from autoglm.vision.vit import VisionTransformer
from autoglm.weights.reader import checkpoint_tensors
from demo import phrases, vocabulary
from demo.tokenizer import build_tokenizer, number_ids, save_tokenizer

MERGES = 1300
# In the image processor's unit, 2 * height * width; 329,280 is 210 visual tokens.
IMAGE_LIMITS = ImageLimits(
    min_pixels=12_544,
    max_pixels=329_280,
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    mean=CLIP_MEAN,
    std=CLIP_STD,
)


def tokenizer() -> Tokenizer:
    """Build the demo's tokenizer; deterministic."""
    return build_tokenizer(phrases.corpus(), MERGES)


def text_config(tok: Tokenizer) -> TextConfig:
    return TextConfig(
        vocab_size=math.ceil(tok.get_vocab_size() / 64) * 64,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        rope_theta=10000.0,
        rotary_dim=16,
        mrope_section=(2, 3, 3),
    )


def vision_config() -> VisionConfig:
    return VisionConfig(
        depth=6, hidden_size=224, num_heads=7, out_hidden_size=256, intermediate_size=640, image_size=336
    )


class DemoModel(nn.Module):
    """The ViT and the language model."""

    def __init__(self, text: TextConfig, vision: VisionConfig) -> None:
        super().__init__()
        self.visual = VisionTransformer(vision)
        self.language = LanguageModel(text)


def initialize(model: DemoModel, tok: Tokenizer, seed: int = 0) -> None:
    """Set the initial weights. Embeddings have unit scale, like the branches that the sandwich norms add to them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: torch.Tensor, std: float) -> None:
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            normal(module.weight, 1 / math.sqrt(module.weight[0].numel()))
            if module.bias is not None:
                module.bias.data.zero_()
    normal(model.visual.embeddings.position_embedding.weight, 0.5)
    for name, parameter in model.named_parameters():
        if name.endswith(("attn.proj.weight", "mlp.down_proj.weight")) and name.startswith("visual.blocks."):
            parameter.data.mul_(0.5)
        if name.endswith(("post_self_attn_layernorm.weight", "post_mlp_layernorm.weight")):
            parameter.data.fill_(0.5)
    model.visual.merger.down_proj.weight.data.mul_(2.0)
    table = torch.randn(model.language.embed_tokens.weight.shape, generator=generator)
    _similar_words(table, tok, generator)
    table[number_ids(tok)] = number_codes(table.shape[1], generator)
    model.language.embed_tokens.weight.data.copy_(table)
    # Input and output embeddings start out equal up to scale.
    head = model.language.get_parameter("lm_head.weight")
    head.data.copy_(table / table.shape[1] ** 0.5)


def number_codes(size: int, generator: torch.Generator) -> torch.Tensor:
    """Embeddings of the numbers 0..999, [1000, size], of unit scale.

    Three quarters of the dimensions are random Fourier features, which are similar for close numbers: coordinates are
    learnt as coordinates. The others are random: a number can be copied exactly.
    """
    num_waves = size * 3 // 8
    wavelengths = 3.0 * (300.0 / 3.0) ** torch.rand(num_waves, generator=generator)
    angles = torch.arange(1000)[:, None] / wavelengths + torch.rand(num_waves, generator=generator) * 2 * math.pi
    smooth = torch.cat((angles.cos(), angles.sin()), dim=1) * math.sqrt(2)
    return torch.cat((smooth, torch.randn(1000, size - 2 * num_waves, generator=generator)), dim=1)


def _similar_words(table: torch.Tensor, tok: Tokenizer, generator: torch.Generator) -> None:
    """Initialize each name in lower case or after a space close to the name itself."""
    for word in sorted({name for label in vocabulary.labels() for name in vocabulary.names_of(label)}):
        origins = tok.encode(word).ids
        for form in (" " + word, word.lower(), " " + word.lower()):
            ids = tok.encode(form).ids
            if form == word or len(ids) != len(origins):
                continue
            for near, origin in zip(ids, origins, strict=True):
                noise = torch.randn(table.shape[1], generator=generator)
                if near != origin:
                    table[near] = 0.9 * table[origin] + 0.436 * noise


def export(model: DemoModel, tok: Tokenizer, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a checkpoint directory for transformers and the server."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name if name.startswith("lm_head") else prefix + name: tensor.detach().to("cpu", dtype).contiguous()
        for prefix, part in (("model.visual.", model.visual), ("model.language_model.", model.language))
        for name, tensor in checkpoint_tensors(part)
        if isinstance(tensor, torch.Tensor)
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(tok, directory)
    for name, content in _config_files(model, tok, dtype).items():
        text = json.dumps(content, ensure_ascii=False, indent=2)
        (directory / name).write_text(text + "\n", encoding="utf-8")


def _config_files(model: DemoModel, tok: Tokenizer, dtype: torch.dtype) -> dict[str, dict[str, object]]:
    text, vision = model.language.config, model.visual.config
    pad = tok.token_to_id("<|endoftext|>")
    eos = [tok.token_to_id(name) for name in ("<|endoftext|>", "<|user|>", "<|observation|>", "</answer>")]
    dtype_name = str(dtype).removeprefix("torch.")
    shared = asdict(text)
    rotary, section, _ = (shared.pop(name) for name in ("rotary_dim", "mrope_section", "head_dim"))
    vision_settings = {"model_type": "glm4v_vision", **asdict(vision), "hidden_act": "silu", "attention_dropout": 0.0}
    vision_settings.pop("rope_theta")  # fixed in transformers
    theta, tied = shared.pop("rope_theta"), shared.pop("tie_word_embeddings")
    config = {
        "architectures": ["Glm4vForConditionalGeneration"],
        "model_type": "glm4v",
        "dtype": dtype_name,
        "tie_word_embeddings": tied,
        "image_start_token_id": tok.token_to_id("<|begin_of_image|>"),
        "image_end_token_id": tok.token_to_id("<|end_of_image|>"),
        "video_start_token_id": tok.token_to_id("<|begin_of_video|>"),
        "video_end_token_id": tok.token_to_id("<|end_of_video|>"),
        "image_token_id": tok.token_to_id("<|image|>"),
        "video_token_id": tok.token_to_id("<|video|>"),
        "text_config": {
            "model_type": "glm4v_text",
            **shared,
            "dtype": dtype_name,
            "hidden_act": "silu",
            "attention_bias": True,
            "attention_dropout": 0.0,
            "pad_token_id": pad,
            "eos_token_id": eos,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": theta,
                "partial_rotary_factor": rotary / text.head_dim,
                "mrope_section": list(section),
            },
        },
        "vision_config": vision_settings,
    }
    generation = {"do_sample": False, "eos_token_id": eos, "pad_token_id": pad}
    processor = {
        "image_processor_type": "Glm4vImageProcessor",
        "processor_class": "Glm4vProcessor",
        "size": {"shortest_edge": IMAGE_LIMITS.min_pixels, "longest_edge": IMAGE_LIMITS.max_pixels},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGE_LIMITS.mean),
        "image_std": list(IMAGE_LIMITS.std),
        "resample": 3,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    return {"config.json": config, "generation_config.json": generation, "preprocessor_config.json": processor}
