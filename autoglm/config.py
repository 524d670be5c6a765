"""The server's configuration: one YAML file, read once, checked whole.

`AUTOGLM_CONFIG` names the file, `AUTOGLM_PRESET` a second one whose few lines replace those of the first,
`AUTOGLM_OVERRIDES` is a third, as text, for single values; `AUTOGLM_CHECKPOINT` names the checkpoint directory,
`AUTOGLM_SPEECH` and `AUTOGLM_BRIDGE` those of the speech encoder and of its projector, where there are any.
A key that is unknown or of a wrong type is refused by its full name.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the file, the key, what stands there and what may."""


@dataclass(frozen=True)
class Range:
    """What a number may be, both ends included. A plain `int` is at least 1."""

    lowest: float
    highest: float = math.inf

    def __str__(self) -> str:
        return f"at least {self.lowest}" if self.highest == math.inf else f"from {self.lowest} to {self.highest}"


@dataclass(frozen=True)
class ModelConfig:
    """`auto` takes the first GPU and bfloat16 where there is one, else the CPU and float32."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


@dataclass(frozen=True)
class LayerQuantization:
    """Asymmetric weights have an offset beside each scale; a group is so many inputs, 0 the whole row."""

    symmetric: bool = True
    group_size: Literal[0, 128] = 0


@dataclass(frozen=True)
class LayerSpecific:
    attention: LayerQuantization = field(default_factory=LayerQuantization)
    ffn: LayerQuantization = field(default_factory=LayerQuantization)


@dataclass(frozen=True)
class CalibrationConfig:
    """Runs the unquantised model over `samples` lines of `dataset` once, before the weights are quantised.

    smoothing: SmoothQuant's alpha (Xiao et al. 2022), 0 leaves the weights as they are.
    """

    dataset: str = ""
    samples: int = 128
    method: Literal["minmax"] = "minmax"
    smoothing: Annotated[float, Range(0, 1)] = 0.0


@dataclass(frozen=True)
class QuantizationConfig:
    """How the language model's linear layers are stored. `auto` quantises on a GPU."""

    enabled: Literal["auto", True, False] = "auto"
    dtype: Literal["int8"] = "int8"
    scheme: Literal["dynamic"] = "dynamic"
    per_channel: Literal[True] = True
    backend: Literal["native", "bitsandbytes"] = "native"
    head: bool = True
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    layer_specific: LayerSpecific = field(default_factory=LayerSpecific)


@dataclass(frozen=True)
class MemoryConfig:
    """The language model's memory on its GPU; `limit_mb` replaces `fraction` where it is not 0."""

    fraction: Annotated[float, Range(0.05, 1)] = 0.85
    limit_mb: Annotated[int, Range(0)] = 0
    embedding: Literal["device", "host"] = "device"


@dataclass(frozen=True)
class WeightCacheConfig:
    """An empty `directory` is the one that `AUTOGLM_CACHE` names, else ~/.cache/autoglm/weights."""

    enabled: bool = True
    max_gb: int = 64
    directory: str = ""


@dataclass(frozen=True)
class ChatConfig:
    """`string` puts a turn's images before its text, parted by a newline; `list` leaves all to the template."""

    content_format: Literal["string", "list"] = "string"


@dataclass(frozen=True)
class LimitsConfig:
    """What one request may bring; `max_pixels` and `min_pixels` are what images are resized to, see
    `autoglm.vision.pixel_limits`, and 0 takes the checkpoint's."""

    max_images: int = 10
    max_image_bytes: int = 32 * 2**20
    max_image_pixels: int = 64 * 2**20
    max_pixels: Annotated[int, Range(0)] = 0
    min_pixels: Annotated[int, Range(0)] = 0


@dataclass(frozen=True)
class VisionSection:
    """`max_patches_per_pass` bounds the patches that one pass of the encoder takes; a larger image goes alone.

    `warm_up` are sizes (width, height). The feature cache has a tier on the device and one in pinned host memory.
    """

    loading: Literal["lazy", "preload"] = "preload"
    warm_up: tuple[tuple[int, int], ...] = ((1080, 2400), (1080, 1920))
    decode_threads: int = 4
    max_patches_per_pass: int = 16384
    int8: bool = False
    feature_cache_mb: Annotated[int, Range(0)] = 512
    feature_cache_host_mb: Annotated[int, Range(0)] = 0


@dataclass(frozen=True)
class AudioSection:
    """Speech; see `autoglm.audio.speech` for the modes. Limits are those of one request and one file.

    `max_seconds_per_pass` bounds what one pass of the encoder takes, padding included; a longer clip goes alone.
    `warm_up` are lengths in seconds.
    """

    mode: Literal["transcript", "bridge"] = "transcript"
    loading: Literal["lazy", "preload"] = "preload"
    warm_up: tuple[int, ...] = (2, 5, 10)
    decode_threads: int = 4
    max_seconds_per_pass: int = 160
    feature_cache_mb: Annotated[int, Range(0)] = 64
    max_audio_files: int = 10
    max_audio_seconds: int = 60
    max_audio_bytes: int = 32 * 2**20


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the language model's engine. Tokens are counted after images are expanded.

    `kv_cache_mb` 0 takes what `MemoryConfig` leaves beside weights and a measured forward pass.
    """

    max_batch_size: int = 64
    max_tokens_per_step: int = 8192
    max_tokens_per_mixed_step: int = 1024
    max_queue_size: int = 256
    max_context: int = 32768
    default_max_tokens: int = 1024
    block_size: int = 16
    kv_cache_mb: Annotated[int, Range(0)] = 0
    kv_cache_dtype: Literal["auto", "bfloat16", "float32", "float8", "int8"] = "auto"
    prefix_cache: bool = True


@dataclass(frozen=True)
class SparseAttentionConfig:
    """How text looks at images; see `autoglm.llm.sparse.policy`. Requests may ask for another mode and ratio.

    ratio: of the visual keys, what is kept. min_batch: `pages` acts in passes of so many decoding sequences at least.
    dense_layers: first layers of `topk` and `pages` that see everything.
    """

    mode: Literal["off", "topk", "pages", "snap", "prune"] = "off"
    ratio: Annotated[float, Range(0.01, 1)] = 0.3
    min_batch: int = 16
    dense_layers: Annotated[int, Range(0)] = 2


@dataclass(frozen=True)
class GatewayConfig:
    """The OpenAI-compatible front; see `gateway.fetch` for where images may come from.

    `max_requests` are answered at once; an answer proves for `ready_within_s` that the server works.
    """

    model_name: str = "autoglm-phone-9b"
    max_body_mb: int = 64
    max_requests: int = 256
    timeout_s: int = 600
    ready_within_s: int = 15
    image_hosts: tuple[str, ...] = ()
    image_folder: str = ""


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    weight_cache: WeightCacheConfig = field(default_factory=WeightCacheConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    vision: VisionSection = field(default_factory=VisionSection)
    audio: AudioSection = field(default_factory=AudioSection)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sparse_attention: SparseAttentionConfig = field(default_factory=SparseAttentionConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)


def load_config(
    path: str | Path | None = None, preset: str | Path | None = None, overrides: str | None = None
) -> Config:
    """Read the configuration; without arguments from what the environment names, or all defaults.

    Raises:
        ConfigError: a file is missing or not YAML, or a key or value is not allowed.
    """
    merged: dict[str, Any] = {}
    for file in (path or os.environ.get("AUTOGLM_CONFIG"), preset or os.environ.get("AUTOGLM_PRESET")):
        if file:
            merged = _merge(merged, _parse(_read(Path(file)), str(file)))
    merged = _merge(merged, _parse(overrides or os.environ.get("AUTOGLM_OVERRIDES", ""), "AUTOGLM_OVERRIDES"))
    config: Config = _build(Config, merged, "configuration")
    return config


def checkpoint_directory() -> Path:
    """The directory that `AUTOGLM_CHECKPOINT` names."""
    directory = os.environ.get("AUTOGLM_CHECKPOINT")
    if not directory:
        raise ConfigError("AUTOGLM_CHECKPOINT is not set: it names the checkpoint's directory")
    return Path(directory)


def speech_directories() -> tuple[Path | None, Path | None]:
    """The directories that `AUTOGLM_SPEECH` and `AUTOGLM_BRIDGE` name."""
    encoder, projector = (os.environ.get(name) for name in ("AUTOGLM_SPEECH", "AUTOGLM_BRIDGE"))
    return Path(encoder) if encoder else None, Path(projector) if projector else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _parse(text: str, source: str) -> dict[str, Any]:
    """The sections that a text holds, each checked, so that a refusal names its source."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{source} holds a {type(content).__name__}, expected sections")
    _build(Config, content, source)
    return content


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` replaces values of `base`, sections within sections too; an empty section replaces nothing."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            merged[key] = _merge(below, value)
        elif value is not None or below is None:
            merged[key] = value
    return merged


def _build(kind: type[Any], values: Mapping[str, Any], name: str) -> Any:
    hints = get_type_hints(kind, include_extras=True)
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
        if value is False and "off" in get_args(hint):
            return "off"  # which is YAML's word for false too
        # 1 equals True in Python, not in a configuration.
        if not any(value == allowed and type(value) is type(allowed) for allowed in get_args(hint)):
            raise ConfigError(f"{where} is {value!r}, allowed are {', '.join(map(str, get_args(hint)))}")
        return value
    if get_origin(hint) is tuple:
        return _check_list(get_args(hint), value, where)
    kind, allowed = get_args(hint) if get_origin(hint) is Annotated else (hint, Range(1))
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{where} is {value!r}, expected a value of type {kind.__name__}")
    if kind in (int, float) and not allowed.lowest <= value <= allowed.highest:
        raise ConfigError(f"{where} is {value}, it must be {allowed}")
    return value


def _check_list(hints: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    """A list as a tuple; its elements' hints are those of a tuple, (X, ...) for any number of X."""
    if hints[-1] is ... and isinstance(value, list):
        hints = hints[:1] * len(value)
    if not isinstance(value, list) or len(value) != len(hints):
        number = "a" if hints and hints[-1] is ... else f"a {len(hints)}-element"
        raise ConfigError(f"{where} is {value!r}, expected {number} list")
    pairs = enumerate(zip(hints, value, strict=True))
    return tuple(_check(hint, element, f"{where}[{i}]") for i, (hint, element) in pairs)
