"""The server's configuration: one YAML file, read once, checked whole.

`AUTOGLM_CONFIG` names the file, `AUTOGLM_PRESET` a second one whose few lines replace those of the first, and
`AUTOGLM_CHECKPOINT` the checkpoint directory. A key that is unknown or of a wrong type is refused by its full name.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the file, the key, what stands there and what may."""


@dataclass(frozen=True)
class ModelConfig:
    """`auto` takes the first GPU and bfloat16 where there is one, else the CPU and float32."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


@dataclass(frozen=True)
class ChatConfig:
    """`string` puts a turn's images before its text, parted by a newline; `list` leaves all to the template."""

    content_format: Literal["string", "list"] = "string"


@dataclass(frozen=True)
class LimitsConfig:
    """What one request may bring."""

    max_images: int = 10
    max_image_bytes: int = 32 * 2**20
    max_image_pixels: int = 64 * 2**20


@dataclass(frozen=True)
class VisionSection:
    """`max_patches_per_pass` bounds the patches that one pass of the encoder takes; a larger image goes alone."""

    decode_threads: int = 4
    max_patches_per_pass: int = 65536


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the language model's engine. Tokens are counted after images are expanded."""

    max_batch_size: int = 32
    max_tokens_per_step: int = 2048
    max_queue_size: int = 256
    max_context: int = 32768
    default_max_tokens: int = 1024
    block_size: int = 16
    kv_cache_mb: int = 4096
    prefix_cache: bool = True


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    vision: VisionSection = field(default_factory=VisionSection)
    engine: EngineConfig = field(default_factory=EngineConfig)


def load_config(path: str | Path | None = None, preset: str | Path | None = None) -> Config:
    """Read the configuration; without arguments from the files that the environment names, or all defaults.

    Raises:
        ConfigError: a file is missing or not YAML, or a key or value is not allowed.
    """
    files = (path or os.environ.get("AUTOGLM_CONFIG"), preset or os.environ.get("AUTOGLM_PRESET"))
    merged: dict[str, Any] = {}
    for file in files:
        if not file:
            continue
        content = _read(Path(file))
        _build(Config, content, str(file))
        for section, values in content.items():
            merged[section] = {**merged.get(section, {}), **(values or {})}
    config: Config = _build(Config, merged, "configuration")
    return config


def checkpoint_directory() -> Path:
    """The directory that `AUTOGLM_CHECKPOINT` names."""
    directory = os.environ.get("AUTOGLM_CHECKPOINT")
    if not directory:
        raise ConfigError("AUTOGLM_CHECKPOINT is not set: it names the checkpoint's directory")
    return Path(directory)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, expected sections")
    return content


def _build(kind: type[Any], values: Mapping[str, Any], name: str) -> Any:
    hints = get_type_hints(kind)
    known = [f.name for f in fields(kind)]
    made: dict[str, Any] = {}
    for key, value in values.items():
        where = f"{name}: {key}" if ": " not in name else f"{name}.{key}"
        if key not in known:
            raise ConfigError(f"{where} is unknown, allowed are {', '.join(known)}")
        hint = hints[key]
        if is_dataclass(hint):
            if not isinstance(value or {}, dict):
                raise ConfigError(f"{where} is {value!r}, expected a section")
            made[key] = _build(hint, value or {}, where)  # type: ignore[arg-type]
        else:
            made[key] = _check(hint, value, where)
    return kind(**made)


def _check(hint: Any, value: Any, where: str) -> Any:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"{where} is {value!r}, allowed are {', '.join(map(str, get_args(hint)))}")
    elif type(value) is not hint:
        raise ConfigError(f"{where} is {value!r}, expected a value of type {hint.__name__}")
    elif hint is int and value < 1:
        raise ConfigError(f"{where} is {value}, it must be at least 1")
    return value
