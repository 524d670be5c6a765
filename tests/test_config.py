"""The configuration: what the shipped file says, what presets change, what is refused."""

from pathlib import Path

import pytest

from autoglm.config import Config, ConfigError, LayerQuantization, LayerSpecific, load_config

ROOT = Path(__file__).parents[1]


def test_shipped_file_is_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTOGLM_PRESET", raising=False)
    monkeypatch.delenv("AUTOGLM_OVERRIDES", raising=False)
    assert load_config(ROOT / "autoglm-config.yaml") == Config()


def test_environment_names_file_and_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, preset = tmp_path / "base.yaml", tmp_path / "preset.yaml"
    base.write_text("engine:\n  max_batch_size: 4\n  block_size: 32\nchat:\n")
    preset.write_text("engine: {max_batch_size: 1}\n")
    monkeypatch.setenv("AUTOGLM_CONFIG", str(base))
    monkeypatch.setenv("AUTOGLM_PRESET", str(preset))
    config = load_config()
    assert (config.engine.max_batch_size, config.engine.block_size, config.engine.max_queue_size) == (1, 32, 256)


def test_sections_in_sections_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, preset = tmp_path / "base.yaml", tmp_path / "preset.yaml"
    base.write_text("quantization: {layer_specific: {attention: {symmetric: false, group_size: 128}}}")
    preset.write_text("quantization: {layer_specific: {attention: {group_size: 0}, ffn: {symmetric: false}}}")
    monkeypatch.setenv("AUTOGLM_OVERRIDES", "quantization: {enabled: false, layer_specific: }\nmemory: {fraction: 1}")
    config = load_config(base, preset)
    layers = config.quantization.layer_specific
    assert layers == LayerSpecific(LayerQuantization(False, 0), LayerQuantization(False, 0))
    assert config.quantization.enabled is False
    assert config.memory.fraction == 1.0


def test_overrides_are_refused_by_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOGLM_OVERRIDES", "engine: {kv_cache_dtype: float5}")
    with pytest.raises(ConfigError, match=r"AUTOGLM_OVERRIDES: engine\.kv_cache_dtype is 'float5', allowed are auto"):
        load_config()


@pytest.mark.parametrize("preset", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_change_something(preset: Path) -> None:
    assert load_config(ROOT / "autoglm-config.yaml", preset) != Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("motor: {}", "motor is unknown, allowed are model, quantization, memory, weight_cache, chat"),
        ("engine: {blocksize: 3}", "engine.blocksize is unknown"),
        ("engine: {block_size: big}", "engine.block_size is 'big', expected a value of type int"),
        ("engine: {block_size: 0}", "engine.block_size is 0, it must be at least 1"),
        ("engine: {prefix_cache: 1}", "engine.prefix_cache is 1, expected a value of type bool"),
        ("engine: {kv_cache_mb: -1}", "engine.kv_cache_mb is -1, it must be at least 0"),
        ("memory: {fraction: 1.5}", "memory.fraction is 1.5, it must be from 0.05 to 1"),
        ("quantization: {enabled: 1}", "quantization.enabled is 1, allowed are auto, True, False"),
        ("quantization: {per_channel: false}", "quantization.per_channel is False, allowed are True"),
        (
            "quantization: {layer_specific: {ffn: {group_size: 64}}}",
            "quantization.layer_specific.ffn.group_size is 64, allowed are 0, 128",
        ),
        ("quantization: {calibration: {samples: many}}", "quantization.calibration.samples is 'many', expected"),
        ("engine: [1]", "engine is [1], expected a section"),
        ("model: {dtype: int3}", "model.dtype is 'int3', allowed are auto"),
        ("- a", "holds a list"),
        ("a: [", "is not YAML"),
    ],
)
def test_refusals(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_config(file)
    assert message in str(refused.value)
    assert str(file) in str(refused.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.yaml")
