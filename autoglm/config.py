"""The server's configuration: one YAML file, read once and checked as a whole.

`AUTOGLM_CONFIG` names the file, `AUTOGLM_PRESET` a second one whose values override it, and `AUTOGLM_OVERRIDES` holds
further overrides as YAML text. `AUTOGLM_CHECKPOINT`, `AUTOGLM_SPEECH` and `AUTOGLM_BRIDGE` name the directories of the
checkpoint, the speech encoder and its projector. An unknown key or a wrong value is rejected by its full name.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

import yaml

from autoglm.errors import shorten

SparseMode: TypeAlias = Literal["off", "topk", "pages", "prune"]
AudioMode: TypeAlias = Literal["transcript", "bridge"]

TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the source, the key, the accepted values and the value."""


@dataclass(frozen=True)
class Range:
    """The accepted numbers, both ends included. A plain `int` must be at least 1."""

    lowest: float
    highest: float = math.inf

    def __str__(self) -> str:
        return f"at least {self.lowest}" if self.highest == math.inf else f"between {self.lowest} and {self.highest}"


def setting(default: Any, doc: str) -> Any:
    """A field of a section. `doc` describes it in docs/configuration.md, which reads it from the field's metadata."""
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class ModelConfig:
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto is the first GPU if there is one, else the CPU")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "auto is bfloat16 on a GPU, else float32"
    )


@dataclass(frozen=True)
class LayerQuantization:
    symmetric: bool = setting(True, "false adds an offset to each scale")
    group_size: Literal[0, 128] = setting(0, "Inputs that share a scale; 0 is one scale per output channel")


@dataclass(frozen=True)
class LayerSpecific:
    attention: LayerQuantization = setting(LayerQuantization(), "Projections of the attention")
    ffn: LayerQuantization = setting(LayerQuantization(), "Projections of the feed-forward network")


@dataclass(frozen=True)
class CalibrationConfig:
    dataset: str = setting(
        "", 'JSON lines, {"text": ...} or {"messages": [...]} with images as file paths; empty: no calibration'
    )
    samples: int = setting(128, "Lines of the dataset to run through the unquantised model")
    method: Literal["minmax"] = setting("minmax", "Always minmax, the largest magnitude of each channel")
    smoothing: Annotated[float, Range(0, 1)] = setting(
        0.0, "SmoothQuant's alpha (Xiao et al. 2022); 0 is off, 0.5 moves activation outliers into the weights"
    )


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    enabled: Literal["auto", True, False] = setting("auto", "auto quantises on a GPU")
    dtype: Literal["int8"] = setting("int8", "Always int8")
    scheme: Literal["dynamic"] = setting("dynamic", "Always dynamic: the scales of activations are computed per token")
    per_channel: Literal[True] = setting(True, "Always true: each output channel of a weight has its own scale")
    backend: Literal["native", "bitsandbytes"] = setting("native", "bitsandbytes is slow, for comparison only")
    head: bool = setting(True, "Quantise the output head (lm_head) too")
    calibration: CalibrationConfig = setting(CalibrationConfig(), "Run once, before the weights are quantised")
    layer_specific: LayerSpecific = setting(LayerSpecific(), "Weight formats by kind of layer")


@dataclass(frozen=True)
class MemoryConfig:
    fraction: Annotated[float, Range(0.05, 1)] = setting(
        0.85, "Share of the GPU's memory; the rest is for the vision encoder and the CUDA contexts"
    )
    limit_mb: Annotated[int, Range(0)] = setting(0, "MiB to use instead of fraction; 0: use fraction")
    embedding: Literal["device", "host"] = setting(
        "device", "host keeps the embedding table in pinned host memory, which saves 1.2 GB on the GPU"
    )


@dataclass(frozen=True)
class WeightCacheConfig:
    enabled: bool = setting(True, "Write quantised weights to disk once and read them at later starts")
    max_gb: int = setting(64, "Size on disk; the least recently used entries are removed first")
    directory: str = setting("", "Empty: the directory in AUTOGLM_CACHE, else ~/.cache/autoglm/weights")


@dataclass(frozen=True)
class ChatConfig:
    content_format: Literal["string", "list"] = setting(
        "string",
        "string puts a turn's images first, then a newline and its text; list leaves the order to the template",
    )


@dataclass(frozen=True)
class LimitsConfig:
    max_images: int = setting(10, "Images per request")
    max_image_bytes: int = setting(32 * 2**20, "Bytes per encoded image")
    max_image_pixels: int = setting(64 * 2**20, "Width x height of an image, read from its header before it is decoded")
    max_pixels: Annotated[int, Range(0)] = setting(
        0, "Largest image after resizing, as 2 x height x width; 0: the checkpoint's value. A request may lower it"
    )
    min_pixels: Annotated[int, Range(0)] = setting(
        0, "Smallest image after resizing, as 2 x height x width; 0: the checkpoint's value. A request may change it"
    )


@dataclass(frozen=True, kw_only=True)
class VisionSection:
    loading: Literal["lazy", "preload"] = setting("preload", "lazy loads the weights when the first image arrives")
    warm_up: tuple[tuple[int, int], ...] = setting(
        ((1080, 2400), (1080, 1920)), "[width, height] of images whose passes become CUDA graphs when the weights load"
    )
    decode_threads: int = setting(4, "Threads that decode and resize images")
    max_patches_per_pass: int = setting(
        16384, "Patches per pass of the encoder; a larger image gets its own pass. A 1080x2400 screenshot has 13416"
    )
    int8: bool = setting(False, "Compute the linear layers of the encoder's blocks in INT8")
    feature_cache_mb: Annotated[int, Range(0)] = setting(
        512, "MiB on the device for embeddings of recent images; a 1080x2400 screenshot takes 26; 0: none"
    )
    feature_cache_host_mb: Annotated[int, Range(0)] = setting(
        0, "MiB of pinned host memory for embeddings evicted from the device"
    )


@dataclass(frozen=True, kw_only=True)
class AudioSection:
    mode: AudioMode = setting("transcript", "transcript turns a clip into text, bridge into embeddings; see audio_mode")
    loading: Literal["lazy", "preload"] = setting("preload", "lazy loads the weights when the first clip arrives")
    warm_up: tuple[int, ...] = setting((2, 5, 10), "Seconds of the clips encoded on a GPU after preloading")
    decode_threads: int = setting(4, "Threads that decode and resample clips")
    max_seconds_per_pass: int = setting(
        160, "Seconds per pass of the encoder, padding included; a longer clip gets its own pass"
    )
    feature_cache_mb: Annotated[int, Range(0)] = setting(
        64, "MiB for embeddings and transcripts of recent clips; 10 s take 0.8 as embeddings; 0: none"
    )
    max_audio_files: int = setting(10, "Clips per request")
    max_audio_seconds: int = setting(60, "Seconds per clip, read from its header before it is decoded")
    max_audio_bytes: int = setting(32 * 2**20, "Bytes per encoded clip")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    max_batch_size: int = setting(64, "Sequences that run at once")
    max_tokens_per_step: int = setting(8192, "Tokens per forward pass; longer prompts are prefilled in chunks")
    max_tokens_per_mixed_step: int = setting(
        1024, "Tokens per forward pass while sequences decode; bounds how long a chunk delays their next tokens"
    )
    max_queue_size: int = setting(256, "Waiting requests; further ones are rejected as UNAVAILABLE")
    max_context: int = setting(32768, "Tokens of prompt and answer together, at most the checkpoint's own limit")
    default_max_tokens: int = setting(1024, "max_tokens of requests that do not set it")
    block_size: int = setting(16, "Tokens per block of the KV cache")
    kv_cache_mb: Annotated[int, Range(0)] = setting(
        0, "MiB for the KV cache; 0: the rest of the memory section's budget (4096 on the CPU)"
    )
    kv_cache_dtype: Literal["auto", "bfloat16", "float32", "float8", "int8"] = setting(
        "auto", "auto is the model's dtype"
    )
    prefix_cache: bool = setting(True, "Reuse the blocks of earlier prompts with the same prefix")


@dataclass(frozen=True)
class SparseAttentionConfig:
    mode: SparseMode = setting(
        "off", "topk (exact but slow), pages (whole blocks, while decoding) or prune (fewer image tokens in the prompt)"
    )
    ratio: Annotated[float, Range(0.01, 1)] = setting(0.3, "Share of the visual keys to keep")
    min_batch: int = setting(16, "pages: smallest number of decoding sequences in a pass that selects blocks")
    dense_layers: Annotated[int, Range(0)] = setting(2, "topk, pages: first layers that attend to all keys")


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    model_name: str = setting("autoglm-phone-9b", "The model's name in requests")
    max_body_mb: int = setting(64, "MiB of a request's body, images in base64 included; beyond it: HTTP 413")
    max_requests: int = setting(256, "Requests answered at once; beyond it: HTTP 429")
    timeout_s: int = setting(600, "Seconds for one answer; a request may set less")
    ready_within_s: int = setting(15, "Seconds for which an answer proves readiness; after them /ready sends a probe")
    image_hosts: tuple[str, ...] = setting(
        (), "Hosts that image URLs may be fetched from; .example.com allows its subdomains. Never private addresses"
    )
    image_folder: str = setting("", "Folder that file:// URLs may name images in; empty: none")


@dataclass(frozen=True, kw_only=True)
class Config:
    model: ModelConfig = setting(ModelConfig(), "Where and how all models compute")
    quantization: QuantizationConfig = setting(QuantizationConfig(), "The language model's linear layers in INT8")
    memory: MemoryConfig = setting(MemoryConfig(), "The language model's memory on its GPU")
    weight_cache: WeightCacheConfig = setting(WeightCacheConfig(), "Quantised weights on disk")
    chat: ChatConfig = setting(ChatConfig(), "How chats are rendered")
    limits: LimitsConfig = setting(LimitsConfig(), "Limits of a request's images")
    vision: VisionSection = setting(VisionSection(), "The vision encoder")
    audio: AudioSection = setting(AudioSection(), "The speech encoder, for servers that have one")
    engine: EngineConfig = setting(EngineConfig(), "Scheduler and KV cache of the language model")
    sparse_attention: SparseAttentionConfig = setting(
        SparseAttentionConfig(), "Text attends to a share of the visual keys; a request may set its own mode and ratio"
    )
    gateway: GatewayConfig = setting(GatewayConfig(), "The OpenAI-compatible gateway and its playground")


def load_config(
    path: str | Path | None = None, preset: str | Path | None = None, overrides: str | None = None
) -> Config:
    """Read the configuration. Arguments that are not given default to the environment's, keys to their defaults.

    Raises:
        ConfigError: a file is missing or is not YAML, or a key or value is not accepted.
    """
    merged: dict[str, Any] = {}
    for file in (path or os.environ.get("AUTOGLM_CONFIG"), preset or os.environ.get("AUTOGLM_PRESET")):
        if file:
            merged = _merge(merged, _parse(_read(Path(file)), str(file)))
    merged = _merge(merged, _parse(overrides or os.environ.get("AUTOGLM_OVERRIDES", ""), "AUTOGLM_OVERRIDES"))
    config: Config = _build(Config, merged)
    return config


def checkpoint_directory() -> Path:
    """The directory that `AUTOGLM_CHECKPOINT` names."""
    directory = os.environ.get("AUTOGLM_CHECKPOINT")
    if not directory:
        raise ConfigError("AUTOGLM_CHECKPOINT is not set; it names the checkpoint's directory")
    return Path(directory)


def speech_directories() -> tuple[Path | None, Path | None]:
    """The directories that `AUTOGLM_SPEECH` and `AUTOGLM_BRIDGE` name."""
    encoder, projector = (os.environ.get(name) for name in ("AUTOGLM_SPEECH", "AUTOGLM_BRIDGE"))
    return Path(encoder) if encoder else None, Path(projector) if projector else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} must be UTF-8 text") from None


def _parse(text: str, source: str) -> dict[str, Any]:
    """Parse and check the sections of one source, so that errors can name it."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{source} is not valid YAML{where}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{source} must be a mapping of sections (got {shorten(content)})")
    try:
        _build(Config, content)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    return content


def _merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Replace values of `base`, in nested sections too; an empty section replaces nothing."""
    merged = dict(base)
    for key, value in override.items():
        current = merged.get(key)
        if isinstance(value, dict) and isinstance(current, dict):
            merged[key] = _merge(current, value)
        elif value is not None or current is None:
            merged[key] = value
    return merged


def _build(kind: type[Any], values: Mapping[str, Any], section: str = "") -> Any:
    """A section from its YAML values."""
    hints = get_type_hints(kind, include_extras=True)
    known = [each.name for each in fields(kind)]
    checked: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{section}.{key}" if section else str(key)
        if key not in known:
            raise ConfigError(f"{path} is not a known key (accepted: {', '.join(known)})")
        hint = hints[key]
        if not is_dataclass(hint):
            checked[key] = _check(hint, value, path)
        elif value is None or isinstance(value, dict):
            checked[key] = _build(hint, value or {}, path)  # type: ignore[arg-type]
        else:
            raise _invalid(path, value, "a section")
    return kind(**checked)


def _check(hint: Any, value: Any, path: str) -> Any:
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value is False and "off" in choices:
            return "off"  # YAML parses a bare `off` as false
        # Types are compared because 1 equals True.
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            names = ", ".join(json.dumps(each) if isinstance(each, bool) else str(each) for each in choices)
            raise _invalid(path, value, names if len(choices) == 1 else f"one of {names}")
        return value
    if get_origin(hint) is tuple:
        return _check_list(get_args(hint), value, path)
    kind, accepted = get_args(hint) if get_origin(hint) is Annotated else (hint, Range(1))
    if type(value) is not kind and (kind, type(value)) != (float, int):
        raise _invalid(path, value, TYPE_NAMES[kind])
    if kind in (int, float) and not accepted.lowest <= value <= accepted.highest:
        raise _invalid(path, value, accepted)
    return kind(value)


def _check_list(hints: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    """A list as a tuple. `hints` are those of a tuple's elements: (X, ...) for any number of X."""
    if hints[-1] is ... and isinstance(value, list):
        hints = hints[:1] * len(value)
    if not isinstance(value, list) or len(value) != len(hints):
        raise _invalid(path, value, "a list" if ... in hints else f"a list of {len(hints)} elements")
    pairs = enumerate(zip(hints, value, strict=True))
    return tuple(_check(hint, element, f"{path}[{i}]") for i, (hint, element) in pairs)


def _invalid(path: str, value: Any, accepted: object) -> ConfigError:
    return ConfigError(f"{path} must be {accepted} (got {shorten(value)})")
