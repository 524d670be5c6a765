"""Calibration: the recorded ranges, and smoothing, which changes the weights but not the model's output."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from autoglm.checkpoint import Checkpoint
from autoglm.config import CalibrationConfig, ConfigError, QuantizationConfig
from autoglm.llm.calibration import FP8_MAX, calibrate
from autoglm.llm.loader import PREFIXES, Calibrate, LoadConfig, load_language_model
from autoglm.llm.model import LanguageModel
from autoglm.llm.prefill import largest_pass, prefill
from autoglm.quantization.linear import Int8Linear
from autoglm.weights.cache import WeightCache
from autoglm.weights.reader import load_parameters, read_weights
from autoglm.weights.smoothing import Calibration
from tests.checkpoints import make_checkpoint
from tests.conftest import Pair

CPU = torch.device("cpu")
SAMPLES = [
    {"text": "open the settings page"},
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "screen.png"},
                                               {"type": "text", "text": "x"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "y"}]}]},
    {"messages": [{"role": "user", "content": "打开设置"}, {"role": "assistant", "content": "do(action)"}]},
]  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("samples")
    Image.effect_noise((140, 168), 60).convert("RGB").save(directory / "screen.png")
    path = directory / "samples.jsonl"
    path.write_text("\n".join(json.dumps(sample) for sample in SAMPLES) + "\n\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A checkpoint whose norms make some channels very large, as in large models."""
    directory = tmp_path_factory.mktemp("outliers")
    make_checkpoint(directory)
    weights = load_file(directory / "model.safetensors")
    for name, tensor in weights.items():
        if "language_model" in name and name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            tensor[::40] *= 50
    save_file(weights, directory / "model.safetensors")
    return Checkpoint.open(directory)


def config(dataset: Path, **more: Any) -> CalibrationConfig:
    return CalibrationConfig(dataset=str(dataset), **more)


def logits(model: LanguageModel, length: int = 40) -> torch.Tensor:
    torch.manual_seed(5)
    hidden = torch.randn(length, model.config.hidden_size)
    positions = torch.arange(length, dtype=torch.int32).expand(3, -1)
    return model.logits(prefill(model, hidden, positions)[0])


def test_smoothing_keeps_the_logits_and_shrinks_the_inputs(outliers: Checkpoint, dataset: Path) -> None:
    model = load_language_model(outliers, CPU, torch.float32)
    expected = logits(model)
    calibration = calibrate(model, outliers, config(dataset, smoothing=0.5))
    weights = ((name, calibration.smooth(name, tensor)) for name, tensor in _float_weights(outliers))
    smoothed = load_language_model(outliers, CPU, torch.float32)
    load_parameters(smoothed, weights, PREFIXES)
    down = "layers.1.mlp.down_proj.weight"
    assert not torch.equal(smoothed.get_parameter(down), model.get_parameter(down))
    assert (logits(smoothed) - expected).abs().max() < 1e-4
    rows = {row["name"]: row for row in calibration.report}
    for name in ("layers.0.self_attn.qkv_proj", "layers.1.mlp.gate_up_proj"):
        assert rows[name]["smoothed"] < 0.5 * rows[name]["largest"]
    assert rows["layers.0.self_attn.o_proj"]["smoothed"] == rows["layers.0.self_attn.o_proj"]["largest"]
    assert "layers.1.mlp.gate_up_proj" in calibration.table()


def _float_weights(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in read_weights(checkpoint, tuple(PREFIXES), CPU):
        assert isinstance(tensor, torch.Tensor)
        yield name, tensor


def test_smoothing_reduces_the_error_of_int8(outliers: Checkpoint, dataset: Path, tmp_path: Path) -> None:
    expected = logits(load_language_model(outliers, CPU, torch.float32))
    errors = []
    for smoothing in (0.0, 0.5):
        settings = QuantizationConfig(calibration=config(dataset, smoothing=smoothing))
        model, scales = _loaded(outliers, LoadConfig(settings))
        errors.append(float((logits(model) - expected).norm()))
        assert scales is not None
    assert errors[1] < 0.8 * errors[0]


def _loaded(
    checkpoint: Checkpoint, config: LoadConfig, calibrate: Calibrate = calibrate
) -> tuple[LanguageModel, torch.Tensor | None]:
    model = load_language_model(checkpoint, CPU, torch.float32, config, calibrate)
    return model, model.kv_scales


def test_scales_of_the_kv_cache_cover_the_recorded_range(plain: Pair, dataset: Path) -> None:
    model = load_language_model(plain.checkpoint, CPU, torch.float32)
    calibration = calibrate(model, plain.checkpoint, config(dataset))
    text = plain.checkpoint.text
    assert calibration.kv_scales.shape == (2, text.num_hidden_layers, text.num_key_value_heads)
    assert calibration.factors == {}
    rows = [row for row in calibration.report if "keys" in row]
    largest = torch.tensor([[row["keys"] for row in rows], [row["values"] for row in rows]])
    assert torch.allclose(calibration.kv_scales, largest / FP8_MAX)
    assert (largest > 0).all()
    few = calibrate(model, plain.checkpoint, config(dataset, samples=1))
    assert (few.kv_scales <= calibration.kv_scales).all()
    assert model.kernels is load_language_model(plain.checkpoint, CPU, torch.float32).kernels, "the recorder is removed"


def test_cached_weights_need_no_calibration(plain: Pair, dataset: Path, tmp_path: Path) -> None:
    settings = QuantizationConfig(calibration=config(dataset, smoothing=0.5))
    cache = WeightCache(tmp_path, 10**9)
    first, scales = _loaded(plain.checkpoint, LoadConfig(settings, cache))
    second, again = _loaded(plain.checkpoint, LoadConfig(settings, cache), calibrate=_unexpected)
    assert scales is not None
    assert again is not None
    assert torch.equal(scales, again)
    one, two = first.get_submodule("layers.0.mlp.down_proj"), second.get_submodule("layers.0.mlp.down_proj")
    assert isinstance(one, Int8Linear)
    assert isinstance(two, Int8Linear)
    assert torch.equal(one.values, two.values)
    (entry,) = cache.entries()
    assert json.loads((entry.path / "calibration.json").read_text())[0]["name"] == "layers.0.self_attn.qkv_proj"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "is empty"),
        ("[", "sample 1: must be JSON"),
        ("[1]", "sample 1: must be JSON"),
        ('{"image": 1}', 'sample 1: must be JSON, {"text": TEXT} or {"messages": MESSAGES}$'),
        ('{"messages": ["x"]}', "sample 1: must be JSON"),
        ('{"messages": [{"role": "user", "content": [{"type": "image", "image": "none.png"}]}]}', "No such file"),
        ('{"messages": [{"role": "king", "content": "x"}]}', "role"),
    ],
)
def test_invalid_samples_are_rejected(plain: Pair, tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text(line)
    model = load_language_model(plain.checkpoint, CPU, torch.float32)
    with pytest.raises(ConfigError, match=message) as rejected:
        calibrate(model, plain.checkpoint, config(file))
    assert str(file) in str(rejected.value)
    with pytest.raises(ConfigError, match="No such file"):
        calibrate(model, plain.checkpoint, config(tmp_path / "none.jsonl"))


def test_the_largest_pass_is_limited_by_the_context(plain: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_language_model(plain.checkpoint, CPU, torch.float32)
    lengths: list[int] = []

    def embed(ids: torch.Tensor) -> torch.Tensor:
        lengths.append(len(ids))
        return torch.zeros(len(ids), plain.checkpoint.text.hidden_size)

    monkeypatch.setattr(model, "embed", embed)
    monkeypatch.setattr("autoglm.llm.prefill.prefill", lambda model, hidden, positions: (hidden, None))
    largest_pass(model, 10**9, 8)
    assert lengths == [plain.checkpoint.text.max_position_embeddings]


def test_other_tensors_are_not_smoothed() -> None:
    calibration = Calibration({"layers.0.mlp.down_proj": torch.ones(4)}, torch.ones(2, 1, 1), [])
    bias = torch.ones(3)
    for name in ("model.language_model.layers.0.self_attn.q_proj.bias", "lm_head.weight"):
        assert calibration.smooth(name, bias) is bias


def _unexpected(model: LanguageModel, checkpoint: Checkpoint, config: CalibrationConfig) -> Calibration:
    pytest.fail("the calibration ran again")
