"""SmoothQuant (Xiao et al. 2022, equation 4): moves activation outliers into the weights before quantisation.

The factors are powers of two, so that folding them into norms and weights is exact. The input of the attention's output
projection is not smoothed: a value head serves several query heads, whose channels cannot be scaled independently.
"""

from dataclasses import dataclass
from typing import Any

import torch

SMOOTHED = ("self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")
# The checkpoint's names of weights -> the linear layer whose factors multiply their columns.
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
    """The result of a calibration run.

    factors: path of a linear layer, such as `layers.0.mlp.down_proj` -> fp32 [inputs]; empty without smoothing.
    kv_scales: fp32 [2, layers, kv_heads], the fixed scales of keys and values in an FP8 KV cache.
    report: JSON rows, one per linear layer and one per layer's keys and values.
    """

    factors: dict[str, torch.Tensor]
    kv_scales: torch.Tensor
    report: list[dict[str, Any]]

    def smooth(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the checkpoint with the factors folded in."""
        if not self.factors or not name.startswith(LAYERS) or not name.endswith(".weight"):
            return tensor
        layer, _, kind = name.removeprefix(LAYERS).removesuffix(".weight").partition(".")
        if kind in NORMS:
            return tensor.float() / self.factors[f"layers.{layer}.{NORMS[kind]}"]
        if kind not in COLUMNS:
            return tensor
        smoothed = tensor.float() * self.factors[f"layers.{layer}.{COLUMNS[kind]}"]
        if kind == "mlp.gate_up_proj":
            _, up = smoothed.chunk(2)
            up /= self.factors[f"layers.{layer}.mlp.down_proj"].unsqueeze(1)
        return smoothed

    def table(self) -> str:
        """The report as a table: per linear layer the largest input, the median over channels, the largest smoothed."""
        lines = [f"{'layer':<32}{'largest':>10}{'median':>10}{'smoothed':>10}"]
        for row in self.report:
            if "largest" in row:
                lines.append(f"{row['name']:<32}{row['largest']:>10.2f}{row['median']:>10.2f}{row['smoothed']:>10.2f}")
            else:
                lines.append(f"{row['name']:<32}  keys {_format(row['keys'])}  values {_format(row['values'])}")
        return "\n".join(lines)


def smoothing_factors(inputs: torch.Tensor, weights: torch.Tensor, alpha: float) -> torch.Tensor:
    """The powers of two nearest to inputs^alpha / weights^(1 - alpha) in each channel.

    Args:
        inputs, weights: fp32 [K], the largest magnitudes of each input channel and of its weights.
    """
    exponents = inputs.clamp_min(1e-5).log2() * alpha - weights.clamp_min(1e-5).log2() * (1 - alpha)
    return torch.exp2(exponents.round().clamp(-16, 16))


def _format(values: list[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)
