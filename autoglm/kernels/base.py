"""The operations of the models, as a protocol with two implementations.

`gpu` has the kernels, written in Triton; `reference` has the twin of each in plain PyTorch, which the CPU runs and the
kernels are tested against. All arguments are keyword-only.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias

import torch

from autoglm.quantization.int8 import Int8Weight
from autoglm.quantization.linear import ExternalLinear

Weight: TypeAlias = torch.Tensor | Int8Weight | ExternalLinear

WEIGHT_ONLY_ROWS = 1
"""Batches up to this size use weight-only INT8; larger ones quantise the activations too (W8A8). On one NVIDIA H200 the
products of a decode step take 2.36 against 2.7 ms at one row, and 3.0 against 2.7 ms at two."""


@dataclass(frozen=True)
class Activation:
    """Rows of activations: float [T, K] without scales, or int8 [T, K] with fp32 scales [T], one for each row."""

    values: torch.Tensor
    scales: torch.Tensor | None = None


@dataclass(frozen=True)
class AttentionConfig:
    """Constants of a model's attention.

    num_heads: query heads.
    dtype: of queries and results.
    rotary_table: cosines and sines, fp32 [2, positions, rotary_dim / 2].
    mrope_section: how many of the rotated pairs follow each of the three axes (time, height, width).
    """

    num_heads: int
    dtype: torch.dtype
    rotary_table: torch.Tensor
    mrope_section: tuple[int, int, int]


@dataclass(frozen=True)
class AttentionMetadata:
    """The sequences of a launch: one new token each, or packed chunks of prompts. T is their number of tokens.

    positions: int32 [3, T].
    block_table: int32 [n, max_blocks], or [n, kv_heads, max_blocks] from `select_pages`.
    seq_lens: int32 [n], keys of each sequence including the new ones; 0 for padding rows.
    slot_mapping: int64 [T], each token's index in the cache; tokens with a negative one are not stored. Only of chunks.
    cu_seqlens_q: int32 [n + 1], the first row of each chunk, then T. Only of chunks.
    max_seqlen_q: the largest possible number of tokens of a chunk.
    """

    positions: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    slot_mapping: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    max_seqlen_q: int = 0


@dataclass(frozen=True)
class PageSelection:
    """The candidates of `select_pages`.

    slots: int32 [B], the sequences' request slots.
    visual_blocks: int32 [num_slots, max_blocks], 1 for blocks that hold visual keys only.
    num_kept: int32 [num_slots], how many visual blocks to keep; ties go to the first.
    """

    slots: torch.Tensor
    visual_blocks: torch.Tensor
    num_kept: torch.Tensor


@dataclass(frozen=True)
class SamplingState:
    """The sampling state of all request slots; see `autoglm.kernels.sampling_metadata`.

    sampling_metadata: int32 [num_slots, WIDTH].
    output_token_counts: int32 [num_slots, vocab].
    last_tokens: int64 [num_slots], the last sampled token.
    logits_buffer: fp32 [num_slots, vocab], the logits of rows whose sampling is deferred.
    """

    sampling_metadata: torch.Tensor
    output_token_counts: torch.Tensor
    last_tokens: torch.Tensor
    logits_buffer: torch.Tensor


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, [num_blocks * block_size, kv_heads, head_dim].

    8-bit caches have fp32 scales [num_blocks * block_size, kv_heads]: for INT8 one for each token and head, stored with
    the key; for FP8 fixed ones, expanded along the tokens.

    key_bounds: [num_blocks, kv_heads, 2, head_dim] in the model's dtype, minima and maxima of the keys of visual blocks
        in each channel; only `select_pages` reads them.
    """

    keys: torch.Tensor
    values: torch.Tensor
    block_size: int
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None
    key_bounds: torch.Tensor | None = None


@dataclass(frozen=True)
class VarlenPacking:
    """Images packed without padding in one pass of the vision encoder.

    lengths: rows of each image.
    separate: (first row, length) of the images that are launched on their own.
    tiles: int32 [n, 3] on the device, for the one launch over all other images: the first query of a tile, and the
        first and the end row of its image; None if there are no others.
    """

    lengths: tuple[int, ...]
    separate: tuple[tuple[int, int], ...] = ()
    tiles: torch.Tensor | None = None


@dataclass(frozen=True)
class ResampleFilter:
    """The filter that resizes one axis of an image, in fixed point with FRACTION_BITS binary places.

    starts: int32 [target], the first source pixel of each target pixel.
    weights: int32 [target, n], of that pixel and the following ones; 0 past the end of the source.
    """

    FRACTION_BITS: ClassVar[int] = 22

    starts: torch.Tensor
    weights: torch.Tensor


def required(tensor: torch.Tensor | None) -> torch.Tensor:
    """A tensor that the caller must have set."""
    if tensor is None:
        raise ValueError("a tensor that this operation needs is None")
    return tensor


class Kernels(Protocol):
    """The operations. T is the number of tokens of a pass, B its number of decoding sequences.

    `branch` and `qkv` are partial sums over their first dimension S; the consumer adds them up.
    """

    def embed(self, *, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Rows of a table [V, H] for int64 ids [T], on the ids' device; the table may be in pinned host memory."""

    def quantizes(self, *, weight: Weight, rows: int) -> bool:
        """Whether `linear` and `gate_up` take int8 activations for this weight and number of rows."""

    def quantize(self, *, x: torch.Tensor) -> Activation:
        """float [T, K] -> int8 with one symmetric scale for each row, from the row's largest magnitude."""

    def linear(self, *, x: Activation, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, K] times weight [N, K] transposed -> partial sums [S, T, N], fp32 where S > 1."""

    def gate_up(self, *, x: Activation, weight: Weight) -> torch.Tensor:
        """silu(gate) * up, where the first half of the weight's rows is the gate -> [T, N / 2]."""

    def add_norm(
        self,
        *,
        branch: torch.Tensor | None,
        residual: torch.Tensor,
        branch_norm: torch.Tensor | None,
        norm: torch.Tensor,
        eps: float,
        quantized: bool,
    ) -> tuple[Activation, torch.Tensor]:
        """residual += rms_norm(branch) * branch_norm, then x = rms_norm(residual) * norm.

        Args:
            branch: [S, T, H]; None at the first layer.
            branch_norm: [H]; None adds the branch without a norm.
            residual: [T, H]; may be changed in place.
            quantized: return x in int8.

        Returns:
            x and the new residual.
        """

    def store_kv(
        self,
        *,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        cache: LayerCache,
        config: AttentionConfig,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotate q and k, and store k and v in the cache.

        Args:
            qkv: [S, T, (num_heads + 2 * kv_heads) * head_dim].
            positions, slot_mapping: see `AttentionMetadata`.

        Returns:
            q [T, num_heads, head_dim] and k, v [T, kv_heads, head_dim] in `config.dtype`.
        """

    def decode_attention(
        self, *, qkv: torch.Tensor, cache: LayerCache, metadata: AttentionMetadata, config: AttentionConfig
    ) -> torch.Tensor:
        """`store_kv` and attention for one new token of each sequence; seq_lens gives its index in the cache.

        Args:
            qkv: [S, B, (num_heads + 2 * kv_heads) * head_dim].

        Returns:
            [B, num_heads * head_dim] in `config.dtype`; zeros in padding rows.
        """

    def select_pages(
        self,
        *,
        qkv: torch.Tensor,
        cache: LayerCache,
        metadata: AttentionMetadata,
        pages: PageSelection,
        config: AttentionConfig,
    ) -> AttentionMetadata:
        """The blocks that one new token of each sequence attends to: all non-visual ones and the best visual ones.

        Visual blocks are ranked by an upper bound of their scores, computed from the minimum and maximum of their keys
        in each channel and summed over the query heads of a group (Tang et al. 2024, "Quest").

        Args:
            qkv: [S, B, (num_heads + 2 * kv_heads) * head_dim], not rotated.

        Returns:
            The metadata for `decode_attention`, with a block table int32 [B, kv_heads, max_blocks], the selected blocks
            in order, then arbitrary ones, and the seq_lens that match it.
        """

    def divprune(self, *, embeddings: torch.Tensor, count: int) -> torch.Tensor:
        """Choose `count` diverse rows: greedily, the next is the one least similar to its nearest chosen row.

        Similarity is the cosine; the first is the row whose nearest neighbour is farthest; ties go to the first row
        (Alvar et al. 2025, "DivPrune"). Needs memory for n * n fp32 values.

        Args:
            embeddings: [n, hidden], n >= count >= 1.

        Returns:
            int64 [count], in ascending order.
        """

    def prefill_attention(self, *, q: torch.Tensor, cache: LayerCache, metadata: AttentionMetadata) -> torch.Tensor:
        """Causal attention of packed chunks whose keys and values are in the cache.

        A chunk's last query is at the last key of its sequence.

        Args:
            q: [T, num_heads, head_dim], rotated.

        Returns:
            [T, num_heads * head_dim] in q's dtype.
        """

    def read_slots(
        self, *, rows: torch.Tensor, last_tokens: torch.Tensor, block_tables: torch.Tensor, block_size: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gather a pass's inputs from the request slots of n sequences, after storing their last blocks in the tables.

        Args:
            rows: int32 [>= 4, n]: slots; tokens of each sequence including this pass, 0 for padding rows, which write
                nothing; the position of each last token; the block of that token.
            last_tokens: int64 [num_slots], the last sampled token of each slot.
            block_tables: int32 [num_slots, max_blocks].

        Returns:
            The last sampled tokens int64 [n], their positions on all axes int32 [3, n], the block tables
            int32 [n, max_blocks].
        """

    def sample(
        self, *, logits: torch.Tensor, slots: torch.Tensor, steps: torch.Tensor, state: SamplingState
    ) -> torch.Tensor:
        """Sample the next token of each row into its slot, or keep the logits of rows whose sampling is deferred.

        Penalties are applied first. Unless the temperature is 0 (greedy), the logits are then divided by it, and min-p,
        top-k and top-p cut the distribution in this order. The draw is argmax(logit + Gumbel noise) (Maddison et al.
        2014, "A* Sampling"); the noise depends on seed, step and token only, so sequences do not affect each other.
        Sampled tokens are counted. Deferred rows change nothing but the logits buffer.

        Args:
            logits: fp32 [n, vocab]; may be changed.
            slots: int32 [n].
            steps: int32 [n], tokens of each answer so far.

        Returns:
            int32 [n], -1 for deferred rows.
        """

    def sample_deferred(
        self, *, slots: torch.Tensor, steps: torch.Tensor, masks: torch.Tensor, state: SamplingState
    ) -> torch.Tensor:
        """Sample the rows that `sample` has deferred, from the tokens that their masks allow.

        A masked token has logit -inf before anything else is applied. It is never sampled, even where no allowed token
        has a finite logit. The logits buffer may be changed.

        Args:
            masks: int32 [n, ceil(vocab / 32)]; bit t % 32 of word t // 32 allows token t. At least one is set.

        The other arguments and the result are those of `sample`.
        """

    def unfilter(self, *, rows: torch.Tensor, channels: int) -> torch.Tensor:
        """Undo the scanline filters of an 8-bit PNG: uint8 [H, 1 + W * channels], each row after its filter (0-4)
        -> uint8 [H, W, 3], the first three channels."""

    def resample(self, *, pixels: torch.Tensor, resample_filter: ResampleFilter, axis: int) -> torch.Tensor:
        """Resize one axis of an image, 0 (H) or 1 (W): uint8 [H, W, 3] -> uint8, with the filter's target length.

        The weighted sum, in int32, is rounded to nearest and clipped.
        """

    def patchify(
        self, *, pixels: torch.Tensor, levels: torch.Tensor, patch_size: int, merge_size: int, temporal_patch_size: int
    ) -> torch.Tensor:
        """Normalise an image by table lookup and cut it into patches.

        Args:
            pixels: uint8 [H, W, 3], H and W multiples of patch_size * merge_size.
            levels: [3, 256], the normalised value of each level of each channel.

        Returns:
            [N, 3 * temporal_patch_size * patch_size^2] in the dtype of `levels`: merge blocks one after another, each
            patch as (channel, frame, row, column) with the frame repeated.
        """

    def pack_varlen(self, *, lengths: tuple[int, ...], device: torch.device) -> VarlenPacking:
        """Plan `image_attention` for images of these lengths; called once for each pass of the encoder."""

    def rotate_heads(
        self, *, qkv: torch.Tensor, angles: torch.Tensor, num_heads: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Apply the rotary embedding to q and k (NEOX order: the halves of a head are rotated against each other).

        Args:
            qkv: [S, N, 3 * num_heads * head_dim]; may be changed in place.
            angles: cosines and sines, fp32 [2, N, head_dim / 2].

        Returns:
            q, k and v, each [N, num_heads, head_dim] in `dtype`, not necessarily contiguous.
        """

    def image_attention(
        self, *, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: VarlenPacking
    ) -> torch.Tensor:
        """Full attention within each image: q, k, v [N, num_heads, head_dim] -> [N, num_heads * head_dim]."""
