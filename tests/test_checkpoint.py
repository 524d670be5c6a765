"""Reading valid and invalid checkpoint directories. tests/parity compares the models' results."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoglm.checkpoint import Checkpoint, CheckpointError
from autoglm.llm.loader import load_language_model
from autoglm.vision.vit import VisionTransformer
from tests.conftest import Pair

CPU = torch.device("cpu")


def test_the_configuration_comes_from_the_files(pair: Pair) -> None:
    checkpoint, config = pair.checkpoint, pair.reference.config
    assert checkpoint.text.rope_theta == pair.reference.config.text_config.rope_parameters["rope_theta"]
    assert checkpoint.text.rotary_dim * 2 == checkpoint.text.head_dim
    assert checkpoint.image_token_id == config.image_token_id
    assert list(checkpoint.eos_token_ids) == pair.reference.config.text_config.eos_token_id
    assert checkpoint.image_limits.max_pixels == 9633792
    assert "<|assistant|>" in checkpoint.chat_template
    assert checkpoint.vision.intermediate_size == config.vision_config.intermediate_size


@pytest.fixture
def copy(plain: Pair, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain.checkpoint.path, tmp_path / "copy"))


def change(name: str, edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        edit(content)
        (directory / name).write_text(json.dumps(content))

    return apply


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "config.json does not exist"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json must be a JSON object"),
        (lambda d: (d / "chat_template.jinja").unlink(), "the chat template is missing"),
        (change("config.json", lambda c: c.update(model_type="llama")), r"model_type must be glm4v \(got 'llama'\)"),
        (change("config.json", lambda c: c.pop("image_token_id")), "image_token_id is missing"),
        (change("config.json", lambda c: c["text_config"].pop("rope_parameters")), "mrope_section"),
        (change("config.json", lambda c: c["vision_config"].pop("depth")), "vision_config.depth"),
        (
            change("config.json", lambda c: c["text_config"]["rope_parameters"].update(rope_type="yarn")),
            r"rope_type must be default or mrope \(got 'yarn'\)",
        ),
        (change("processor_config.json", lambda c: c["image_processor"].pop("size")), "longest_edge"),
    ],
)
def test_invalid_configurations_are_rejected(copy: Path, edit: Callable[[Path], None], message: str) -> None:
    edit(copy)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(copy)


def test_invalid_weights_are_rejected(copy: Path) -> None:
    file = copy / "model.safetensors"
    whole = load_file(file)
    name = "model.language_model.layers.1.self_attn.k_proj.weight"

    def load(weights: dict[str, torch.Tensor]) -> None:
        save_file(weights, file)
        load_language_model(Checkpoint.open(copy), CPU, torch.float32)
        VisionTransformer.load(Checkpoint.open(copy), CPU, torch.float32)

    load(whole)
    with pytest.raises(CheckpointError, match="tensors are missing, the first is layers"):
        load({key: tensor for key, tensor in whole.items() if key != name})
    with pytest.raises(CheckpointError, match=r"unexpected tensor model\.visual\.extra"):
        load({**whole, "model.visual.extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"must have shape .* \(got "):
        load({**whole, name: whole[name][1:].clone()})
    file.unlink()
    with pytest.raises(CheckpointError, match="weight files are missing: model"):
        _ = Checkpoint.open(copy).shards


def test_tensors_may_have_different_dtypes(copy: Path) -> None:
    file = copy / "model.safetensors"
    mixed = {name: t.bfloat16() if t.dim() > 1 else t for name, t in load_file(file).items()}
    save_file(mixed, file)
    model = load_language_model(Checkpoint.open(copy), CPU, torch.float32)
    assert torch.equal(model.embed_tokens.weight, mixed["model.language_model.embed_tokens.weight"].float())
    assert torch.equal(model.norm.weight, mixed["model.language_model.norm.weight"])
