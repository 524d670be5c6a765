"""Loading the language model: quantised from the checkpoint, from bitsandbytes files, and from the weight cache."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from autoglm.checkpoint import Checkpoint, CheckpointError
from autoglm.config import (
    CalibrationConfig,
    Config,
    ConfigError,
    LayerQuantization,
    LayerSpecific,
    QuantizationConfig,
    WeightCacheConfig,
)
from autoglm.llm.loader import LoadConfig, load_language_model
from autoglm.llm.model import LanguageModel
from autoglm.llm.prefill import prefill
from autoglm.quantization.bitsandbytes import BitsandbytesLinear
from autoglm.quantization.int8 import quantize
from autoglm.quantization.linear import Int8Linear, Linear
from autoglm.vision.vit import VisionTransformer
from autoglm.weights.cache import WeightCache
from tests.checkpoints import SHAPES, make_checkpoint
from tests.conftest import Pair

CPU = torch.device("cpu")
PREFIX = "model.language_model.layers.0."
GROUPED = QuantizationConfig(layer_specific=LayerSpecific(LayerQuantization(False, 0), LayerQuantization(True, 128)))


def loaded(checkpoint: Checkpoint, config: LoadConfig, dtype: torch.dtype = torch.float32) -> LanguageModel:
    return load_language_model(checkpoint, CPU, dtype, config)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def equal(first: nn.Module, second: nn.Module) -> bool:
    one, two = state(first), state(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_each_linear_is_quantised_as_configured_for_its_kind(pair: Pair) -> None:
    model = loaded(pair.checkpoint, LoadConfig(GROUPED))
    weights = pair.reference.state_dict()
    qkv = torch.cat([weights[f"{PREFIX}self_attn.{name}_proj.weight"] for name in "qkv"])
    attention, mlp = (model.get_submodule(f"layers.0.{name}") for name in ("self_attn", "mlp"))
    for layer, weight, settings in (
        (attention.qkv_proj, qkv, (False, False)),
        (attention.o_proj, weights[f"{PREFIX}self_attn.o_proj.weight"], (False, False)),
        (mlp.gate_up_proj, weights[f"{PREFIX}mlp.gate_up_proj.weight"], (True, True)),
        (mlp.down_proj, weights[f"{PREFIX}mlp.down_proj.weight"], (True, True)),
        (model.lm_head, weights["lm_head.weight"], (True, False)),
    ):
        assert isinstance(layer, Int8Linear)
        expected = quantize(weight, *settings)
        assert torch.equal(layer.weight.values, expected.values)
        assert torch.equal(layer.weight.scales, expected.scales)
        assert (layer.weight.offsets is None) == (expected.offsets is None)
    bias = torch.cat([weights[f"{PREFIX}self_attn.{name}_proj.bias"] for name in "qkv"])
    assert torch.equal(attention.qkv_proj.bias, bias)  # type: ignore[union-attr, arg-type]
    assert torch.equal(model.embed_tokens.weight, weights["model.language_model.embed_tokens.weight"])
    assert torch.equal(model.norm.weight, weights["model.language_model.norm.weight"])


def test_a_head_in_float_shares_a_tied_embedding(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, SHAPES["tied"])
    checkpoint = Checkpoint.open(tmp_path)
    model = loaded(checkpoint, LoadConfig(QuantizationConfig(head=False)))
    assert model.lm_head.weight is model.embed_tokens.weight
    quantised = loaded(checkpoint, LoadConfig(QuantizationConfig()))
    assert isinstance(quantised.lm_head, Int8Linear)
    assert torch.equal(quantised.lm_head.values, quantize(model.embed_tokens.weight).values)
    assert not isinstance(loaded(checkpoint, LoadConfig()).layers[0].mlp.down_proj, Int8Linear)  # type: ignore[union-attr]


def test_scales_are_float32_in_a_bfloat16_model() -> None:
    layer = Linear(8, 4, bias=True).to(torch.bfloat16).to_int8(symmetric=True, grouped=False)
    assert (layer.scales.dtype, layer.bias.dtype) == (torch.float32, torch.bfloat16)  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", ["plain", "tied"])
def test_the_weight_cache_returns_the_same_model(shape: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_checkpoint(tmp_path / "model", SHAPES[shape])
    checkpoint = Checkpoint.open(tmp_path / "model")
    config = LoadConfig(GROUPED, WeightCache(tmp_path / "cache", 10**9))
    caplog.set_level("INFO")
    first = loaded(checkpoint, config, torch.bfloat16)
    assert "loaded from the weight cache" not in caplog.text
    second = loaded(checkpoint, config, torch.bfloat16)
    assert "loaded from the weight cache" in caplog.text
    assert equal(first, second)
    assert len(config.cache.entries() if config.cache else []) == 1


def test_each_setting_that_changes_the_weights_has_its_own_cache_entry(plain: Pair, tmp_path: Path) -> None:
    cache = WeightCache(tmp_path / "cache", 10**9)
    directory = Path(shutil.copytree(plain.checkpoint.path, tmp_path / "model"))
    counts = []
    for settings, dtype in (
        (QuantizationConfig(), torch.float32),
        (QuantizationConfig(), torch.bfloat16),
        (QuantizationConfig(head=False), torch.float32),
        (GROUPED, torch.float32),
    ):
        loaded(Checkpoint.open(directory), LoadConfig(settings, cache), dtype)
        counts.append(len(cache.entries()))
    weights = load_file(directory / "model.safetensors")
    save_file(weights, directory / "model.safetensors")
    loaded(Checkpoint.open(directory), LoadConfig(QuantizationConfig(), cache))
    assert [*counts, len(cache.entries())] == [1, 2, 3, 4, 5]


def as_bitsandbytes(source: Path, target: Path, skipped: list[str] | None = None) -> Path:
    """Save a checkpoint as transformers does with load_in_8bit, including the vision encoder."""
    bnb = pytest.importorskip("bitsandbytes")
    shutil.copytree(source, target)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        tensors[name] = tensor
        linear = name.endswith("weight") and tensor.dim() == 2 and "embed" not in name and not name.startswith("lm_")
        if linear and not any(part in name for part in skipped or ()):
            values, scales, _ = bnb.functional.int8_vectorwise_quant(tensor.half())
            owner = name.removesuffix("weight")
            tensors |= {name: values, f"{owner}SCB": scales, f"{owner}weight_format": torch.tensor(0).byte()}
    save_file(tensors, target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {
        "load_in_8bit": True, "llm_int8_skip_modules": skipped, "llm_int8_threshold": 6.0,
        "quant_method": "bitsandbytes",
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_int8_weights_of_bitsandbytes_files_are_unchanged(plain: Pair, tmp_path: Path) -> None:
    directory = as_bitsandbytes(plain.checkpoint.path, tmp_path / "int8", skipped=["layers.1.mlp.down_proj"])
    checkpoint = Checkpoint.open(directory)
    tensors = load_file(directory / "model.safetensors")
    model = loaded(checkpoint, LoadConfig(GROUPED))
    qkv: Any = model.get_submodule("layers.0.self_attn.qkv_proj")
    names = [f"{PREFIX}self_attn.{name}_proj." for name in "qkv"]
    assert torch.equal(qkv.values, torch.cat([tensors[name + "weight"] for name in names]))
    assert torch.equal(qkv.scales[:, 0], torch.cat([tensors[name + "SCB"] for name in names]) / 127)
    assert isinstance(model.get_submodule("layers.0.mlp.down_proj"), Int8Linear)
    assert isinstance(model.get_submodule("layers.1.mlp.down_proj"), nn.Linear)
    # In a float model, and in the vision encoder, they are dequantised.
    float_qkv: Any = loaded(checkpoint, LoadConfig()).get_submodule("layers.0.self_attn.qkv_proj")
    assert torch.equal(float_qkv.weight, qkv.weight.dequantize())
    vision = VisionTransformer.load(checkpoint, CPU, torch.float32)
    projection, name = vision.merger.proj.weight, "model.visual.merger.proj."
    assert torch.allclose(projection, tensors[name + "weight"] * tensors[name + "SCB"].unsqueeze(1) / 127)


def test_invalid_bitsandbytes_files_are_rejected(plain: Pair, tmp_path: Path) -> None:
    directory = as_bitsandbytes(plain.checkpoint.path, tmp_path / "int8")
    tensors = load_file(directory / "model.safetensors")
    name = f"{PREFIX}mlp.down_proj"
    save_file(tensors | {f"{name}.weight_format": torch.tensor(2).byte()}, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name}\.weight_format must be 0, row-major \(got 2\)"):
        loaded(Checkpoint.open(directory), LoadConfig(QuantizationConfig()))
    tensors.pop(f"{name}.SCB")
    save_file(tensors, directory / "model.safetensors")
    message = rf"tensor {name}\.SCB, the scales of the int8 tensor {name}\.weight, is missing"
    with pytest.raises(CheckpointError, match=message):
        loaded(Checkpoint.open(directory), LoadConfig())
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (directory / "config.json").write_text(json.dumps(config))
    message = r"quantization_config must be bitsandbytes with load_in_8bit \(got 'awq'\)"
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(directory)


def test_rounding_equals_that_of_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(64, 96).half()
    values, scales, _ = bnb.functional.int8_vectorwise_quant(weight)
    ours = quantize(weight)
    assert torch.equal(ours.scales[:, 0], scales.float() / 127)
    # They may differ by one level at ties, or where a product is rounded differently.
    assert (ours.values.int() - values.int()).abs().max() <= 1
    assert (ours.values != values).float().mean() < 0.01


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_bitsandbytes_layers_compute_the_product_with_the_dequantised_weights(
    plain: Pair, threshold: float, tmp_path: Path
) -> None:
    directory = as_bitsandbytes(plain.checkpoint.path, tmp_path / "int8")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["llm_int8_threshold"] = threshold
    (directory / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.open(directory)
    model = loaded(checkpoint, LoadConfig(QuantizationConfig(backend="bitsandbytes")), torch.float32)
    layer = model.get_submodule("layers.0.self_attn.qkv_proj")
    assert isinstance(layer, BitsandbytesLinear)
    assert layer.bias is None
    own: Any = loaded(checkpoint, LoadConfig(QuantizationConfig())).get_submodule("layers.0.self_attn.qkv_proj")
    assert layer.weight.shape == own.weight.shape
    x = torch.randn(20, layer.weight.shape[1])
    x[:, 3] *= 4
    expected = x @ own.weight.dequantize().T + own.bias
    got = layer.weight(x)
    assert got.dtype == x.dtype
    assert (got - expected).norm() < 0.02 * expected.norm()


def test_both_int8_backends_are_close_to_the_float_model(plain: Pair) -> None:
    pytest.importorskip("bitsandbytes")
    float_model = load_language_model(plain.checkpoint, CPU, torch.float32)
    hidden, positions = torch.randn(12, 128), torch.arange(12, dtype=torch.int32).expand(3, -1)
    expected = float_model.logits(prefill(float_model, hidden.clone(), positions)[0])
    for backend in ("native", "bitsandbytes"):
        model = loaded(plain.checkpoint, LoadConfig(QuantizationConfig(backend=backend)))  # type: ignore[arg-type]
        logits = model.logits(prefill(model, hidden.clone(), positions)[0])
        assert 0 < (logits - expected).norm() < 0.05 * expected.norm()


def test_contradictory_settings_are_rejected() -> None:
    on: dict[str, Any] = {"enabled": True}
    asymmetric = LayerSpecific(ffn=LayerQuantization(symmetric=False))
    with pytest.raises(ConfigError, match="must be symmetric with group_size 0"):
        LoadConfig.from_config(
            Config(quantization=QuantizationConfig(**on, backend="bitsandbytes", layer_specific=asymmetric)), CPU
        )
    with pytest.raises(ConfigError, match=r"calibration\.dataset must name a file"):
        LoadConfig.from_config(
            Config(quantization=QuantizationConfig(**on, calibration=CalibrationConfig(smoothing=0.5))), CPU
        )


def test_the_load_config_follows_the_configuration() -> None:
    off = LoadConfig.from_config(Config(weight_cache=WeightCacheConfig(enabled=False)), CPU)
    assert off == LoadConfig()
    assert LoadConfig.from_config(Config(), torch.device("cuda")).quantization == QuantizationConfig()
    forced = Config(quantization=QuantizationConfig(enabled=True))
    assert LoadConfig.from_config(forced, CPU).quantization == forced.quantization


def test_missing_bitsandbytes_is_an_error(plain: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        loaded(plain.checkpoint, LoadConfig(QuantizationConfig(backend="bitsandbytes")))
