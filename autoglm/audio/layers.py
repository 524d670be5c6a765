"""Wav2Vec2's layers as matrix products, with frames as rows.

The weights come from transformers' modules. A convolution is one product of its windows and its weights: unlike cuDNN's
convolutions it needs no planning for new lengths, and grouped convolutions are faster. Clips are concatenated; windows
that span two clips yield no frame of either.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

MAX_ELEMENTS = 2**27  # of the windows copied for one product


class Convolution:
    """[rows, channels] -> [(rows - kernel) // stride + 1, channels]"""

    def __init__(self, conv: nn.Conv1d) -> None:
        (self.kernel,), (self.stride,) = conv.kernel_size, conv.stride
        self.weight = conv.weight.transpose(1, 2).flatten(1).contiguous()  # [out, kernel * in]
        self.bias = conv.bias

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        num_rows, channels = rows.shape
        shape = (num_rows - self.kernel) // self.stride + 1, self.kernel * channels
        return F.linear(rows.as_strided(shape, (self.stride * channels, 1)), self.weight, self.bias)


class PositionalConvolution:
    """[n, T, hidden_size] -> the same shape. Clips are zero-padded."""

    def __init__(self, module: Any) -> None:
        """module: transformers' Wav2Vec2PositionalConvEmbedding, its weight norm removed."""
        conv: nn.Conv1d = module.conv
        (self.kernel,), self.groups = conv.kernel_size, conv.groups
        weight = conv.weight.view(self.groups, -1, *conv.weight.shape[1:])  # [groups, out, in, kernel]
        self.weight = weight.permute(0, 3, 2, 1).flatten(1, 2).contiguous()  # [groups, kernel * in, out]
        self.bias: Any = conv.bias
        self.activation = module.activation

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        n, length, size = hidden.shape
        channels, padding = size // self.groups, self.kernel // 2
        padded = F.pad(hidden, (0, 0, padding, padding))
        rows = n * padded.shape[1]
        groups = padded.view(rows, self.groups, channels).transpose(0, 1).contiguous()
        shape = self.groups, rows - self.kernel + 1, self.kernel * channels
        windows = groups.as_strided(shape, (rows * channels, channels, 1))
        groups_at_once = max(1, MAX_ELEMENTS // (shape[1] * shape[2]))
        parts = zip(torch.split(windows, groups_at_once), torch.split(self.weight, groups_at_once), strict=True)
        output = torch.cat([torch.bmm(part, weight) for part, weight in parts])
        output = F.pad(output.transpose(0, 1).flatten(1), (0, 0, 0, self.kernel - 1)).view(n, -1, size)[:, :length]
        return self.activation(output + self.bias)  # type: ignore[no-any-return]


class EncoderLayer:
    """[n, T, hidden_size] -> the same shape: attention, then a feed-forward network."""

    def __init__(self, module: Any, norm_first: bool) -> None:
        """module: transformers' Wav2Vec2EncoderLayer, or Wav2Vec2EncoderLayerStableLayerNorm (pre-norm)."""
        attention = module.attention
        self.num_heads, self.norm_first = attention.num_heads, norm_first
        qkv = attention.q_proj, attention.k_proj, attention.v_proj
        self.weight, self.bias = (torch.cat([getattr(proj, name) for proj in qkv]) for name in ("weight", "bias"))
        self.out = attention.out_proj
        self.norm_1, self.norm_2 = module.layer_norm, module.final_layer_norm
        self.feed_forward = module.feed_forward
        self.adapter = getattr(module, "adapter_layer", None)

    def __call__(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """mask: added to the attention scores, [n, 1, 1, T]."""
        if not self.norm_first:
            hidden = self.norm_1(hidden + self._attend(hidden, mask))
            return self.norm_2(hidden + self._feed(hidden))  # type: ignore[no-any-return]
        hidden = hidden + self._attend(self.norm_1(hidden), mask)
        hidden = hidden + self._feed(self.norm_2(hidden))
        return hidden if self.adapter is None else hidden + self.adapter(hidden)

    def _attend(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        projected = F.linear(hidden, self.weight, self.bias).view(*hidden.shape[:2], 3, self.num_heads, -1)
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, mask)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _feed(self, hidden: torch.Tensor) -> torch.Tensor:
        feed = self.feed_forward
        return feed.output_dense(feed.intermediate_act_fn(feed.intermediate_dense(hidden)))  # type: ignore[no-any-return]
