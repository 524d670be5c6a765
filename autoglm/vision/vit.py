"""The vision transformer of GLM-4.1V: patches of images in, embeddings for the language model out.

Module names follow the checkpoint's (`model.visual.*`).
"""

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import nn

from autoglm.checkpoint import Checkpoint, VisionConfig
from autoglm.layers import RMSNorm
from autoglm.weights import load_parameters, read_weights

Grid = tuple[int, int, int]


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, width, bias=False)
        self.up_proj = nn.Linear(size, width, bias=False)
        self.down_proj = nn.Linear(width, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Full attention inside each image, with a 2D rotary embedding (halves rotated, NEOX order)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.attention_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, rope: torch.Tensor, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
        """x [N, C]; rope [2, N, 1, head_dim] fp32; runs: (images, patches of each), neighbours of equal length."""
        q, k, v = self.qkv(x).view(x.shape[0], 3, self.heads, -1).unbind(1)  # [N, heads, head_dim]
        q, k = rotate(q, rope), rotate(k, rope)
        parts = []
        start = 0
        for images, length in runs:
            part = slice(start, start + images * length)
            query, key, value = (t[part].view(images, length, self.heads, -1).transpose(1, 2) for t in (q, k, v))
            mixed = F.scaled_dot_product_attention(query, key, value)
            parts.append(mixed.transpose(1, 2).reshape(images * length, -1))
            start = part.stop
        return self.proj(torch.cat(parts))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config)
        self.mlp = SwiGLU(config.hidden_size, config.out_hidden_size)

    def forward(self, x: torch.Tensor, rope: torch.Tensor, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), rope, runs)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, hence one product per patch."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel, stride=kernel)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return F.linear(patches.to(self.proj.weight.dtype), self.proj.weight.flatten(1), self.proj.bias)


class PositionEmbedding(nn.Module):
    """A learned square table, read at each patch's relative place in its image by bicubic interpolation in fp32."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.side = config.image_size // config.patch_size
        self.position_embedding = nn.Embedding(self.side**2, config.hidden_size)

    def forward(self, rows: torch.Tensor, cols: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """rows, cols [n] of the patches of one image of height x width patches -> [n, C]."""
        weight = self.position_embedding.weight
        table = weight.float().view(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        places = torch.stack(((cols + 0.5) / width, (rows + 0.5) / height), dim=-1) * 2 - 1
        read = F.grid_sample(table, places[None, :, None], "bicubic", padding_mode="border", align_corners=False)
        return read[0, :, :, 0].T.to(weight.dtype)


class Merger(nn.Module):
    """From a 2x2 group's joint vector to the language model's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.out_hidden_size
        self.proj = nn.Linear(size, size, bias=False)
        self.post_projection_norm = nn.LayerNorm(size)
        self.gate_proj = nn.Linear(size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.post_projection_norm(self.proj(x)))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """Embeds any number of images, packed without padding."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.post_conv_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.embeddings = PositionEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.post_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        merge = config.spatial_merge_size
        self.downsample = nn.Conv2d(config.hidden_size, config.out_hidden_size, merge, stride=merge)
        self.merger = Merger(config)

    @classmethod
    def load(cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> "VisionTransformer":
        """The checkpoint's ViT, its weights cast to `dtype` on `device`."""
        with torch.device("meta"):
            model = cls(checkpoint.vision)
        model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
        load_parameters(model, read_weights(checkpoint, ("model.visual.",), device), {"model.visual.": ""})
        return model

    def forward(self, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Embed packed images.

        Args:
            patches: [N, channels * frames * patch * patch], images one after another, patches in merge-block order.
            grids: (1, height, width) of each image in patches; N is their sum of products.

        Returns:
            [N / merge^2, out_hidden_size], images one after another, rows of merge blocks.
        """
        shapes: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        for _, height, width in grids:
            if (height, width) not in shapes:
                rows, cols = block_order(height, width, self.config.spatial_merge_size, patches.device)
                rope = rotary_table(rows, cols, self.config.head_dim, self.config.rope_theta)
                shapes[height, width] = self.embeddings(rows, cols, height, width), rope
        x = self.post_conv_layernorm(self.patch_embed(patches))
        x = x + torch.cat([shapes[height, width][0] for _, height, width in grids])
        rope = torch.cat([shapes[height, width][1] for _, height, width in grids], dim=1)
        lengths = [height * width for _, height, width in grids]
        runs = [(len(list(run)), length) for length, run in groupby(lengths)]
        for block in self.blocks:
            x = block(x, rope, runs)
        x = self.post_layernorm(x)
        group = self.config.spatial_merge_size**2
        # The convolution's weight is [out, C, 2, 2]: put each group's channels before its places.
        x = x.view(-1, group, x.shape[-1]).transpose(1, 2).flatten(1)
        x = F.linear(x, self.downsample.weight.flatten(1), self.downsample.bias)
        return self.merger(x)  # type: ignore[no-any-return]


def block_order(height: int, width: int, merge: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of each patch in the order in which they are packed: merge block by merge block. Two [h * w]."""
    places = torch.arange(height * width, device=device).view(height // merge, merge, width // merge, merge)
    places = places.permute(0, 2, 1, 3).flatten()
    return places // width, places % width


def rotary_table(rows: torch.Tensor, cols: torch.Tensor, head_dim: int, theta: float) -> torch.Tensor:
    """Cosines and sines of the 2D rotary embedding, [2, n, 1, head_dim] in fp32: angles [row, col, row, col]."""
    half = head_dim // 2
    frequencies = 1.0 / theta ** (torch.arange(0, half, 2, device=rows.device, dtype=torch.float32) / half)
    angles = torch.cat((rows[:, None] * frequencies, cols[:, None] * frequencies), dim=-1).repeat(1, 2)
    return torch.stack((angles.cos(), angles.sin())).unsqueeze(2)


def rotate(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotate the halves of the last dimension against each other, in fp32. x [n, heads, head_dim]."""
    cos, sin = rope
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    turned: torch.Tensor = wide * cos + torch.cat((-second, first), dim=-1) * sin
    return turned.to(x.dtype)
