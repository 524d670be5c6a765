"""The operations of the two models: kernels in the Triton language on a GPU, plain PyTorch elsewhere.

`reference` holds the twin of every kernel, with the same signature; tests compare the two. Which of them computes is
chosen here, once, by `choose`.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias

import torch

from autoglm.quantization.int8 import Int8Weight
from autoglm.quantization.linear import ExternalLinear

Weight: TypeAlias = torch.Tensor | Int8Weight | ExternalLinear

WEIGHT_ONLY_ROWS = 1
"""Up to so many rows INT8 weights meet unquantised activations; more rows are quantised too (W8A8). On one NVIDIA H200
a decode step's products take 2.36 ms against 2.7 ms at one row, and 3.0 against 2.7 ms at two."""


@dataclass(frozen=True)
class Activation:
    """Rows of activations: float [T, K] without scales, or int8 [T, K] with fp32 scales [T], one for each row."""

    values: torch.Tensor
    scales: torch.Tensor | None = None


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines, fp32 [2, positions, rotary_dim / 2], and how many of the pairs follow each of three axes."""

    table: torch.Tensor
    sections: tuple[int, int, int]


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, [slots, kv_heads, head_dim]; slot = block * block_size + offset.

    8-bit caches have fp32 scales [slots, kv_heads]: INT8 one for each slot and head, written with the key; FP8 fixed
    ones, expanded along the slots.
    """

    keys: torch.Tensor
    values: torch.Tensor
    block_size: int
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None


@dataclass(frozen=True)
class Packing:
    """Images that lie packed in one pass of the vision encoder, one behind another.

    lengths: rows of each image.
    apart: (first row, length) of the images that get launches of their own.
    tiles: int32 [n, 3] on the device, for the launch that takes all others: the first query of a tile, and the first
        row of its image and the row behind it; None if there are no others.
    """

    lengths: tuple[int, ...]
    apart: tuple[tuple[int, int], ...] = ()
    tiles: torch.Tensor | None = None


@dataclass(frozen=True)
class Taps:
    """How one side of an image is resized, in fixed point with PLACES binary places.

    starts: int32 [target], the first source pixel that a target pixel is made of.
    weights: int32 [target, n], of that pixel and the following; 0 behind the source's end.
    """

    PLACES: ClassVar[int] = 22

    starts: torch.Tensor
    weights: torch.Tensor


class Kernels(Protocol):
    """What computes. T rows, one for each token of a pass; `branch` and `qkv` are partial sums over their first
    dimension, which the reader adds up."""

    def embed(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Rows of the table [V, H] for int64 ids [T], on the ids' device; the table may lie in pinned host memory."""

    def quantizes(self, weight: Weight, rows: int) -> bool:
        """Whether `linear` and `gate_up` want int8 rows for this weight and so many of them."""

    def quantize(self, x: torch.Tensor) -> Activation:
        """float [T, K] -> int8, one scale for each row (symmetric, from the row's largest magnitude)."""

    def linear(self, x: Activation, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, K] times weight [N, K] transposed -> partial sums [S, T, N], fp32 where S > 1."""

    def gate_up(self, x: Activation, weight: Weight) -> torch.Tensor:
        """silu(gate) * up, the weight's first half of rows being the gate's -> [T, N / 2]."""

    def add_norm(
        self,
        branch: torch.Tensor | None,
        residual: torch.Tensor,
        branch_norm: torch.Tensor | None,
        norm: torch.Tensor,
        eps: float,
        quantized: bool,
    ) -> tuple[Activation, torch.Tensor]:
        """residual += rms_norm(branch) * branch_norm, then x = rms_norm(residual) * norm.

        Args:
            branch: [S, T, H], None at the first layer.
            branch_norm: None where the branch is added as it is.
            residual: [T, H]; may be changed in place.
            quantized: whether x is wanted in int8.

        Returns:
            x and the new residual.
        """

    def store_keys(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        rotary: Rotary,
        cache: LayerCache,
        slots: torch.Tensor,
        heads: int,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotate q and k, and write k and v into the cache.

        Args:
            qkv: [S, T, (heads + 2 * kv_heads) * head_dim].
            positions: int32 [3, T].
            slots: int64 [T]; what has a negative one is not written.

        Returns:
            q [T, heads, head_dim] and k, v [T, kv_heads, head_dim] in `dtype`.
        """

    def decode_attention(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        rotary: Rotary,
        cache: LayerCache,
        block_table: torch.Tensor,
        lengths: torch.Tensor,
        heads: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """`store_keys` and attention of one new token a sequence, whose slot follows from its length.

        Args:
            qkv: [S, B, (heads + 2 * kv_heads) * head_dim].
            positions: int32 [3, B].
            block_table: int32 [B, max_blocks], or [B, kv_heads, max_blocks] as `choose_pages` makes it.
            lengths: int32 [B], keys of each sequence with the new one; 0 for rows that only pad.

        Returns:
            [B, heads * head_dim] in `dtype`; zeros in rows that pad.
        """

    def choose_pages(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        rotary: Rotary,
        summaries: torch.Tensor,
        block_table: torch.Tensor,
        lengths: torch.Tensor,
        seats: torch.Tensor,
        visual: torch.Tensor,
        kept: torch.Tensor,
        block_size: int,
        heads: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The blocks that one new token of each sequence looks at: those that are not visual, and some that are.

        A block's bound is what its scores cannot exceed, given the least and the greatest of its keys in each channel,
        summed over the query heads of a group (Tang et al. 2024, "Quest").

        Args:
            qkv: [S, B, (heads + 2 * kv_heads) * head_dim], not rotated.
            positions: int32 [3, B].
            summaries: [blocks, kv_heads, 2, head_dim] in the model's dtype, minima and maxima; of visual blocks only.
            block_table: int32 [B, max_blocks].
            lengths: int32 [B], keys of each sequence with the new one; 0 for rows that only pad.
            seats: int32 [B].
            visual: int32 [seats, max_blocks], 1 where a seat's sequence has a block of visual keys only.
            kept: int32 [seats], how many of these stay, those with the highest bounds; of equal ones the first.

        Returns:
            int32 [B, kv_heads, max_blocks], blocks in their order, behind them anything; and the lengths, int32 [B],
            that follow for `decode_attention`.
        """

    def most_diverse(self, embeddings: torch.Tensor, count: int) -> torch.Tensor:
        """Choose `count` rows so that the two that are most alike are as unlike as a greedy choice can make them.

        By cosine, starting with the row whose nearest neighbour is farthest; of equals the first (Alvar et al. 2025,
        "DivPrune"). It has room for n * n numbers in fp32.

        Args:
            embeddings: [n, hidden], n >= count >= 1.

        Returns:
            int64 [count], in ascending order.
        """

    def prefill_attention(
        self,
        q: torch.Tensor,
        cache: LayerCache,
        block_table: torch.Tensor,
        starts: torch.Tensor,
        lengths: torch.Tensor,
        longest_chunk: int,
    ) -> torch.Tensor:
        """Causal attention of chunks, whose keys and values the cache already has.

        Args:
            q: [T, heads, head_dim], rotated, the chunks packed one behind another.
            block_table: int32 [n, max_blocks].
            starts: int32 [n + 1], the row where each chunk begins, then T.
            lengths: int32 [n], keys that each sequence has; a chunk's last query stands at the last of them.

        Returns:
            [T, heads * head_dim] in q's dtype.
        """

    def read_seats(
        self,
        seats: torch.Tensor,
        lengths: torch.Tensor,
        positions: torch.Tensor,
        blocks: torch.Tensor,
        tokens: torch.Tensor,
        tables: torch.Tensor,
        block_size: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a pass takes from the seats of n sequences; notes first which block each of them ends in.

        Args:
            seats, lengths, positions, blocks: int32 [n]; the tokens that a sequence has with this pass (0 for rows
                that only pad: nothing is noted), the position of the last of them, and its block.
            tokens: int64 [seats], the last sampled token of each seat.
            tables: int32 [seats, max_blocks], the blocks of each seat's sequence.

        Returns:
            The last sampled tokens int64 [n], their positions on all axes int32 [3, n], the block tables
            int32 [n, max_blocks].
        """

    def sample(
        self,
        logits: torch.Tensor,
        seats: torch.Tensor,
        steps: torch.Tensor,
        records: torch.Tensor,
        marks: torch.Tensor,
        tokens: torch.Tensor,
        kept: torch.Tensor,
    ) -> torch.Tensor:
        """Choose the next token of each row, and note it in its seat; or, if its record says so, keep its logits.

        Penalties first; then, unless the temperature is 0, the logits are divided by it, and the distribution is cut
        by min-p, top-k and top-p in this order. The draw is argmax(logit + Gumbel noise), see Maddison et al. 2014,
        "A* Sampling". The noise follows from seed, step and token alone, so that a draw depends on its own sequence
        only.

        Args:
            logits: fp32 [n, vocab]; may be changed.
            seats: int32 [n].
            steps: int32 [n], how many tokens each answer has so far.
            records: int32 [seats, WIDTH], see `autoglm.kernels.sampling_metadata`.
            marks: int32 [seats, vocab], which tokens came before; the chosen ones are counted.
            tokens: int64 [seats], where the chosen tokens go.
            kept: fp32 [seats, vocab], where the logits of deferred rows go; nothing else is changed for these.

        Returns:
            int32 [n], -1 for deferred rows.
        """

    def sample_late(
        self,
        seats: torch.Tensor,
        steps: torch.Tensor,
        masks: torch.Tensor,
        records: torch.Tensor,
        marks: torch.Tensor,
        tokens: torch.Tensor,
        kept: torch.Tensor,
    ) -> torch.Tensor:
        """Choose the next tokens of rows that `sample` has deferred, as it would, from what their masks allow.

        A token that is not allowed counts as one of logit -inf before anything else is done. It is never chosen, not
        even where no allowed token has a finite logit.

        Args:
            masks: int32 [n, ceil(vocab / 32)]; bit t % 32 of word t // 32 says that token t is allowed. At least one
                is.
            kept: fp32 [seats, vocab], the rows' logits as `sample` has left them; may be changed.

        The others, and the result, are those of `sample`.
        """

    def unfilter(self, rows: torch.Tensor, channels: int) -> torch.Tensor:
        """The pixels of a PNG of 8 bits a channel: its scanlines, uint8 [H, 1 + W * channels] with the filter (0-4) in
        front of each -> uint8 [H, W, 3], of the first three channels."""

    def resample(self, pixels: torch.Tensor, taps: Taps, axis: int) -> torch.Tensor:
        """One side of an image resized: uint8 [H, W, 3] -> uint8, axis 0 (H) or 1 (W) as long as the taps say.

        The sum of the weighted pixels, in int32, is rounded to the nearest integer and clipped.
        """

    def patchify(self, pixels: torch.Tensor, levels: torch.Tensor, patch: int, merge: int, frames: int) -> torch.Tensor:
        """Look an image's levels up and cut it into patches.

        Args:
            pixels: uint8 [H, W, 3], H and W multiples of patch * merge.
            levels: [3, 256], what each level of each channel becomes.

        Returns:
            [N, 3 * frames * patch * patch] in the dtype of `levels`: blocks of merge x merge patches after one
            another, a patch as (channel, frame, row, column) with the frame repeated.
        """

    def pack(self, lengths: tuple[int, ...], device: torch.device) -> Packing:
        """How `image_attention` will go over images of these lengths; called once for each pass of the encoder."""

    def rotate_heads(
        self, qkv: torch.Tensor, angles: torch.Tensor, heads: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Turn the halves of each head of q and k against each other (NEOX order).

        Args:
            qkv: [S, N, 3 * heads * head_dim]; may be changed in place.
            angles: cosines and sines, fp32 [2, N, head_dim / 2].

        Returns:
            q, k and v, each [N, heads, head_dim] in `dtype`; rows may lie apart.
        """

    def image_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Full attention inside each image: q, k, v [N, heads, head_dim] -> [N, heads * head_dim]."""
