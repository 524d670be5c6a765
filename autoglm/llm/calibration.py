"""Calibration: runs samples through the unquantised model and records the ranges of activations, keys and values."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import nn

from autoglm.checkpoint import Checkpoint
from autoglm.config import CalibrationConfig, ConfigError, LimitsConfig, VisionSection
from autoglm.errors import RequestError
from autoglm.kernels.base import Activation, Kernels, Weight
from autoglm.llm.loader import read_dataset
from autoglm.llm.model import LanguageModel
from autoglm.llm.mrope import prompt_positions
from autoglm.llm.prefill import prefill
from autoglm.preprocess.chat import ChatRenderer, RenderedPrompt
from autoglm.preprocess.messages import read_messages
from autoglm.vision.encoder import VisionEncoder
from autoglm.weights.smoothing import SMOOTHED, Calibration, smoothing_factors

MAX_TOKENS = 8192  # of one sample; the rest is cut off
FP8_MAX = 448.0  # of float8_e4m3fn


@torch.inference_mode()
def calibrate(model: LanguageModel, checkpoint: Checkpoint, config: CalibrationConfig) -> Calibration:
    """Run the samples of `config.dataset` through a model in float.

    Raises:
        ConfigError: the dataset is missing or empty, or one of its lines is not a sample.
    """
    recorder = _Recorder(model.kernels)
    heads = (2, model.config.num_hidden_layers, model.config.num_key_value_heads)
    kv_largest = torch.zeros(heads, device=model.norm.weight.device)
    kernels, model.kernels = model.kernels, cast(Kernels, recorder)
    try:
        for hidden, positions in _Samples(model, checkpoint, config):
            length = hidden.shape[0]
            _, cache = prefill(model, hidden, positions)
            for kind, stored in enumerate((cache.keys, cache.values)):
                kv_largest[kind] = torch.maximum(kv_largest[kind], stored[:, :length].abs().amax((1, 3)).float())
    finally:
        model.kernels = kernels
    factors: dict[str, torch.Tensor] = {}
    report: list[dict[str, Any]] = []
    for path, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or id(layer.weight) not in recorder.largest:
            continue
        largest = recorder.largest[id(layer.weight)]
        smoothed = largest
        if config.smoothing and path.endswith(SMOOTHED):
            factors[path] = smoothing_factors(largest, layer.weight.abs().amax(0).float(), config.smoothing)
            smoothed = largest / factors[path]
        row = {"largest": largest.max(), "median": largest.median(), "smoothed": smoothed.max()}
        report.append({"name": path} | {key: round(float(value), 4) for key, value in row.items()})
    for index, (keys, values) in enumerate(zip(*kv_largest.tolist(), strict=True)):
        report.append({"name": f"layers.{index}", "keys": keys, "values": values})
    return Calibration(factors, (kv_largest / FP8_MAX).clamp_min(1e-12), report)


class _Recorder:
    """Kernels that also record the largest magnitude of each input channel of each weight."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.largest: dict[int, torch.Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernels, name)

    def linear(self, *, x: Activation, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        self._record(x, weight)
        return self.kernels.linear(x=x, weight=weight, bias=bias)

    def gate_up(self, *, x: Activation, weight: Weight) -> torch.Tensor:
        self._record(x, weight)
        return self.kernels.gate_up(x=x, weight=weight)

    def _record(self, x: Activation, weight: Weight) -> None:
        largest = x.values.abs().amax(0).float()
        before = self.largest.get(id(weight))
        self.largest[id(weight)] = largest if before is None else torch.maximum(before, largest)


def _fault(error: Exception) -> str:
    if isinstance(error, RequestError):
        return error.message
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return 'must be JSON, {"text": TEXT} or {"messages": MESSAGES}'


class _Samples:
    """The dataset's lines as the model's inputs: embeddings [T, hidden_size] and positions int32 [3, T]."""

    def __init__(self, model: LanguageModel, checkpoint: Checkpoint, config: CalibrationConfig) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.config = config
        self.tokenizer = Tokenizer.from_file(str(checkpoint.path / "tokenizer.json"))
        self.limits = LimitsConfig()
        context = checkpoint.text.max_position_embeddings
        self.renderer = ChatRenderer(checkpoint, self.tokenizer, self.limits, max_context=context)
        self._encoder: VisionEncoder | None = None

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        lines = [line for line in read_dataset(self.config).splitlines() if line.strip()][: self.config.samples]
        if not lines:
            raise ConfigError(f"quantization.calibration.dataset: {self.config.dataset} is empty")
        for number, line in enumerate(lines, start=1):
            try:
                yield self._embed(self._prompt(json.loads(line)))
            except (RequestError, ValueError, LookupError, TypeError, AttributeError, OSError) as error:
                sample = f"quantization.calibration.dataset: {self.config.dataset}, sample {number}"
                raise ConfigError(f"{sample}: {_fault(error)}") from error

    def _prompt(self, sample: dict[str, Any]) -> RenderedPrompt:
        if "text" in sample:
            return RenderedPrompt(self.tokenizer.encode(sample["text"], add_special_tokens=False).ids or [0], [], 0)
        files: list[bytes] = []
        messages = [self._take_files(message, files) for message in sample["messages"]]
        source = json.dumps(messages).encode()
        return self.renderer.render(read_messages(source, files, self.limits, roles=self.renderer.roles))

    def _take_files(self, message: dict[str, Any], files: list[bytes]) -> dict[str, Any]:
        """A message as a request has it; files named by parts `{"type": "image", "image": PATH}` go to `files`."""
        if not isinstance(message["content"], list):
            return message
        parts = []
        for part in message["content"]:
            if part.get("type") == "image":
                files.append((Path(self.config.dataset).parent / part["image"]).read_bytes())
                part = {"type": "image"}
            parts.append(part)
        return {**message, "content": parts}

    def _embed(self, prompt: RenderedPrompt) -> tuple[torch.Tensor, torch.Tensor]:
        checkpoint, device = self.checkpoint, self.model.norm.weight.device
        ids = torch.tensor(prompt.token_ids, device=device)
        hidden = self.model.embed(ids)
        if prompt.images:
            (features,) = self._vision().encode([prompt.images])
            if isinstance(features, RequestError):
                raise features
            hidden[ids == checkpoint.image_token_id] = features.to(hidden)
        merge = checkpoint.vision.spatial_merge_size
        grids = [image.grid for image in prompt.images]
        positions, _ = prompt_positions(prompt.token_ids, grids, checkpoint.image_token_id, merge)
        return hidden[:MAX_TOKENS].contiguous(), positions[:, :MAX_TOKENS].contiguous()

    def _vision(self) -> VisionEncoder:
        if self._encoder is None:
            weight = self.model.norm.weight
            self._encoder = VisionEncoder(self.checkpoint, VisionSection(), self.limits, weight.device, weight.dtype)
        return self._encoder
