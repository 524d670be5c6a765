"""How the language model's weights get into memory: from the checkpoint, quantised on the way, or from the cache.

A model comes here empty (on the meta device, in its dtype) and leaves complete. The checkpoint's float weights are
read one tensor at a time and rounded on the device: beside the INT8 model there is never more than one of them.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from autoglm.checkpoint import Checkpoint, TextConfig
from autoglm.config import Config, ConfigError, LayerQuantization, QuantizationConfig
from autoglm.quantization.bitsandbytes import import_library, replace_linears
from autoglm.quantization.calibration import Calibration, calibrate, dataset_digest
from autoglm.quantization.linear import Int8Linear
from autoglm.tensor_files import read_tensors, write_tensors
from autoglm.weight_cache import CacheKey, WeightCache
from autoglm.weights import Tensor, load_parameters, read_weights

if TYPE_CHECKING:
    from autoglm.llm.model import LanguageModel

log = logging.getLogger(__name__)

ATTENTION, FFN, HEAD = ("qkv_proj", "o_proj"), ("gate_up_proj", "down_proj"), "lm_head"
PREFIXES = {"model.language_model.": "", "lm_head.": "lm_head."}
EMBEDDING = "model.language_model.embed_tokens.weight"


@dataclass(frozen=True)
class Loading:
    """How a model is loaded. quantization: None leaves it in float. shard: rank and number of tensor-parallel ranks."""

    quantization: QuantizationConfig | None = None
    cache: WeightCache | None = None
    embedding_on_host: bool = False
    shard: tuple[int, int] = (0, 1)

    @property
    def foreign(self) -> bool:
        """Whether bitsandbytes computes."""
        return self.quantization is not None and self.quantization.backend == "bitsandbytes"

    @classmethod
    def from_config(cls, config: Config, device: torch.device) -> "Loading":
        """What the configuration asks for on this device.

        Raises:
            ConfigError: its parts contradict each other.
        """
        wanted = config.quantization.enabled
        enabled = device.type == "cuda" if wanted == "auto" else wanted
        if enabled:
            _check(config.quantization)
        return cls(
            config.quantization if enabled else None,
            WeightCache.from_config(config.weight_cache),
            config.memory.embedding == "host",
        )


def load(model: "LanguageModel", checkpoint: Checkpoint, device: torch.device, loading: Loading) -> torch.Tensor | None:
    """Fill an empty `LanguageModel`, its linear layers becoming `Int8Linear` where they are to be quantised.

    Returns:
        The fixed scales of an FP8 KV cache, fp32 [2, layers, kv_heads] (keys, values), where there was a calibration.

    Raises:
        CheckpointError: the files do not fit the model.
        ConfigError: bitsandbytes is wanted and cannot be had, or the calibration's samples cannot be read.
    """
    begin = time.perf_counter()
    settings = loading.quantization
    if loading.foreign:
        import_library(device)
    if settings:
        if checkpoint.quantization and settings.calibration.smoothing:
            raise ConfigError("quantization.calibration.smoothing must be 0: the checkpoint's weights are INT8 already")
        build(model, settings, checkpoint)
    filling = _Filling(model, checkpoint, device, loading)
    cached = filling.fill()
    if loading.foreign:
        replace_linears(model, checkpoint.quantization.threshold if checkpoint.quantization else 0.0)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    source = "the weight cache" if cached else checkpoint.path
    log.info("language model loaded from %s in %.1f s", source, time.perf_counter() - begin)
    return filling.kv_scales


def build(model: nn.Module, settings: QuantizationConfig, checkpoint: Checkpoint) -> nn.Module:
    """Replace the linear layers that are to be quantised, on the meta device; returns the model.

    A checkpoint of bitsandbytes has its own kind of INT8, one scale a row, and says which layers stay in float.
    """
    skipped = checkpoint.quantization.skipped if checkpoint.quantization else ()
    for path, layer in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        kind = _kind(name, settings)
        if not isinstance(layer, nn.Linear) or kind is None or _is_skipped(path, skipped):
            continue
        if checkpoint.quantization:
            kind = LayerQuantization()
        with torch.device("meta"):
            bias = None if layer.bias is None else layer.bias.dtype
            made = Int8Linear(layer.in_features, layer.out_features, bias, kind.symmetric, kind.group_size > 0)
        setattr(model.get_submodule(parent), name, made)
    return model


def _kind(name: str, settings: QuantizationConfig) -> LayerQuantization | None:
    if name in ATTENTION:
        return settings.layer_specific.attention
    if name in FFN:
        return settings.layer_specific.ffn
    return LayerQuantization() if name == HEAD and settings.head else None


def _is_skipped(path: str, skipped: tuple[str, ...]) -> bool:
    """Whether a checkpoint's list of unquantised modules names this one, or a part of it."""
    parent, _, name = path.rpartition(".")
    parts = ("q_proj", "k_proj", "v_proj") if name == "qkv_proj" else (name,)
    names = [f".model.language_model.{parent}.{part}." if parent else f".{part}." for part in parts]
    return any(f".{entry}." in name for entry in skipped for name in names)


def _check(settings: QuantizationConfig) -> None:
    layers = settings.layer_specific
    plain = LayerQuantization()
    if settings.backend == "bitsandbytes" and (layers.attention, layers.ffn) != (plain, plain):
        raise ConfigError(
            "quantization.backend is bitsandbytes, which knows symmetric weights with one scale a row only: "
            "quantization.layer_specific must say so too"
        )
    if settings.calibration.smoothing and not settings.calibration.dataset:
        raise ConfigError(
            "quantization.calibration.smoothing needs activations: quantization.calibration.dataset must name a file"
        )


def _allocate(model: nn.Module, device: torch.device, embedding_on_host: bool) -> None:
    for name, module in model.named_modules():
        if name == "embed_tokens" and embedding_on_host:
            table: torch.Tensor = module.weight  # type: ignore[assignment]
            pinned = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
            module.weight = nn.Parameter(pinned, requires_grad=False)
        else:
            module.to_empty(device=device, recurse=False)
    model.requires_grad_(False)


class _Filling:
    """The memory of a model on its device, and the two ways to fill it."""

    def __init__(self, model: "LanguageModel", checkpoint: Checkpoint, device: torch.device, loading: Loading) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.device = device
        self.loading = loading
        self.dtype = model.norm.weight.dtype
        on_host = loading.embedding_on_host and device.type == "cuda"
        _allocate(model, device, on_host)
        head = model.lm_head
        # The output head may be the embedding table itself, or a copy of it that is quantised or on another device.
        self.shared = False
        if checkpoint.text.tie_word_embeddings and not on_host and isinstance(head, nn.Linear):
            self.shared = True
            head.weight = model.embed_tokens.weight
        self.tensors = {name: parameter.data for name, parameter in model.named_parameters()}
        for name, module in model.named_modules():
            if isinstance(module, Int8Linear):
                self.tensors |= {f"{name}.{part}": buffer for part, buffer in module.named_buffers()}
        self.kv_scales: torch.Tensor | None = None
        self.calibration: Calibration | None = None
        if loading.quantization and loading.quantization.calibration.dataset:
            text = checkpoint.text
            self.kv_scales = torch.empty(2, text.num_hidden_layers, text.num_key_value_heads, device=device)
            self.tensors["kv_scales"] = self.kv_scales

    def fill(self) -> bool:
        """Returns whether the weights came from the cache."""
        settings, cache = self.loading.quantization, self.loading.cache
        if settings is None or cache is None:
            self._from_checkpoint()
            return False
        key = CacheKey.of(self.checkpoint.path, self.checkpoint.shards, self._description(settings))
        size = sum(tensor.nbytes for tensor in self.tensors.values())
        return cache.fetch(key, size, self._from_directory, self._from_checkpoint, self._write)

    def _description(self, settings: QuantizationConfig) -> dict[str, Any]:
        """Everything beside the checkpoint that the weights depend on, as JSON."""
        calibration: dict[str, Any] | None = None
        if settings.calibration.dataset:
            calibration = dataclasses.asdict(settings.calibration) | {"content": dataset_digest(settings.calibration)}
        return {
            "model": "language_model",
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": dataclasses.asdict(settings.layer_specific.attention),
            "ffn": dataclasses.asdict(settings.layer_specific.ffn),
            "head": settings.head,
            "calibration": calibration,
            "shard": list(self.loading.shard),
        }

    def _from_directory(self, path: Path) -> None:
        read_tensors(path, self.tensors)

    def _write(self, path: Path) -> None:
        write_tensors(path, self.tensors)
        if self.calibration:
            (path / "calibration.json").write_text(json.dumps(self.calibration.report))

    def _from_checkpoint(self) -> None:
        settings = self.loading.quantization
        if settings and self.kv_scales is not None:
            # In float it needs its full memory, this once.
            whole = type(self.model).load(self.checkpoint, self.device, self.dtype)
            self.calibration = calibrate(whole, self.checkpoint, settings.calibration)
            self.kv_scales.copy_(self.calibration.kv_scales)
            log.info("calibration:\n%s", self.calibration.table())
        load_parameters(self.model, self._weights(), PREFIXES, fused_rows(self.checkpoint.text))

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's tensors, smoothed where there was a calibration; a head that is a copy comes too."""
        tied = self.checkpoint.text.tie_word_embeddings
        prefixes = ("model.language_model.",) if tied else tuple(PREFIXES)
        for name, tensor in read_weights(self.checkpoint, prefixes, self.device):
            if self.calibration and isinstance(tensor, torch.Tensor):
                tensor = self.calibration.smooth(name, tensor)
            yield name, tensor
            if tied and not self.shared and name == EMBEDDING:
                yield "lm_head.weight", tensor


def fused_rows(text: TextConfig) -> dict[str, tuple[str, slice]]:
    """Where q, k and v lie in the one product that they are here."""
    query, key = (heads * text.head_dim for heads in (text.num_attention_heads, text.num_key_value_heads))
    return {
        "q_proj": ("qkv_proj", slice(0, query)),
        "k_proj": ("qkv_proj", slice(query, query + key)),
        "v_proj": ("qkv_proj", slice(query + key, query + 2 * key)),
    }
