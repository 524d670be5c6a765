"""The vision transformer of GLM-4.1V: patches of images in, embeddings for the language model out.

`Kernels` do the computation. Modules have the names of the checkpoint (`model.visual.*`), except that gate and up are
one linear layer.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import nn

from autoglm.checkpoint import Checkpoint, VisionConfig
from autoglm.kernels import get_kernels
from autoglm.kernels.base import Activation, Kernels, VarlenPacking
from autoglm.kernels.reference import dispatch as reference
from autoglm.layers import RMSNorm, fit
from autoglm.quantization.linear import Int8Linear, Linear
from autoglm.weights.reader import load_parameters, read_weights

Grid = tuple[int, int, int]
Shape = tuple[int, int]  # rows and columns of patches
Positions = tuple[torch.Tensor, torch.Tensor]  # embeddings [n, C] and angles, fp32 [2, n, head_dim / 2]

CACHED_SHAPES = 4  # shapes whose positions are cached on the device: 50 MB for a 1080x2400 screenshot
CHANNELS = 32  # channels of the position table that are interpolated together


@dataclass(frozen=True)
class Layout:
    """The inputs of a pass that depend only on the shapes of its images.

    positions: position embeddings [N, C].
    angles: cosines and sines of the rotary embedding, fp32 [2, N, head_dim / 2].
    """

    positions: torch.Tensor
    angles: torch.Tensor
    packing: VarlenPacking


@dataclass(frozen=True)
class PatchCoordinates:
    """The coordinates of packed patches, in merge-block order.

    All int64 [N]: row and column of a patch, height and width of its image in patches.
    """

    rows: torch.Tensor
    cols: torch.Tensor
    heights: torch.Tensor
    widths: torch.Tensor


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj: Linear | Int8Linear = Linear(size, 2 * width, parts={"gate_proj": width, "up_proj": width})
        self.down_proj: Linear | Int8Linear = Linear(width, size)

    def forward(self, x: Activation, kernels: Kernels) -> torch.Tensor:
        """[N, size] -> partial sums [S, N, size]."""
        down = self.down_proj.weight
        return kernels.linear(x=fit(kernels.gate_up(x=x, weight=self.gate_up_proj.weight), down, kernels), weight=down)


class VisionAttention(nn.Module):
    """Full attention within each image, with a 2D rotary embedding in NEOX order."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv: Linear | Int8Linear = Linear(config.hidden_size, 3 * config.hidden_size, config.attention_bias)
        self.proj: Linear | Int8Linear = Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, x: Activation, angles: torch.Tensor, packing: VarlenPacking, dtype: torch.dtype, kernels: Kernels
    ) -> torch.Tensor:
        """[N, C] -> partial sums [S, N, C]; angles fp32 [2, N, head_dim / 2]."""
        qkv = kernels.linear(x=x, weight=self.qkv.weight, bias=self.qkv.bias)
        q, k, v = kernels.rotate_heads(qkv=qkv, angles=angles, num_heads=self.num_heads, dtype=dtype)
        mixed = kernels.image_attention(q=q, k=k, v=v, packing=packing)
        return kernels.linear(x=fit(mixed, self.proj.weight, kernels), weight=self.proj.weight)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = VisionAttention(config)
        self.mlp = SwiGLU(config.hidden_size, config.out_hidden_size)

    def forward(
        self,
        branch: torch.Tensor | None,
        residual: torch.Tensor,
        angles: torch.Tensor,
        packing: VarlenPacking,
        kernels: Kernels,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes and returns the branch [S, N, C], not yet added to the residual, and the residual [N, C]."""
        rows, dtype = residual.shape[0], residual.dtype
        quantized = kernels.quantizes(weight=self.attn.qkv.weight, rows=rows)
        x, residual = _add_norm(kernels, branch, residual, self.norm1, quantized)
        branch = self.attn(x, angles, packing, dtype, kernels)
        quantized = kernels.quantizes(weight=self.mlp.gate_up_proj.weight, rows=rows)
        x, residual = _add_norm(kernels, branch, residual, self.norm2, quantized)
        return self.mlp(x, kernels), residual


class PatchEmbed(nn.Module):
    """A convolution whose stride equals its kernel size, so it is one linear layer per patch."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel, stride=kernel)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return F.linear(patches.to(self.proj.weight.dtype), self.proj.weight.flatten(1), self.proj.bias)


class PositionEmbedding(nn.Module):
    """A learned square table, interpolated bicubically in fp32 at each patch's relative coordinates in its image."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.side = config.image_size // config.patch_size
        self.position_embedding = nn.Embedding(self.side**2, config.hidden_size)

    def forward(self, patches: PatchCoordinates) -> torch.Tensor:
        """[N, C]. Channels are processed in groups, because one GPU thread computes all channels of a point."""
        weight = self.position_embedding.weight
        size = weight.shape[1]
        group = math.gcd(size, CHANNELS)
        table = weight.float().view(self.side, self.side, size // group, group).permute(2, 3, 0, 1)
        x, y = (patches.cols + 0.5) / patches.widths, (patches.rows + 0.5) / patches.heights
        points = (torch.stack((x, y), dim=-1) * 2 - 1).expand(len(table), 1, -1, 2)
        sampled = F.grid_sample(table, points, "bicubic", padding_mode="border", align_corners=False)
        return sampled.view(size, -1).T.to(weight.dtype).contiguous()


class Merger(nn.Module):
    """Maps the vector of a 2x2 group of patches to the language model's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size, width = config.out_hidden_size, config.intermediate_size
        self.proj = Linear(size, size)
        self.post_projection_norm = nn.LayerNorm(size)
        self.gate_up_proj = Linear(size, 2 * width, parts={"gate_proj": width, "up_proj": width})
        self.down_proj = Linear(width, size)

    def forward(self, x: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        x = F.gelu(self.post_projection_norm(self.proj(x)))
        gated = kernels.gate_up(x=Activation(x), weight=self.gate_up_proj.weight)
        return self.down_proj(gated)  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """Embeds images packed without padding."""

    def __init__(self, config: VisionConfig, kernels: Kernels = reference) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.patch_embed = PatchEmbed(config)
        self.post_conv_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.embeddings = PositionEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.post_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        merge = config.spatial_merge_size
        self.downsample = nn.Conv2d(config.hidden_size, config.out_hidden_size, merge, stride=merge)
        self.merger = Merger(config)
        self._cached_positions: OrderedDict[Shape, Positions] = OrderedDict()

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, int8: bool = False
    ) -> "VisionTransformer":
        """The checkpoint's ViT on `device`, its weights in `dtype`; `int8` rounds those of the blocks' linear layers to
        INT8 with one scale per row."""
        model = cls.empty(checkpoint, device, dtype, int8)
        model.fill(checkpoint)
        return model

    @classmethod
    def empty(
        cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, int8: bool = False
    ) -> "VisionTransformer":
        """The same with uninitialised weights."""
        with torch.device("meta"):
            model = cls(checkpoint.vision, get_kernels(device)).to(dtype)
            if int8:
                model.to_int8()
        return model.to_empty(device=device).requires_grad_(False).eval()

    def to_int8(self) -> None:
        """Replace the linear layers of the blocks by INT8 ones with one scale per row, uninitialised."""
        for layer in list(self.blocks.modules()):
            for name, linear in layer.named_children():
                if isinstance(linear, Linear):
                    setattr(layer, name, linear.to_int8(symmetric=True, grouped=False))

    def fill(self, checkpoint: Checkpoint) -> None:
        """Read the weights from the checkpoint."""
        device = self.patch_embed.proj.weight.device
        weights = read_weights(checkpoint, ("model.visual.",), device)
        load_parameters(self, weights, {"model.visual.": ""})

    def forward(self, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Embed packed images.

        Args:
            patches: [N, channels * frames * patch * patch], images one after another, patches in merge-block order.
            grids: (1, height, width) of each image in patches; N is the sum of their products.

        Returns:
            [N / merge^2, out_hidden_size], one row per merge block, images one after another.
        """
        return self.embed(patches, self.layout(grids))

    def layout(self, grids: Sequence[Grid]) -> Layout:
        """The inputs of `embed` that depend on the grids only; reusable for any number of passes."""
        shapes = [(height, width) for _, height, width in grids]
        positions, angles = self._positions(shapes)
        lengths = tuple(height * width for height, width in shapes)
        packing = self.kernels.pack_varlen(lengths=lengths, device=positions.device)
        return Layout(positions, angles, packing)

    def embed(self, patches: torch.Tensor, layout: Layout) -> torch.Tensor:
        """See `forward`. It only launches kernels, so it can be captured in a CUDA graph."""
        kernels = self.kernels
        x, _ = _add_norm(kernels, None, self.patch_embed(patches), self.post_conv_layernorm)
        residual = x.values + layout.positions
        branch = None
        for block in self.blocks:
            branch, residual = block(branch, residual, layout.angles, layout.packing, kernels)
        last, _ = _add_norm(kernels, branch, residual, self.post_layernorm)
        group = self.config.spatial_merge_size**2
        # The convolution's weight is [out, C, 2, 2]: the channel varies slower than the patch within a group.
        grouped = last.values.view(-1, group, self.config.hidden_size).transpose(1, 2).flatten(1)
        merged = F.linear(grouped, self.downsample.weight.flatten(1), self.downsample.bias)
        return self.merger(merged, kernels)  # type: ignore[no-any-return]

    def _positions(self, shapes: Sequence[Shape]) -> Positions:
        """The positions of images of these shapes, concatenated. Shapes that are not cached are computed together.

        The most recent shapes are cached unless the weights are being trained.
        """
        cache, trained = self._cached_positions, self.embeddings.position_embedding.weight.requires_grad
        distinct = list(dict.fromkeys(shapes))
        found = {} if trained else {shape: hit for shape in distinct if (hit := cache.get(shape)) is not None}
        new = [shape for shape in distinct if shape not in found]
        if new:
            found.update(zip(new, self._compute_positions(new), strict=True))
        if not trained:
            for shape in distinct[-CACHED_SHAPES:]:
                cache.pop(shape, None)
                positions, angles = found[shape]
                # Cloned, because a view would keep alive the memory of all shapes computed together.
                cache[shape] = (positions.clone(), angles.clone()) if len(new) > 1 else (positions, angles)
            while len(cache) > CACHED_SHAPES:
                cache.popitem(last=False)
        if len(shapes) == 1:
            return found[shapes[0]]
        parts = [found[shape] for shape in shapes]
        return torch.cat([positions for positions, _ in parts]), torch.cat([angles for _, angles in parts], dim=1)

    def _compute_positions(self, shapes: Sequence[Shape]) -> Iterator[Positions]:
        """The positions of one image of each shape, views of the same memory."""
        patches = patch_coordinates(
            shapes, self.config.spatial_merge_size, self.embeddings.position_embedding.weight.device
        )
        angles = rotary_angles(patches.rows, patches.cols, self.config.head_dim, self.config.rope_theta)
        lengths = [height * width for height, width in shapes]
        positions = self.embeddings(patches).split_with_sizes(lengths)
        return zip(positions, angles.split_with_sizes(lengths, dim=1), strict=True)


def _add_norm(
    kernels: Kernels, branch: torch.Tensor | None, residual: torch.Tensor, norm: RMSNorm, quantized: bool = False
) -> tuple[Activation, torch.Tensor]:
    return kernels.add_norm(
        branch=branch, residual=residual, branch_norm=None, norm=norm.weight, eps=norm.eps, quantized=quantized
    )


def patch_coordinates(shapes: Sequence[Shape], merge: int, device: torch.device) -> PatchCoordinates:
    """The coordinates of all patches of images of these shapes, images one after another."""
    starts = accumulate((height * width for height, width in shapes), initial=0)
    table = [(height, width, start) for (height, width), start in zip(shapes, starts, strict=False)]
    images = torch.tensor(table).to(device, non_blocking=True)  # must not wait for earlier passes
    total = sum(height * width for height, width in shapes)
    heights, widths, first = images.repeat_interleave(images[:, 0] * images[:, 1], dim=0, output_size=total).unbind(1)
    indices = torch.arange(total, device=device) - first
    block, within = indices // merge**2, indices % merge**2
    blocks_per_row = widths // merge
    rows = block // blocks_per_row * merge + within // merge
    cols = block % blocks_per_row * merge + within % merge
    return PatchCoordinates(rows, cols, heights, widths)


def rotary_angles(rows: torch.Tensor, cols: torch.Tensor, head_dim: int, theta: float) -> torch.Tensor:
    """Cosines and sines of the 2D rotary embedding, fp32 [2, n, head_dim / 2]: first half by row, second by column."""
    half = head_dim // 2
    frequencies = 1.0 / theta ** (torch.arange(0, half, 2, device=rows.device, dtype=torch.float32) / half)
    angles = torch.cat((rows[:, None] * frequencies, cols[:, None] * frequencies), dim=-1)
    return torch.stack((angles.cos(), angles.sin()))
