from pathlib import Path

import pytest
import yaml

from autoglm.config import Config, load_config
from autoglm_launcher import ROOT

PRESETS = sorted((ROOT / "presets").glob("*.yaml"))


def test_there_are_three_presets() -> None:
    assert [path.stem for path in PRESETS] == ["edge", "latency", "throughput"]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_contains_only_values_that_differ(preset: Path) -> None:
    base = yaml.safe_load((ROOT / "autoglm-config.yaml").read_text())
    for section, values in yaml.safe_load(preset.read_text()).items():
        for key, value in values.items():
            assert base[section][key] != value, f"{section}.{key} repeats the configuration"


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_accepted_over_the_configuration(preset: Path) -> None:
    merged = load_config(ROOT / "autoglm-config.yaml", preset)
    assert merged != load_config(ROOT / "autoglm-config.yaml")


def test_the_configuration_shows_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTOGLM_PRESET", raising=False)
    assert load_config(ROOT / "autoglm-config.yaml") == Config()
