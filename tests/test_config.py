"""The configuration: the shipped file, presets, overrides, descriptions and errors."""

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import pytest

from autoglm.config import Config, ConfigError, LayerQuantization, LayerSpecific, SparseMode, load_config

ROOT = Path(__file__).parents[1]


def test_shipped_file_is_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTOGLM_PRESET", raising=False)
    monkeypatch.delenv("AUTOGLM_OVERRIDES", raising=False)
    assert load_config(ROOT / "autoglm-config.yaml") == Config()


def sections(section: Any) -> list[Any]:
    nested = [getattr(section, each.name) for each in fields(section)]
    return [section, *(inner for each in nested if is_dataclass(each) for inner in sections(each))]


def test_every_key_has_a_description_of_one_line() -> None:
    for section in sections(Config()):
        for each in fields(section):
            doc = each.metadata["doc"]
            assert 5 < len(doc) < 130 and doc.splitlines() == [doc] and not doc.endswith("."), (section, each.name)


def test_the_environment_names_file_and_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, preset = tmp_path / "base.yaml", tmp_path / "preset.yaml"
    base.write_text("engine:\n  max_batch_size: 4\n  block_size: 32\nchat:\n")
    preset.write_text("engine: {max_batch_size: 1}\n")
    monkeypatch.setenv("AUTOGLM_CONFIG", str(base))
    monkeypatch.setenv("AUTOGLM_PRESET", str(preset))
    config = load_config()
    assert (config.engine.max_batch_size, config.engine.block_size, config.engine.max_queue_size) == (1, 32, 256)


def test_nested_sections_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, preset = tmp_path / "base.yaml", tmp_path / "preset.yaml"
    base.write_text("quantization: {layer_specific: {attention: {symmetric: false, group_size: 128}}}")
    preset.write_text("quantization: {layer_specific: {attention: {group_size: 0}, ffn: {symmetric: false}}}")
    monkeypatch.setenv("AUTOGLM_OVERRIDES", "quantization: {enabled: false, layer_specific: }\nmemory: {fraction: 1}")
    config = load_config(base, preset)
    layers = config.quantization.layer_specific
    assert layers == LayerSpecific(LayerQuantization(False, 0), LayerQuantization(False, 0))
    assert config.quantization.enabled is False
    assert config.memory.fraction == 1.0


def test_errors_of_overrides_name_their_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOGLM_OVERRIDES", "engine: {kv_cache_dtype: float5}")
    with pytest.raises(ConfigError) as caught:
        load_config()
    accepted = "auto, bfloat16, float32, float8, int8"
    assert str(caught.value) == (f"AUTOGLM_OVERRIDES: engine.kv_cache_dtype must be one of {accepted} (got 'float5')")


def test_an_unknown_sparse_mode_is_rejected_with_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides="sparse_attention: {mode: snap}")
    modes = ", ".join(get_args(SparseMode))
    assert str(caught.value).endswith(f"sparse_attention.mode must be one of {modes} (got 'snap')")
    assert load_config(overrides="sparse_attention: {mode: off}").sparse_attention.mode == "off"


@pytest.mark.parametrize("preset", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_change_something(preset: Path) -> None:
    assert load_config(ROOT / "autoglm-config.yaml", preset) != Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("motor: {}", ": motor is not a known key (accepted: model, quantization, memory, weight_cache, chat, limits,"),
        ("engine: {blocksize: 3}", ": engine.blocksize is not a known key (accepted: max_batch_size, "),
        ("engine: {block_size: big}", ": engine.block_size must be an integer (got 'big')"),
        ("engine: {block_size: 0}", ": engine.block_size must be at least 1 (got 0)"),
        ("engine: {block_size: }", ": engine.block_size must be an integer (got null)"),
        ("engine: {prefix_cache: 1}", ": engine.prefix_cache must be true or false (got 1)"),
        ("engine: {kv_cache_mb: -1}", ": engine.kv_cache_mb must be at least 0 (got -1)"),
        ("memory: {fraction: 1.5}", ": memory.fraction must be between 0.05 and 1 (got 1.5)"),
        ("memory: {fraction: 2}", ": memory.fraction must be between 0.05 and 1 (got 2)"),
        ("memory: {fraction: .inf}", ": memory.fraction must be between 0.05 and 1 (got Infinity)"),
        ("memory: {fraction: 2026-01-31}", ': memory.fraction must be a number (got "2026-01-31")'),
        ("memory: {fraction: &a [*a]}", ": memory.fraction must be a number (got [[["),
        ("quantization: {enabled: 1}", ": quantization.enabled must be one of auto, true, false (got 1)"),
        ("quantization: {per_channel: false}", ": quantization.per_channel must be true (got false)"),
        (
            "quantization: {layer_specific: {ffn: {group_size: 64}}}",
            ": quantization.layer_specific.ffn.group_size must be one of 0, 128 (got 64)",
        ),
        (
            "quantization: {calibration: {samples: many}}",
            ": quantization.calibration.samples must be an integer (got 'many')",
        ),
        ("engine: [1]", ": engine must be a section (got [1])"),
        ("vision: {warm_up: [[1, 2, 3]]}", ": vision.warm_up[0] must be a list of 2 elements (got [1, 2, 3])"),
        ("vision: {warm_up: 1}", ": vision.warm_up must be a list (got 1)"),
        ("model: {dtype: int3}", ": model.dtype must be one of auto, float32, bfloat16, float16 (got 'int3')"),
        ("- a", ' must be a mapping of sections (got ["a"])'),
        ("a: [", " is not valid YAML at line 1, column 5"),
    ],
)
def test_errors_name_the_file_and_the_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value).startswith(f"{file}{message}")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.yaml")
