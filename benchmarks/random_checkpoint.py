"""Write a checkpoint with the shape of AutoGLM-Phone-9B and random weights, for benchmarks.

    python -m benchmarks.random_checkpoint DIRECTORY

Takes 21 GB of disk. Token ids, limits and sizes are the published ones. The tokenizer has single bytes and the special
tokens only, so texts take more tokens than with the published one.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from autoglm.checkpoint import CLIP_MEAN, CLIP_STD, Checkpoint, TextConfig, VisionConfig
from autoglm.llm.model import LanguageModel
from autoglm.vision.vit import VisionTransformer
from autoglm.weights.reader import checkpoint_tensors
from demo.tokenizer import CHAT_TEMPLATE, SPECIAL, TAGS

FIRST_SPECIAL = 151329
CONFIG: dict[str, Any] = {
    "model_type": "glm4v",
    "architectures": ["Glm4vForConditionalGeneration"],
    "image_start_token_id": 151339, "image_end_token_id": 151340, "video_start_token_id": 151341,
    "video_end_token_id": 151342, "image_token_id": 151343, "video_token_id": 151344, "tie_word_embeddings": False,
    "text_config": {
        "model_type": "glm4v_text", "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 13696,
        "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 65536, "eos_token_id": [151329, 151336, 151338, 151348],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
                            "mrope_section": [8, 12, 12]},
    },
    "vision_config": {
        "model_type": "glm4v_vision", "depth": 24, "hidden_size": 1536, "num_heads": 12, "out_hidden_size": 4096,
        "intermediate_size": 13696, "image_size": 336, "patch_size": 14, "temporal_patch_size": 2,
        "spatial_merge_size": 2,
    },
}  # fmt: skip
PROCESSOR = {
    "size": {"shortest_edge": 12544, "longest_edge": 9633792}, "patch_size": 14, "temporal_patch_size": 2,
    "merge_size": 2, "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "image_processor_type": "Glm4vImageProcessor",
}  # fmt: skip
SHARD_BYTES = 4 << 30


def write(directory: Path, device: torch.device) -> None:
    """Write configuration, tokenizer and weights."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in {
        "config.json": CONFIG,
        "preprocessor_config.json": PROCESSOR,
        "generation_config.json": {"eos_token_id": CONFIG["text_config"]["eos_token_id"], "do_sample": False},
    }.items():
        (directory / name).write_text(json.dumps(content))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    make_tokenizer().save(str(directory / "tokenizer.json"))
    checkpoint = Checkpoint.open(directory)
    shard: dict[str, torch.Tensor] = {}
    names: dict[str, str] = {}
    index = 0
    for name, tensor in random_weights(checkpoint.text, checkpoint.vision, device):
        shard[name] = tensor
        names[name] = f"model-{index:05d}.safetensors"
        if sum(t.nbytes for t in shard.values()) > SHARD_BYTES:
            save_file(shard, directory / names[name])
            shard, index = {}, index + 1
    if shard:
        save_file(shard, directory / f"model-{index:05d}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def make_tokenizer() -> Tokenizer:
    """Single bytes at the first ids, GLM's special tokens at their published ids, unused names between them."""
    vocabulary = {text: index for index, text in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {f"unused{index}": index for index in range(len(vocabulary), FIRST_SPECIAL)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False) for text in TAGS])
    return tokenizer


def random_weights(text: TextConfig, vision: VisionConfig, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint by its published name, bfloat16, at a scale that keeps activations finite."""
    with torch.device("meta"):
        parts = {"model.visual.": VisionTransformer(vision), "model.language_model.": LanguageModel(text)}
    for prefix, module in parts.items():
        for name, tensor in checkpoint_tensors(module):
            full = name if name.startswith("lm_head") else prefix + name
            yield full, random_tensor(tensor.shape, full, device)


def random_tensor(shape: torch.Size, name: str, device: torch.device) -> torch.Tensor:
    if len(shape) == 1:
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        return (centre + 0.02 * torch.randn(shape, device=device)).bfloat16()
    return torch.randn(shape, device=device).mul_(shape[1:].numel() ** -0.5).bfloat16()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path)
    write(parser.parse_args().directory, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
