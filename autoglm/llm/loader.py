"""Loads the language model: from the checkpoint, quantised on the way, or from the weight cache.

The model is created empty on the meta device. The checkpoint's tensors are read one at a time and rounded on the
device, so that at most one of them is in memory in addition to the INT8 model.
"""

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from autoglm.checkpoint import Checkpoint
from autoglm.config import CalibrationConfig, Config, ConfigError, LayerQuantization, QuantizationConfig
from autoglm.distributed.communicator import Communicator
from autoglm.kernels import get_kernels
from autoglm.llm.model import LanguageModel, attention_config
from autoglm.quantization.bitsandbytes import import_library, replace_linears
from autoglm.quantization.linear import Int8Linear, Linear, Tensor
from autoglm.weights.cache import CacheKey, WeightCache
from autoglm.weights.reader import load_parameters, read_weights
from autoglm.weights.safetensors import read_tensors, write_tensors
from autoglm.weights.smoothing import Calibration

log = logging.getLogger(__name__)

ATTENTION, FFN, HEAD = ("qkv_proj", "o_proj"), ("gate_up_proj", "down_proj"), "lm_head"
PREFIXES = {"model.language_model.": "", "lm_head.": "lm_head."}
EMBEDDING = "model.language_model.embed_tokens.weight"

Calibrate: TypeAlias = Callable[[LanguageModel, Checkpoint, CalibrationConfig], Calibration]


@dataclass(frozen=True)
class LoadConfig:
    """How the model is loaded. quantization: None keeps the weights in float."""

    quantization: QuantizationConfig | None = None
    cache: WeightCache | None = None
    embedding_on_host: bool = False

    @property
    def uses_bitsandbytes(self) -> bool:
        return self.quantization is not None and self.quantization.backend == "bitsandbytes"

    @property
    def calibration(self) -> CalibrationConfig | None:
        """The calibration that is configured, if any."""
        return self.quantization.calibration if self.quantization and self.quantization.calibration.dataset else None

    @classmethod
    def from_config(cls, config: Config, device: torch.device) -> "LoadConfig":
        """The settings for this device.

        Raises:
            ConfigError: settings contradict each other.
        """
        enabled = config.quantization.enabled
        if enabled == "auto":
            enabled = device.type == "cuda"
        if enabled:
            _check(config.quantization)
        return cls(
            config.quantization if enabled else None,
            WeightCache.from_config(config.weight_cache),
            config.memory.embedding == "host",
        )


def load_language_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    config: LoadConfig | None = None,
    calibrate: Calibrate | None = None,
    communicator: Communicator | None = None,
) -> LanguageModel:
    """The checkpoint's language model on `device`, or its shard if `communicator` has several ranks.

    Args:
        dtype: of activations and of weights that are not quantised.
        config: None keeps the weights in `dtype`.
        calibrate: runs the calibration where one is configured (`autoglm.llm.calibration`).

    Raises:
        CheckpointError: the files do not fit the model.
        ConfigError: bitsandbytes is configured and not available, or the calibration's samples cannot be read.
    """
    begin = time.perf_counter()
    config = config or LoadConfig()
    if config.uses_bitsandbytes:
        import_library(device)
    with torch.device("meta"):
        model = LanguageModel(checkpoint.text, get_kernels(device), communicator)
    model = model.to(dtype).requires_grad_(False).eval()
    if config.quantization:
        if checkpoint.quantization and config.quantization.calibration.smoothing:
            raise ConfigError(
                "quantization.calibration.smoothing must be 0 for a checkpoint with INT8 weights "
                f"(got {config.quantization.calibration.smoothing})"
            )
        quantize_linears(model, config.quantization, checkpoint)
    filler = _Filler(model, checkpoint, device, config, calibrate)
    cached = filler.fill()
    if config.uses_bitsandbytes:
        replace_linears(model, checkpoint.quantization.threshold if checkpoint.quantization else 0.0)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    model.kv_scales = filler.kv_scales
    text = model.config
    model.attention_config = attention_config(text, text.max_position_embeddings, device, dtype)
    source = "the weight cache" if cached else checkpoint.path
    log.info("language model loaded from %s in %.1f s", source, time.perf_counter() - begin)
    return model


def quantize_linears(model: nn.Module, settings: QuantizationConfig, checkpoint: Checkpoint) -> None:
    """Replace the linear layers to be quantised by INT8 ones; the model is on the meta device.

    A checkpoint of bitsandbytes has one scale a row, and lists the layers that stay in float.
    """
    skipped = checkpoint.quantization.skipped if checkpoint.quantization else ()
    for path, layer in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if not isinstance(layer, Linear):
            continue
        kind = _kind(name, settings)
        if kind is None or _is_skipped(parent, layer.parts or (name,), skipped):
            continue
        if checkpoint.quantization:
            kind = LayerQuantization()
        int8 = layer.to_int8(symmetric=kind.symmetric, grouped=kind.group_size > 0)
        setattr(model.get_submodule(parent), name, int8)


def read_dataset(config: CalibrationConfig) -> bytes:
    """The calibration's file of samples.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return Path(config.dataset).read_bytes()
    except OSError as error:
        raise ConfigError(f"quantization.calibration.dataset: {config.dataset}: {error.strerror}") from None


def _kind(name: str, settings: QuantizationConfig) -> LayerQuantization | None:
    if name in ATTENTION:
        return settings.layer_specific.attention
    if name in FFN:
        return settings.layer_specific.ffn
    return LayerQuantization() if name == HEAD and settings.head else None


def _is_skipped(parent: str, parts: tuple[str, ...], skipped: tuple[str, ...]) -> bool:
    """Whether a checkpoint's list of unquantised modules names this layer, or one of its parts."""
    names = [f".model.language_model.{parent}.{part}." if parent else f".{part}." for part in parts]
    return any(f".{entry}." in name for entry in skipped for name in names)


def _check(settings: QuantizationConfig) -> None:
    layers = settings.layer_specific
    default = LayerQuantization()
    if settings.backend == "bitsandbytes" and (layers.attention, layers.ffn) != (default, default):
        raise ConfigError(
            "quantization.layer_specific must be symmetric with group_size 0 when quantization.backend is bitsandbytes"
        )
    if settings.calibration.smoothing and not settings.calibration.dataset:
        raise ConfigError("quantization.calibration.dataset must name a file when calibration.smoothing is not 0")


def _allocate(model: nn.Module, device: torch.device, embedding_on_host: bool) -> None:
    for name, module in model.named_modules():
        if name == "embed_tokens" and embedding_on_host:
            table: torch.Tensor = module.weight  # type: ignore[assignment]
            pinned = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
            module.weight = nn.Parameter(pinned, requires_grad=False)
        else:
            module.to_empty(device=device, recurse=False)
    model.requires_grad_(False)


class _Filler:
    """Allocates an empty model on its device and fills it from the checkpoint or from the weight cache."""

    def __init__(
        self,
        model: LanguageModel,
        checkpoint: Checkpoint,
        device: torch.device,
        config: LoadConfig,
        calibrate: Calibrate | None,
    ) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.device = device
        self.config = config
        self.calibrate = calibrate
        self.dtype = model.norm.weight.dtype
        on_host = config.embedding_on_host and device.type == "cuda"
        _allocate(model, device, on_host)
        head = model.lm_head
        # The output head may be the embedding table itself, or a copy of it: quantised, or on another device.
        self.shares_embedding = checkpoint.text.tie_word_embeddings and not on_host and isinstance(head, Linear)
        if self.shares_embedding:
            head.weight = model.embed_tokens.weight  # type: ignore[assignment, misc]
        self.tensors = {name: parameter.data for name, parameter in model.named_parameters()}
        for name, module in model.named_modules():
            if isinstance(module, Int8Linear):
                self.tensors |= {f"{name}.{part}": buffer for part, buffer in module.named_buffers()}
        self.kv_scales: torch.Tensor | None = None
        self.calibration: Calibration | None = None
        if config.calibration:
            text = checkpoint.text
            self.kv_scales = torch.empty(2, text.num_hidden_layers, text.num_key_value_heads, device=device)
            self.tensors["kv_scales"] = self.kv_scales

    def fill(self) -> bool:
        """Returns whether the weights came from the cache."""
        settings, cache = self.config.quantization, self.config.cache
        if settings is None or cache is None:
            self._from_checkpoint()
            return False
        key = CacheKey.of(self.checkpoint.path, self.checkpoint.shards, self._description(settings))
        size = sum(tensor.nbytes for tensor in self.tensors.values())
        return cache.fetch(key, size, self._from_directory, self._from_checkpoint, self._write)

    def _description(self, settings: QuantizationConfig) -> dict[str, Any]:
        """Everything that the weights depend on except the checkpoint, as JSON."""
        calibration: dict[str, Any] | None = None
        if self.config.calibration:
            # The images that the samples name are not part of the key.
            content = hashlib.sha256(read_dataset(self.config.calibration)).hexdigest()[:16]
            calibration = dataclasses.asdict(self.config.calibration) | {"content": content}
        return {
            "model": "language_model",
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": dataclasses.asdict(settings.layer_specific.attention),
            "ffn": dataclasses.asdict(settings.layer_specific.ffn),
            "head": settings.head,
            "calibration": calibration,
            "shard": list(self.model.communicator.shard),
        }

    def _from_directory(self, path: Path) -> None:
        read_tensors(path, self.tensors)

    def _write(self, path: Path) -> None:
        write_tensors(path, self.tensors)
        if self.calibration:
            (path / "calibration.json").write_text(json.dumps(self.calibration.report))

    def _from_checkpoint(self) -> None:
        if self.config.calibration and self.kv_scales is not None:
            if self.calibrate is None:
                raise ValueError("a calibration is configured, but no function to run it was given")
            # Calibration temporarily holds the whole unquantised model.
            whole = load_language_model(self.checkpoint, self.device, self.dtype)
            self.calibration = self.calibrate(whole, self.checkpoint, self.config.calibration)
            self.kv_scales.copy_(self.calibration.kv_scales)
            log.info("calibration:\n%s", self.calibration.table())
        load_parameters(self.model, self._weights(), PREFIXES)

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's tensors, smoothed after a calibration; the head too, where it is a copy of the embedding."""
        tied = self.checkpoint.text.tie_word_embeddings
        prefixes = ("model.language_model.",) if tied else tuple(PREFIXES)
        for name, tensor in read_weights(self.checkpoint, prefixes, self.device):
            if self.calibration and isinstance(tensor, torch.Tensor):
                tensor = self.calibration.smooth(name, tensor)
            yield name, tensor
            if tied and not self.shares_embedding and name == EMBEDDING:
                yield "lm_head.weight", tensor
