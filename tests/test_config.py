"""The configuration: what the shipped file says, what presets change, what is refused."""

from pathlib import Path

import pytest

from autoglm.config import Config, ConfigError, load_config

ROOT = Path(__file__).parents[1]


def test_shipped_file_is_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTOGLM_PRESET", raising=False)
    assert load_config(ROOT / "autoglm-config.yaml") == Config()


def test_environment_names_file_and_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, preset = tmp_path / "base.yaml", tmp_path / "preset.yaml"
    base.write_text("engine:\n  max_batch_size: 4\n  block_size: 32\nchat:\n")
    preset.write_text("engine: {max_batch_size: 1}\n")
    monkeypatch.setenv("AUTOGLM_CONFIG", str(base))
    monkeypatch.setenv("AUTOGLM_PRESET", str(preset))
    config = load_config()
    assert (config.engine.max_batch_size, config.engine.block_size, config.engine.max_queue_size) == (1, 32, 256)


@pytest.mark.parametrize("preset", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_change_something(preset: Path) -> None:
    assert load_config(ROOT / "autoglm-config.yaml", preset) != Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("motor: {}", "motor is unknown, allowed are model, chat, limits, vision, engine"),
        ("engine: {blocksize: 3}", "engine.blocksize is unknown"),
        ("engine: {block_size: big}", "engine.block_size is 'big', expected a value of type int"),
        ("engine: {block_size: 0}", "engine.block_size is 0, it must be at least 1"),
        ("engine: {prefix_cache: 1}", "engine.prefix_cache is 1, expected a value of type bool"),
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
