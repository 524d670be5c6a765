"""The language model of GLM-4.1V: sandwich norms and a partial, interleaved, three-axis rotary embedding.

A forward pass takes packed tokens of any sequences. `Attention` handles positions and keys, `Kernels` the computation.
Modules have the names of the checkpoint (`model.language_model.*`), except that q, k and v are one linear layer.
"""

from collections.abc import Iterable
from typing import Protocol, cast

import torch
from torch import nn

from autoglm.checkpoint import TextConfig
from autoglm.distributed.communicator import Communicator, SingleRank
from autoglm.distributed.shard import Shard
from autoglm.kernels.base import AttentionConfig, Kernels
from autoglm.kernels.reference import dispatch as reference
from autoglm.layers import RMSNorm, fit
from autoglm.quantization.linear import (
    ColumnParallelLinear,
    Int8Linear,
    Linear,
    RowParallelLinear,
    VocabParallelEmbedding,
)


class Attention(Protocol):
    """Causal attention of the tokens of a pass, which also stores their keys and values."""

    def __call__(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """qkv [S, T, (num_heads + 2 * kv_heads) * head_dim], partial sums, not rotated -> [T, num_heads * head_dim]."""


class SelfAttention(nn.Module):
    """Projections: [T, hidden_size] -> q, k, v [T, (num_heads + 2 * kv_heads) * head_dim], and the output back."""

    def __init__(self, config: TextConfig, shard: Shard) -> None:
        super().__init__()
        q, kv = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        self.qkv_proj: Linear | Int8Linear = ColumnParallelLinear(
            config.hidden_size,
            {"q_proj": (q,), "k_proj": (kv,), "v_proj": (kv,)},
            shard,
            bias=True,
            unit=config.head_dim,
        )
        self.o_proj: Linear | Int8Linear = RowParallelLinear(q, config.hidden_size, shard, unit=config.head_dim)


class MLP(nn.Module):
    """The weights of a SwiGLU, down(silu(gate(x)) * up(x)): [T, hidden_size] -> the same shape."""

    def __init__(self, config: TextConfig, shard: Shard) -> None:
        super().__init__()
        size, width = config.hidden_size, config.intermediate_size
        self.gate_up_proj: Linear | Int8Linear = ColumnParallelLinear(size, {"": (width, width)}, shard)
        self.down_proj: Linear | Int8Linear = RowParallelLinear(width, size, shard)


class DecoderLayer(nn.Module):
    """A norm before and after each of the two branches."""

    def __init__(self, config: TextConfig, shard: Shard) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, shard)
        self.mlp = MLP(config, shard)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_self_attn_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_mlp_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LanguageModel(nn.Module):
    """Token embeddings, decoder layers, final norm and output head: [T] token ids -> fp32 [B, vocab_size] logits."""

    attention_config: AttentionConfig  # set by the loader
    kv_scales: torch.Tensor | None = None  # fp32 [2, layers, kv_heads] of keys and values, from a calibration

    def __init__(
        self, config: TextConfig, kernels: Kernels = reference, communicator: Communicator | None = None
    ) -> None:
        super().__init__()
        self.communicator = communicator or SingleRank()
        shard = self.communicator.shard
        self.config = config.shard(shard.size)
        self.kernels = kernels
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, shard)
        self.layers = nn.ModuleList(DecoderLayer(config, shard) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head: Linear | Int8Linear = ColumnParallelLinear(config.hidden_size, {"": (config.vocab_size,)}, shard)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        """Where the model computes; the embedding table may be in host memory."""
        return self.attention_config.rotary_table.device

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, hidden_size]."""
        table = self.embed_tokens
        if self.communicator.shard.size == 1:
            return self.kernels.embed(ids=token_ids, table=table.weight)
        rows = token_ids - table.start
        owned = (rows >= 0) & (rows < table.num_embeddings)
        found = self.kernels.embed(ids=rows * owned, table=table.weight) * owned[:, None]
        return self.communicator.all_reduce(found)

    def forward(self, hidden: torch.Tensor, attention: Attention) -> torch.Tensor:
        """Run the layers over packed tokens.

        Args:
            hidden: [T, hidden_size], embeddings of text and media; may be modified.

        Returns:
            [T, hidden_size] after the final norm.
        """
        kernels, eps = self.kernels, self.config.rms_norm_eps
        rows = hidden.shape[0]
        residual = hidden
        branch, branch_norm = None, None
        for index, layer in enumerate(cast(Iterable[DecoderLayer], self.layers)):
            qkv, o = layer.self_attn.qkv_proj, layer.self_attn.o_proj
            gate_up, down = layer.mlp.gate_up_proj.weight, layer.mlp.down_proj.weight
            x, residual = kernels.add_norm(
                branch=branch,
                residual=residual,
                branch_norm=branch_norm,
                norm=layer.input_layernorm.weight,
                eps=eps,
                quantized=kernels.quantizes(weight=qkv.weight, rows=rows),
            )
            mixed = attention(index, kernels.linear(x=x, weight=qkv.weight, bias=qkv.bias))
            branch = self._reduce(kernels.linear(x=fit(mixed, o.weight, kernels), weight=o.weight))
            x, residual = kernels.add_norm(
                branch=branch,
                residual=residual,
                branch_norm=layer.post_self_attn_layernorm.weight,
                norm=layer.post_attention_layernorm.weight,
                eps=eps,
                quantized=kernels.quantizes(weight=gate_up, rows=rows),
            )
            x = fit(kernels.gate_up(x=x, weight=gate_up), down, kernels)
            branch = self._reduce(kernels.linear(x=x, weight=down))
            branch_norm = layer.post_mlp_layernorm.weight
        x, _ = kernels.add_norm(
            branch=branch, residual=residual, branch_norm=branch_norm, norm=self.norm.weight, eps=eps, quantized=False
        )
        return x.values

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, hidden_size] after the final norm -> fp32 [B, vocab_size]."""
        weight = self.lm_head.weight
        logits = self.kernels.linear(x=fit(hidden, weight, self.kernels), weight=weight)
        return self.communicator.all_gather(logits.squeeze(0).float() if logits.shape[0] == 1 else logits.sum(0))

    def _reduce(self, branch: torch.Tensor) -> torch.Tensor:
        """The ranks' partial sums [S, T, H], added up over the ranks."""
        if self.communicator.shard.size == 1:
            return branch
        return self.communicator.all_reduce(branch if branch.shape[0] == 1 else branch.sum(0, keepdim=True))


def attention_config(
    config: TextConfig, num_positions: int, device: torch.device, dtype: torch.dtype
) -> AttentionConfig:
    """The constants of the attention kernels, with a rotary table for positions 0 to `num_positions` - 1."""
    half = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32)
    frequencies = 1.0 / (config.rope_theta ** (half / config.rotary_dim))
    angles = torch.arange(num_positions, dtype=torch.float32).unsqueeze(1) * frequencies
    table = torch.stack((angles.cos(), angles.sin())).to(device)
    return AttentionConfig(config.num_attention_heads, dtype, table, config.mrope_section)
