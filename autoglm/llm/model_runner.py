"""Runs forward passes: launches them without waiting for the device, and collects their results later."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from autoglm.config import SparseAttentionConfig
from autoglm.kernels.base import AttentionMetadata, PageSelection
from autoglm.llm.attention import PagedAttention
from autoglm.llm.cuda_graphs import MAX_CAPTURED_ROWS, CapturedPass, capture, decode_sizes, mixed_shapes
from autoglm.llm.deferred_sampling import DeferredTokens, SampledToken, sample_deferred
from autoglm.llm.input_batch import (
    ROW,
    BatchShape,
    InputBatch,
    MixedInput,
    block_table_entries,
    make_rows,
    pack_mixed,
    row_indices,
)
from autoglm.llm.kv_cache import KVCache
from autoglm.llm.model import LanguageModel
from autoglm.llm.request_slots import RequestSlots, visual_blocks
from autoglm.llm.scheduler import Chunk
from autoglm.llm.sequence import Sequence
from autoglm.llm.sparse.attention import SparseView, TopKAttention, find_views
from autoglm.llm.transfer import DeviceResult, Int32Array, send, stage


@dataclass
class LaunchedPass:
    """A pass in flight. `rows[i]` is the row of chunk i in `tokens`; deferred rows are in `deferred` instead."""

    chunks: list[Chunk]
    rows: list[int]
    tokens: DeviceResult
    deferred: DeferredTokens | None = None


class ModelRunner:
    """Runs the model over packed chunks; keys and values go to the cache, sampled tokens to the request slots."""

    def __init__(
        self,
        model: LanguageModel,
        kv_cache: KVCache,
        *,
        max_batch_size: int,
        max_context: int,
        pages: SparseAttentionConfig | None = None,
    ) -> None:
        """pages: given if sequences may use the sparse mode `pages`; the cache has key bounds then."""
        self.model = model
        self.kv_cache = kv_cache
        self.device = kv_cache.keys.device
        self.max_batch_size = max_batch_size
        self.max_blocks = -(-max_context // kv_cache.block_size)
        self.pages = pages
        self.slots = RequestSlots(
            max_batch_size,
            vocab_size=model.config.vocab_size,
            max_blocks=self.max_blocks,
            block_size=kv_cache.block_size,
            device=self.device,
            pages=pages,
        )
        self.decode_graphs: dict[int, CapturedPass] = {}
        self.mixed_graphs: dict[BatchShape, CapturedPass] = {}

    @torch.inference_mode()
    def capture(self, *, max_tokens: int, max_mixed_tokens: int) -> None:
        """Capture decode passes and passes with prompts, see `mixed_shapes`. Only on a CUDA device.

        Compiles the kernels of passes without a graph too.
        """
        for num_decode in {1, self.max_batch_size}:
            larger = BatchShape(num_decode, 1, MAX_CAPTURED_ROWS + 1)
            self._mixed(larger, *self._mixed_inputs(larger))
        shapes = mixed_shapes(
            max_batch_size=self.max_batch_size, max_tokens=max_tokens, max_mixed_tokens=max_mixed_tokens
        )
        shapes.sort(key=lambda s: s.num_tokens, reverse=True)
        sizes = sorted(decode_sizes(self.max_batch_size), reverse=True)
        mixed = capture((partial(self._mixed, shape), self._mixed_inputs(shape)) for shape in shapes)
        decode = capture((self._decode, (send([self._pad([], size)], self.device)[0],)) for size in sizes)
        self.mixed_graphs = dict(zip(shapes, mixed, strict=True))
        self.decode_graphs = dict(zip(sizes, decode, strict=True))

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk]) -> LaunchedPass:
        """Launch a pass of these chunks, those of decoding sequences first."""
        views = find_views(chunks, self.kv_cache.block_size, self.device)
        if all(chunk.decodes for chunk in chunks):
            return LaunchedPass(chunks, list(range(len(chunks))), DeviceResult(self._run_decode(chunks, views)))
        needed = BatchShape.of(chunks)
        fitting = [shape for shape in self.mixed_graphs if shape.fits(needed) and not views]
        shape = min(fitting, key=lambda s: (s.num_tokens, s.num_decode_tokens), default=needed)
        tokens = self._run_mixed(chunks, shape, views)
        launched = LaunchedPass(chunks, row_indices(chunks, shape), DeviceResult(tokens))
        if self.pages is not None:
            self._update_key_bounds([chunk.sequence for chunk in chunks if chunk.samples and not chunk.decodes])
        return launched

    @torch.inference_mode()
    def sample_deferred(self, launched: LaunchedPass, chunks: list[Chunk], masks: Int32Array) -> None:
        """Launch the sampling of these deferred chunks of the most recent pass."""
        launched.deferred = sample_deferred(self.model.kernels, self.slots, chunks, masks)

    def collect(self, launched: LaunchedPass) -> list[SampledToken]:
        """Wait for a pass; the sequences that sampled, their tokens and, if requested, log probabilities."""
        tokens = launched.tokens.wait().tolist()
        pairs = zip(launched.rows, launched.chunks, strict=True)
        sampling = [(row, c.sequence) for row, c in pairs if c.samples and not c.sequence.deferred]
        sampled: list[SampledToken] = [(sequence, tokens[row], None) for row, sequence in sampling]
        return sampled if launched.deferred is None else sampled + launched.deferred.wait()

    def _update_key_bounds(self, sequences: list[Sequence]) -> None:
        """Compute the key bounds of the visual blocks of prompts that this pass completes."""
        for sequence in sequences:
            (indices,) = np.nonzero(visual_blocks(sequence, self.kv_cache.block_size, self.max_blocks))
            if len(indices):
                (blocks,) = send([np.array(sequence.blocks, np.int32)[indices]], self.device)
                self.kv_cache.update_key_bounds(blocks.long())

    def _input_batch(
        self,
        positions: torch.Tensor,
        slots: torch.Tensor,
        decode: AttentionMetadata | None,
        prefill: AttentionMetadata | None = None,
    ) -> InputBatch:
        """slots: of the decoding sequences; below `min_batch` they attend to all pages."""
        if self.pages is None or len(slots) < self.pages.min_batch:
            return InputBatch(positions, decode, prefill)
        pages = PageSelection(slots, self.slots.visual_blocks, self.slots.num_kept)
        return InputBatch(positions, decode, prefill, pages, self.pages.dense_layers)

    def _run_decode(self, chunks: list[Chunk], views: list[SparseView]) -> torch.Tensor:
        if views:
            (rows,) = send([make_rows(chunks, self.kv_cache.block_size)], self.device)
            return self._decode(rows, views)
        count = len(chunks)
        size = min((size for size in self.decode_graphs if size >= count), default=count)
        padded = self._pad(chunks, size)
        graph = self.decode_graphs.get(size)
        if graph is None:
            return self._decode(send([padded], self.device)[0])
        graph.inputs[0].copy_(stage(padded, self.device), non_blocking=True)
        return graph.replay()

    def _pad(self, chunks: list[Chunk], size: int) -> Int32Array:
        """`make_rows`, padded to `size` with rows of the padding slot."""
        rows = np.zeros((ROW, size), np.int32)
        rows[:, : len(chunks)] = make_rows(chunks, self.kv_cache.block_size)
        rows[0, len(chunks) :] = self.slots.padding
        return rows

    def _decode(self, rows: torch.Tensor, views: Seq[SparseView] = ()) -> torch.Tensor:
        """One token for each of the rows, int32 [ROW, n] -> [n]. Shapes depend on n only; does not block."""
        slots, seq_lens, _, _, steps = rows
        ids, positions, block_table = self._read_slots(rows)
        batch = self._input_batch(positions, slots, AttentionMetadata(positions, block_table, seq_lens))
        return self._sample(self._forward(self.model.embed(ids), batch, views), slots, steps)

    def _run_mixed(self, chunks: list[Chunk], shape: BatchShape, views: list[SparseView]) -> torch.Tensor:
        self.slots.initialize([chunk.sequence for chunk in chunks if chunk.is_first])
        indices, blocks = send(block_table_entries(chunks, self.max_blocks), self.device)
        self.slots.block_tables.view(-1).scatter_(0, indices.long(), blocks)
        packed = stage(pack_mixed(chunks, shape, self.slots.padding, self.kv_cache.block_size), self.device)
        graph = self.mixed_graphs.get(shape)
        if graph is None:
            sent = packed.to(self.device, non_blocking=True)
            return self._mixed(shape, sent, self._embed(chunks, MixedInput.unpack(sent, shape).ids), views)
        graph.inputs[0].copy_(packed, non_blocking=True)
        graph.inputs[1].copy_(self._embed(chunks, MixedInput.unpack(graph.inputs[0], shape).ids))
        return graph.replay()

    def _embed(self, chunks: list[Chunk], ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [tokens, hidden_size] of the chunks' text and media."""
        hidden = self.model.embed(ids.long())
        row = 0
        for chunk in chunks:
            if not chunk.decodes:
                insert_media(hidden[row : row + chunk.length], chunk)
                row += chunk.length
        return hidden

    def _mixed_inputs(self, shape: BatchShape) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs of `_mixed` that are all padding."""
        (packed,) = send([pack_mixed([], shape, self.slots.padding, self.kv_cache.block_size)], self.device)
        return packed, self.model.embed(packed.new_zeros(shape.num_tokens, dtype=torch.int64))

    def _mixed(
        self, shape: BatchShape, packed: torch.Tensor, prompts: torch.Tensor, views: Seq[SparseView] = ()
    ) -> torch.Tensor:
        """A pass with prompts, given their embeddings -> [decode + chunks] tokens. Depends on the shape only."""
        given = MixedInput.unpack(packed, shape)
        ids, _, block_table = self._read_slots(given.rows)
        n, positions, seq_lens = shape.num_decode_tokens, given.positions, given.rows[1]
        decode = AttentionMetadata(positions[:, :n], block_table[:n], seq_lens[:n])
        prefill = AttentionMetadata(
            positions[:, n:],
            block_table[n:],
            seq_lens[n:],
            slot_mapping=given.slot_mapping[n:].long(),
            cu_seqlens_q=given.cu_seqlens_q,
            max_seqlen_q=shape.num_tokens,
        )
        batch = self._input_batch(positions, given.rows[0, :n], decode if n else None, prefill)
        hidden = torch.cat((self.model.embed(ids[:n]), prompts))
        hidden = self._forward(hidden, batch, views)[given.last_rows.long()]
        return self._sample(hidden, *given.sampling)

    def _read_slots(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        slots = self.slots
        return self.model.kernels.read_slots(
            rows=rows,
            last_tokens=slots.state.last_tokens,
            block_tables=slots.block_tables,
            block_size=self.kv_cache.block_size,
        )

    def _forward(self, hidden: torch.Tensor, batch: InputBatch, views: Seq[SparseView] = ()) -> torch.Tensor:
        model = self.model
        attention = PagedAttention(model.kernels, self.kv_cache, model.attention_config, batch)
        return model(hidden, TopKAttention(attention, views) if views else attention)  # type: ignore[no-any-return]

    def _sample(self, hidden: torch.Tensor, slots: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        logits = self.model.logits(hidden)
        return self.model.kernels.sample(logits=logits, slots=slots, steps=steps, state=self.slots.state)


def insert_media(hidden: torch.Tensor, chunk: Chunk) -> None:
    """Overwrite the placeholders of a chunk by the media's embeddings. hidden [chunk.length, hidden_size]"""
    embeddings = chunk.sequence.prompt.embeddings
    row = 0
    for span in chunk.sequence.prompt.media:
        first = max(span.start, chunk.start)
        last = min(span.end, chunk.end)
        if first < last and embeddings is not None:
            rows = embeddings[row + first - span.start : row + last - span.start]
            hidden[first - chunk.start : last - chunk.start] = rows.to(hidden.device, hidden.dtype)
        row += span.length
