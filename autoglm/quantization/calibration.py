"""Calibration: what the unquantised model's layers see on samples, and what follows from it for quantisation.

The largest magnitude of every input channel decides how much of it moves into the weights (SmoothQuant, Xiao et al.
2022, equation 4), and the largest key and value of every head the fixed scales of an FP8 KV cache. Channels are
smoothed by powers of two, so that folding the factors into norms and weights rounds nothing. What comes out of
attention is left as it is: a value head serves several query heads, whose channels cannot be smoothed apart.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from tokenizers import Tokenizer
from torch import nn

from autoglm.chat import ChatRenderer, Prompt
from autoglm.checkpoint import Checkpoint
from autoglm.config import CalibrationConfig, ConfigError, LimitsConfig, VisionSection
from autoglm.errors import RequestError
from autoglm.kernels import Activation, Kernels, Weight
from autoglm.llm.positions import prompt_positions
from autoglm.llm.prefill import prefill
from autoglm.messages import read_messages
from autoglm.vision.encoder import VisionEncoder

if TYPE_CHECKING:
    from autoglm.llm.model import LanguageModel

MAX_TOKENS = 8192  # of one sample; what comes after is left out
FP8_LARGEST = 448.0  # of float8_e4m3fn
SMOOTHED = ("self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")
# Weights of a layer as the checkpoint names them -> the linear layer whose factors multiply their columns.
COLUMNS = {
    "self_attn.q_proj": SMOOTHED[0],
    "self_attn.k_proj": SMOOTHED[0],
    "self_attn.v_proj": SMOOTHED[0],
    "mlp.gate_up_proj": SMOOTHED[1],
    "mlp.down_proj": SMOOTHED[2],
}
NORMS = {"input_layernorm": SMOOTHED[0], "post_attention_layernorm": SMOOTHED[1]}  # divided by the factors instead
LAYERS = "model.language_model.layers."


@dataclass(frozen=True)
class Calibration:
    """factors: layer's path, such as `layers.0.mlp.down_proj` -> fp32 [inputs], empty without smoothing.
    kv_scales: fp32 [2, layers, kv_heads], of keys and of values. report: a row for every linear layer, and one for
    every layer's keys and values, as JSON."""

    factors: dict[str, torch.Tensor]
    kv_scales: torch.Tensor
    report: list[dict[str, Any]]

    def smooth(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A checkpoint's tensor with the factors folded in."""
        if not self.factors or not name.startswith(LAYERS) or not name.endswith(".weight"):
            return tensor
        layer, _, kind = name.removeprefix(LAYERS).removesuffix(".weight").partition(".")
        if kind in NORMS:
            return tensor.float() / self.factors[f"layers.{layer}.{NORMS[kind]}"]
        if kind not in COLUMNS:
            return tensor
        wide = tensor.float() * self.factors[f"layers.{layer}.{COLUMNS[kind]}"]
        if kind == "mlp.gate_up_proj":
            _, up = wide.chunk(2)
            up /= self.factors[f"layers.{layer}.mlp.down_proj"].unsqueeze(1)
        return wide

    def table(self) -> str:
        """The largest input of every linear layer, the median channel's, and the largest after smoothing."""
        lines = [f"{'layer':<32}{'largest':>10}{'median':>10}{'smoothed':>10}"]
        for row in self.report:
            if "largest" in row:
                lines.append(f"{row['name']:<32}{row['largest']:>10.2f}{row['median']:>10.2f}{row['smoothed']:>10.2f}")
            else:
                lines.append(f"{row['name']:<32}  keys {_shown(row['keys'])}  values {_shown(row['values'])}")
        return "\n".join(lines)


@torch.inference_mode()
def calibrate(model: "LanguageModel", checkpoint: Checkpoint, config: CalibrationConfig) -> Calibration:
    """Run the samples through a model in float, and draw the conclusions.

    Raises:
        ConfigError: the dataset is missing or empty, or a line of it is no sample.
    """
    recorder = _Recorder(model.kernels)
    heads = (2, model.config.num_hidden_layers, model.config.num_key_value_heads)
    kv_largest = torch.zeros(heads, device=model.norm.weight.device)
    kernels, model.kernels = model.kernels, cast(Kernels, recorder)
    try:
        for hidden, positions in _Samples(model, checkpoint, config):
            _, cache = prefill(model, hidden, positions)
            length = hidden.shape[0]
            for kind, kept in enumerate((cache.keys, cache.values)):
                kv_largest[kind] = torch.maximum(kv_largest[kind], kept[:, :length].abs().amax((1, 3)).float())
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
            factors[path] = _factors(largest, layer.weight.abs().amax(0).float(), config.smoothing)
            smoothed = largest / factors[path]
        row = {"largest": largest.max(), "median": largest.median(), "smoothed": smoothed.max()}
        report.append({"name": path} | {key: round(float(value), 4) for key, value in row.items()})
    for index, (keys, values) in enumerate(zip(*kv_largest.tolist(), strict=True)):
        report.append({"name": f"layers.{index}", "keys": keys, "values": values})
    return Calibration(factors, (kv_largest / FP8_LARGEST).clamp_min(1e-12), report)


def dataset_digest(config: CalibrationConfig) -> str:
    """Of the file of samples; images that it names are not covered."""
    return hashlib.sha256(_read_dataset(config)).hexdigest()[:16]


class _Recorder:
    """Kernels that note the largest magnitude of each channel that meets a weight."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.largest: dict[int, torch.Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernels, name)

    def linear(self, x: Activation, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        self._note(x, weight)
        return self.kernels.linear(x, weight, bias)

    def gate_up(self, x: Activation, weight: Weight) -> torch.Tensor:
        self._note(x, weight)
        return self.kernels.gate_up(x, weight)

    def _note(self, x: Activation, weight: Weight) -> None:
        largest = x.values.abs().amax(0).float()
        before = self.largest.get(id(weight))
        self.largest[id(weight)] = largest if before is None else torch.maximum(before, largest)


class _Samples:
    """The dataset's lines as the model takes them: embeddings [T, hidden_size] and positions int32 [3, T]."""

    def __init__(self, model: "LanguageModel", checkpoint: Checkpoint, config: CalibrationConfig) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.config = config
        self.tokenizer = Tokenizer.from_file(str(checkpoint.path / "tokenizer.json"))
        self.limits = LimitsConfig()
        context = checkpoint.text.max_position_embeddings
        self.renderer = ChatRenderer(checkpoint, self.tokenizer, self.limits, context)
        self._encoder: VisionEncoder | None = None

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        lines = [line for line in _read_dataset(self.config).splitlines() if line.strip()][: self.config.samples]
        if not lines:
            raise ConfigError(f"quantization.calibration.dataset: {self.config.dataset} is empty")
        for number, line in enumerate(lines, start=1):
            try:
                yield self._embed(self._prompt(json.loads(line)))
            except (RequestError, ValueError, LookupError, TypeError, OSError) as error:
                where = f"quantization.calibration.dataset: {self.config.dataset}, sample {number}"
                raise ConfigError(f"{where}: {error}") from error

    def _prompt(self, sample: dict[str, Any]) -> Prompt:
        if "text" in sample:
            return Prompt(self.tokenizer.encode(sample["text"], add_special_tokens=False).ids or [0], [], 0)
        files: list[bytes] = []
        messages = [self._take_files(message, files) for message in sample["messages"]]
        source = json.dumps(messages).encode()
        return self.renderer.render(read_messages(source, files, self.limits, self.renderer.roles))

    def _take_files(self, message: dict[str, Any], files: list[bytes]) -> dict[str, Any]:
        """A message as a request has it, the files that its parts `{"type": "image", "image": PATH}` name beside it."""
        if not isinstance(message["content"], list):
            return message
        parts = []
        for part in message["content"]:
            if part.get("type") == "image":
                files.append((Path(self.config.dataset).parent / part["image"]).read_bytes())
                part = {"type": "image"}
            parts.append(part)
        return {**message, "content": parts}

    def _embed(self, prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
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


def _read_dataset(config: CalibrationConfig) -> bytes:
    try:
        return Path(config.dataset).read_bytes()
    except OSError as error:
        raise ConfigError(f"quantization.calibration.dataset: {config.dataset}: {error.strerror}") from None


def _factors(inputs: torch.Tensor, weights: torch.Tensor, alpha: float) -> torch.Tensor:
    """Powers of two near inputs^alpha / weights^(1 - alpha), channel by channel."""
    wanted = inputs.clamp_min(1e-5).log2() * alpha - weights.clamp_min(1e-5).log2() * (1 - alpha)
    return torch.exp2(wanted.round().clamp(-16, 16))


def _shown(numbers: list[float]) -> str:
    return " ".join(f"{number:.2f}" for number in numbers)
