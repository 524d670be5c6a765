"""The language model of GLM-4.1V: sandwich norms and a partial, interleaved, three-axis rotary embedding.

A forward pass takes any mix of tokens of any sequences, packed; where they stand, and which keys they see, is the
business of the `Attention` that is handed in. What is computed where is the business of `Kernels`. Module names follow
the checkpoint's (`model.language_model.*`), but for q, k and v, which are one product here.
"""

from collections.abc import Iterable
from typing import Protocol, cast

import torch
from torch import nn

from autoglm.checkpoint import TextConfig
from autoglm.kernels.base import Kernels, Rotary
from autoglm.kernels.reference import dispatch as reference
from autoglm.layers import RMSNorm, fit
from autoglm.quantization.linear import Int8Linear, Linear


class Attention(Protocol):
    """Causal attention over whatever the tokens of this pass may see; it also keeps their keys and values."""

    def __call__(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """qkv [S, T, (heads + 2 * kv_heads) * head_dim], partial sums, not rotated -> [T, heads * head_dim]."""


class SelfAttention(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        q, kv = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        self.qkv_proj: Linear | Int8Linear = Linear(
            config.hidden_size, q + 2 * kv, bias=True, parts={"q_proj": q, "k_proj": kv, "v_proj": kv}
        )
        self.o_proj: Linear | Int8Linear = Linear(q, config.hidden_size)


class MLP(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_up_proj: Linear | Int8Linear = Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj: Linear | Int8Linear = Linear(config.intermediate_size, config.hidden_size)


class Layer(nn.Module):
    """Norms stand before and after both branches."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_self_attn_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_mlp_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LanguageModel(nn.Module):
    rotary: Rotary  # of a loaded model
    kv_scales: torch.Tensor | None = None  # fp32 [2, layers, kv_heads], of keys and of values, where they were measured

    def __init__(self, config: TextConfig, kernels: Kernels = reference) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head: Linear | Int8Linear = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, hidden_size]."""
        return self.kernels.embed(token_ids, self.embed_tokens.weight)

    def forward(self, hidden: torch.Tensor, attention: Attention) -> torch.Tensor:
        """Run the layers over packed tokens.

        Args:
            hidden: [T, hidden_size], embeddings of text and media; may be changed in place.

        Returns:
            [T, hidden_size] after the final norm.
        """
        kernels, eps = self.kernels, self.config.rms_norm_eps
        rows = hidden.shape[0]
        residual = hidden
        branch, branch_norm = None, None
        for index, layer in enumerate(cast(Iterable[Layer], self.layers)):
            qkv, o = layer.self_attn.qkv_proj, layer.self_attn.o_proj
            gate_up, down = layer.mlp.gate_up_proj.weight, layer.mlp.down_proj.weight
            x, residual = kernels.add_norm(
                branch, residual, branch_norm, layer.input_layernorm.weight, eps, kernels.quantizes(qkv.weight, rows)
            )
            mixed = attention(index, kernels.linear(x, qkv.weight, qkv.bias))
            branch = kernels.linear(fit(mixed, o.weight, kernels), o.weight)
            x, residual = kernels.add_norm(
                branch,
                residual,
                layer.post_self_attn_layernorm.weight,
                layer.post_attention_layernorm.weight,
                eps,
                kernels.quantizes(gate_up, rows),
            )
            branch = kernels.linear(fit(kernels.gate_up(x, gate_up), down, kernels), down)
            branch_norm = layer.post_mlp_layernorm.weight
        x, _ = kernels.add_norm(branch, residual, branch_norm, self.norm.weight, eps, False)
        return x.values

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, hidden_size] after the final norm -> fp32 [B, vocab_size]."""
        weight = self.lm_head.weight
        logits = self.kernels.linear(fit(hidden, weight, self.kernels), weight)
        return logits.squeeze(0).float() if logits.shape[0] == 1 else logits.sum(0)


def rotary(config: TextConfig, positions: int, device: torch.device) -> Rotary:
    """The table of cosines and sines for positions 0 to `positions` - 1."""
    half = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32)
    frequencies = 1.0 / (config.rope_theta ** (half / config.rotary_dim))
    angles = torch.arange(positions, dtype=torch.float32).unsqueeze(1) * frequencies
    return Rotary(torch.stack((angles.cos(), angles.sin())).to(device), config.mrope_section)
