"""The language model of GLM-4.1V: sandwich norms and a partial, interleaved, three-axis rotary embedding.

A forward pass takes any mix of tokens of any sequences, packed; which keys a token sees is the business of the
`Attention` that is handed in. Module names follow the checkpoint's (`model.language_model.*`), but for q, k and v,
which are one product here.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from autoglm.checkpoint import Checkpoint, TextConfig
from autoglm.layers import RMSNorm
from autoglm.weights import load_parameters, read_weights


class Attention(Protocol):
    """Causal attention over whatever the tokens of this pass may see; it also keeps their keys and values."""

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [T, heads, head_dim], k and v [T, kv_heads, head_dim], all rotated -> [T, heads, head_dim]."""


class SelfAttention(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.heads) * config.head_dim)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, layer: int, rope: torch.Tensor, attention: Attention) -> torch.Tensor:
        q, k, v = self.qkv_proj(x).view(x.shape[0], -1, self.config.head_dim).split(self.heads, dim=1)
        mixed = attention(layer, rotate(q, rope), rotate(k, rope), v)
        return self.o_proj(mixed.flatten(1))  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * F.silu(gate))  # type: ignore[no-any-return]


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

    def forward(self, x: torch.Tensor, layer: int, rope: torch.Tensor, attention: Attention) -> torch.Tensor:
        x = x + self.post_self_attn_layernorm(self.self_attn(self.input_layernorm(x), layer, rope, attention))
        return x + self.post_mlp_layernorm(self.mlp(self.post_attention_layernorm(x)))  # type: ignore[no-any-return]


class LanguageModel(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @classmethod
    def load(cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> "LanguageModel":
        """The checkpoint's language model, its weights cast to `dtype` on `device`."""
        config = checkpoint.text
        with torch.device("meta"):
            model = cls(config)
        model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
        prefixes = {"model.language_model.": ""}
        if config.tie_word_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        else:
            prefixes["lm_head."] = "lm_head."
        query, key = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        fused = {
            "q_proj": ("qkv_proj", slice(0, query)),
            "k_proj": ("qkv_proj", slice(query, query + key)),
            "v_proj": ("qkv_proj", slice(query + key, query + 2 * key)),
        }
        load_parameters(model, read_weights(checkpoint, tuple(prefixes), device), prefixes, fused)
        return model

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, hidden_size]."""
        return self.embed_tokens(token_ids)  # type: ignore[no-any-return]

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor, attention: Attention) -> torch.Tensor:
        """Run the layers over packed tokens.

        Args:
            hidden: [T, hidden_size], embeddings of text and media.
            positions: int [3, T], see `prompt_positions`.

        Returns:
            [T, hidden_size] after the final norm.
        """
        rope = rotary_table(positions, self.config, hidden.dtype)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, index, rope, attention)
        return self.norm(hidden)  # type: ignore[no-any-return]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] after the final norm -> [..., vocab_size]."""
        return self.lm_head(hidden)  # type: ignore[no-any-return]


def rotary_table(positions: torch.Tensor, config: TextConfig, dtype: torch.dtype) -> torch.Tensor:
    """Cosines and sines, [2, T, 1, rotary_dim / 2]: frequencies in three contiguous runs, one for each axis."""
    half = torch.arange(0, config.rotary_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / (config.rope_theta ** (half / config.rotary_dim))
    angles = positions.float().unsqueeze(-1) * frequencies  # [3, T, rotary_dim / 2]
    runs = torch.split(angles, list(config.mrope_section), dim=-1)
    angles = torch.cat([run[axis] for axis, run in enumerate(runs)], dim=-1)
    return torch.stack((angles.cos(), angles.sin())).unsqueeze(2).to(dtype)


def rotate(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs (GPT-J order) of the first rotary_dim dimensions. x [T, heads, head_dim]."""
    cos, sin = rope
    size = 2 * cos.shape[-1]
    even, odd = x[..., 0:size:2], x[..., 1:size:2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((turned, x[..., size:]), dim=-1)
