"""The vision transformer of GLM-4.1V: patches of images in, embeddings for the language model out.

What is computed where is the business of `Kernels`. Module names follow the checkpoint's (`model.visual.*`), but for
gate and up, which are one product here.
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
from autoglm.kernels.base import Activation, Kernels, Packing
from autoglm.kernels.reference import dispatch as reference
from autoglm.layers import RMSNorm, fit
from autoglm.quantization.linear import Int8Linear, Linear
from autoglm.weights.reader import load_parameters, read_weights

Grid = tuple[int, int, int]
Shape = tuple[int, int]  # rows and columns of patches
Positions = tuple[torch.Tensor, torch.Tensor]  # embeddings [n, C] and rotary angles, fp32 [2, n, head_dim / 2]

KEPT_SHAPES = 4  # whose positions stay on the device: 50 MB for a screenshot of 1080x2400
CHANNELS = 32  # of the position table that are read together


@dataclass(frozen=True)
class Layout:
    """What follows from the shapes of a pass's images, one behind another.

    positions: embeddings [N, C].
    angles: cosines and sines of the rotary embedding, fp32 [2, N, head_dim / 2].
    """

    positions: torch.Tensor
    angles: torch.Tensor
    packing: Packing


@dataclass(frozen=True)
class Places:
    """Where the patches of images stand, in the order in which they are packed: merge block by merge block.

    All int64 [N]: a patch's row and column, and the height and width of its image.
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
        return kernels.linear(fit(kernels.gate_up(x, self.gate_up_proj.weight), down, kernels), down)


class Attention(nn.Module):
    """Full attention inside each image, with a 2D rotary embedding (halves rotated, NEOX order)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv: Linear | Int8Linear = Linear(config.hidden_size, 3 * config.hidden_size, config.attention_bias)
        self.proj: Linear | Int8Linear = Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, x: Activation, angles: torch.Tensor, packing: Packing, dtype: torch.dtype, kernels: Kernels
    ) -> torch.Tensor:
        """[N, C] -> partial sums [S, N, C]; angles fp32 [2, N, head_dim / 2]."""
        qkv = kernels.linear(x, self.qkv.weight, self.qkv.bias)
        mixed = kernels.image_attention(*kernels.rotate_heads(qkv, angles, self.heads, dtype), packing)
        return kernels.linear(fit(mixed, self.proj.weight, kernels), self.proj.weight)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config)
        self.mlp = SwiGLU(config.hidden_size, config.out_hidden_size)

    def forward(
        self,
        branch: torch.Tensor | None,
        residual: torch.Tensor,
        angles: torch.Tensor,
        packing: Packing,
        kernels: Kernels,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes and returns the branch [S, N, C] that is still to be added, and the residual [N, C]."""
        rows, dtype = residual.shape[0], residual.dtype
        quantized = kernels.quantizes(self.attn.qkv.weight, rows)
        x, residual = kernels.add_norm(branch, residual, None, self.norm1.weight, self.norm1.eps, quantized)
        branch = self.attn(x, angles, packing, dtype, kernels)
        quantized = kernels.quantizes(self.mlp.gate_up_proj.weight, rows)
        x, residual = kernels.add_norm(branch, residual, None, self.norm2.weight, self.norm2.eps, quantized)
        return self.mlp(x, kernels), residual


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

    def forward(self, places: Places) -> torch.Tensor:
        """[N, C]. The table is read in groups of channels: a GPU's thread takes a place's channels one by one."""
        weight = self.position_embedding.weight
        size = weight.shape[1]
        group = math.gcd(size, CHANNELS)
        table = weight.float().view(self.side, self.side, size // group, group).permute(2, 3, 0, 1)
        across, down = (places.cols + 0.5) / places.widths, (places.rows + 0.5) / places.heights
        points = (torch.stack((across, down), dim=-1) * 2 - 1).expand(len(table), 1, -1, 2)
        read = F.grid_sample(table, points, "bicubic", padding_mode="border", align_corners=False)
        return read.view(size, -1).T.to(weight.dtype).contiguous()


class Merger(nn.Module):
    """From a 2x2 group's joint vector to the language model's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size, width = config.out_hidden_size, config.intermediate_size
        self.proj = Linear(size, size)
        self.post_projection_norm = nn.LayerNorm(size)
        self.gate_up_proj = Linear(size, 2 * width, parts={"gate_proj": width, "up_proj": width})
        self.down_proj = Linear(width, size)

    def forward(self, x: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        x = F.gelu(self.post_projection_norm(self.proj(x)))
        return self.down_proj(kernels.gate_up(Activation(x), self.gate_up_proj.weight))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """Embeds any number of images, packed without padding."""

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
        self._kept: OrderedDict[Shape, Positions] = OrderedDict()

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, int8: bool = False
    ) -> "VisionTransformer":
        """The checkpoint's ViT, its weights cast to `dtype` on `device`; with `int8` those of the blocks' products
        are rounded to 8 bits, one scale for each row."""
        model = cls.empty(checkpoint, device, dtype, int8)
        model.fill(checkpoint)
        return model

    @classmethod
    def empty(
        cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, int8: bool = False
    ) -> "VisionTransformer":
        """The same before its weights are filled."""
        with torch.device("meta"):
            model = cls(checkpoint.vision, get_kernels(device)).to(dtype)
            if int8:
                model.to_int8()
        return model.to_empty(device=device).requires_grad_(False).eval()

    def to_int8(self) -> None:
        """Replace the linear layers of the blocks by INT8 ones, one scale a row, whose memory is not filled."""
        for layer in list(self.blocks.modules()):
            for name, linear in layer.named_children():
                if isinstance(linear, Linear):
                    setattr(layer, name, linear.to_int8(symmetric=True, grouped=False))

    def fill(self, checkpoint: Checkpoint) -> None:
        """Read the weights from the checkpoint's files."""
        device = self.patch_embed.proj.weight.device
        weights = read_weights(checkpoint, ("model.visual.",), device)
        load_parameters(self, weights, {"model.visual.": ""})

    def forward(self, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Embed packed images.

        Args:
            patches: [N, channels * frames * patch * patch], images one after another, patches in merge-block order.
            grids: (1, height, width) of each image in patches; N is their sum of products.

        Returns:
            [N / merge^2, out_hidden_size], images one after another, rows of merge blocks.
        """
        return self.embed(patches, self.lay_out(grids))

    def lay_out(self, grids: Sequence[Grid]) -> Layout:
        """What `embed` needs to know of images of these grids; it may be used for any number of passes."""
        shapes = [(height, width) for _, height, width in grids]
        positions, angles = self._positions(shapes)
        packing = self.kernels.pack(tuple(height * width for height, width in shapes), positions.device)
        return Layout(positions, angles, packing)

    def embed(self, patches: torch.Tensor, layout: Layout) -> torch.Tensor:
        """See `forward`. Only launches kernels, so that it can be captured in a CUDA graph."""
        kernels = self.kernels
        norm = self.post_conv_layernorm
        x, _ = kernels.add_norm(None, self.patch_embed(patches), None, norm.weight, norm.eps, False)
        residual = x.values + layout.positions
        branch = None
        for block in self.blocks:
            branch, residual = block(branch, residual, layout.angles, layout.packing, kernels)
        norm = self.post_layernorm
        last, _ = kernels.add_norm(branch, residual, None, norm.weight, norm.eps, False)
        group = self.config.spatial_merge_size**2
        # The convolution's weight is [out, C, 2, 2]: put each group's channels before its places.
        places = last.values.view(-1, group, self.config.hidden_size).transpose(1, 2).flatten(1)
        merged = F.linear(places, self.downsample.weight.flatten(1), self.downsample.bias)
        return self.merger(merged, kernels)  # type: ignore[no-any-return]

    def _positions(self, shapes: Sequence[Shape]) -> Positions:
        """Of images of these shapes, one behind another; those of shapes that are not kept are computed together.

        While weights rest, those of the last few shapes are kept.
        """
        learns = self.embeddings.position_embedding.weight.requires_grad
        distinct = list(dict.fromkeys(shapes))
        found = {} if learns else {shape: kept for shape in distinct if (kept := self._kept.get(shape)) is not None}
        new = [shape for shape in distinct if shape not in found]
        if new:
            found.update(zip(new, self._compute_positions(new), strict=True))
        if not learns:
            for shape in distinct[-KEPT_SHAPES:]:
                self._kept.pop(shape, None)
                # A part of what was computed together would hold the memory of all of it.
                positions, angles = found[shape]
                self._kept[shape] = (positions.clone(), angles.clone()) if len(new) > 1 else (positions, angles)
            while len(self._kept) > KEPT_SHAPES:
                self._kept.popitem(last=False)
        if len(shapes) == 1:
            return found[shapes[0]]
        parts = [found[shape] for shape in shapes]
        return torch.cat([positions for positions, _ in parts]), torch.cat([angles for _, angles in parts], dim=1)

    def _compute_positions(self, shapes: Sequence[Shape]) -> Iterator[Positions]:
        """Of one image of each shape, parts of the same memory."""
        places = block_order(shapes, self.config.spatial_merge_size, self.embeddings.position_embedding.weight.device)
        angles = rotary_angles(places.rows, places.cols, self.config.head_dim, self.config.rope_theta)
        lengths = [height * width for height, width in shapes]
        positions = self.embeddings(places).split_with_sizes(lengths)
        return zip(positions, angles.split_with_sizes(lengths, dim=1), strict=True)


def block_order(shapes: Sequence[Shape], merge: int, device: torch.device) -> Places:
    """The places of all patches of images of these shapes, one image behind another."""
    starts = accumulate((height * width for height, width in shapes), initial=0)
    table = [(height, width, start) for (height, width), start in zip(shapes, starts, strict=False)]
    images = torch.tensor(table).to(device, non_blocking=True)  # must not wait for the pass in front
    total = sum(height * width for height, width in shapes)
    each = images.repeat_interleave(images[:, 0] * images[:, 1], dim=0, output_size=total)
    heights, widths, begins = each.unbind(1)
    places = torch.arange(total, device=device) - begins
    block, inside = places // merge**2, places % merge**2
    across = widths // merge
    rows, cols = block // across * merge + inside // merge, block % across * merge + inside % merge
    return Places(rows, cols, heights, widths)


def rotary_angles(rows: torch.Tensor, cols: torch.Tensor, head_dim: int, theta: float) -> torch.Tensor:
    """Cosines and sines of the 2D rotary embedding, fp32 [2, n, head_dim / 2]: angles by row, then by column."""
    half = head_dim // 2
    frequencies = 1.0 / theta ** (torch.arange(0, half, 2, device=rows.device, dtype=torch.float32) / half)
    angles = torch.cat((rows[:, None] * frequencies, cols[:, None] * frequencies), dim=-1)
    return torch.stack((angles.cos(), angles.sin()))
