"""Forward passes: launched without waiting for the device, collected later."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from autoglm.config import SparseAttentionConfig
from autoglm.llm.attention import PagedAttention
from autoglm.llm.cuda_graphs import LARGEST, Graph, capture, chunk_shapes, decode_sizes
from autoglm.llm.deferred_sampling import LateTokens, Sampled, choose_late
from autoglm.llm.input_batch import (
    ROW,
    Batch,
    MixedInput,
    Pages,
    Shape,
    make_rows,
    pack_mixed,
    row_places,
    table_entries,
)
from autoglm.llm.kv_cache import KVCache
from autoglm.llm.model import LanguageModel
from autoglm.llm.request_slots import Seats, visual_blocks
from autoglm.llm.scheduler import Chunk
from autoglm.llm.sequence import Sequence
from autoglm.llm.sparse.attention import CrossModalAttention, View, find_views
from autoglm.llm.thinning import thin_out
from autoglm.llm.transfer import Arrival, Numbers, send, stage


@dataclass
class Pass:
    """A launched pass: `rows` says which of the arriving tokens is each chunk's; those of deferred rows come late."""

    chunks: list[Chunk]
    rows: list[int]
    tokens: Arrival
    late: LateTokens | None = None


class ModelRunner:
    """Runs the model over packed chunks, keys and values going to the cache, sampled tokens to the seats."""

    def __init__(
        self,
        model: LanguageModel,
        cache: KVCache,
        max_batch_size: int,
        max_context: int,
        paging: SparseAttentionConfig | None = None,
    ) -> None:
        """`paging` is the configuration of a server whose sequences may choose among blocks; the cache is summarized
        then."""
        self.model = model
        self.cache = cache
        self.device = cache.keys.device
        self.max_batch_size = max_batch_size
        self.max_blocks = -(-max_context // cache.block_size)
        self.paging = paging
        sizes = max_batch_size, model.config.vocab_size, self.max_blocks
        self.seats = Seats(*sizes, self.device, None if paging is None else cache.block_size)
        self.decode_graphs: dict[int, Graph] = {}
        self.mixed_graphs: dict[Shape, Graph] = {}

    @torch.inference_mode()
    def capture(self, most_tokens: int, most_mixed: int) -> None:
        """Capture passes that decode and passes with prompts, see `chunk_shapes`. Only on a CUDA device.

        What the others need is compiled here, too.
        """
        for singles in {1, self.max_batch_size}:
            larger = Shape(singles, 1, LARGEST + 1)
            self._mixed(larger, *self._mixed_inputs(larger))
        shapes = chunk_shapes(self.max_batch_size, most_tokens, most_mixed)
        shapes.sort(key=lambda s: s.tokens, reverse=True)
        sizes = sorted(decode_sizes(self.max_batch_size), reverse=True)
        mixed = capture((partial(self._mixed, shape), self._mixed_inputs(shape)) for shape in shapes)
        decode = capture((self._decode, (send([self._pad([], size)], self.device)[0],)) for size in sizes)
        self.mixed_graphs = dict(zip(shapes, mixed, strict=True))
        self.decode_graphs = dict(zip(sizes, decode, strict=True))

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk]) -> Pass:
        """Start to compute chunks, those of decoding sequences standing first."""
        views = self._views(chunks)
        if all(chunk.decodes for chunk in chunks):
            return Pass(chunks, list(range(len(chunks))), Arrival(self._run_singles(chunks, views)))
        wanted = Shape.of(chunks)
        fitting = [shape for shape in self.mixed_graphs if shape.holds(wanted) and not views]
        shape = min(fitting, key=lambda s: (s.tokens, s.singles), default=wanted)
        launched = Pass(chunks, row_places(chunks, shape), Arrival(self._run_mixed(chunks, shape, views)))
        self._thin_out([chunk.sequence for chunk in chunks if chunk.thins])
        if self.paging is not None:
            self._summarize([chunk.sequence for chunk in chunks if chunk.samples and not chunk.decodes])
        return launched

    @torch.inference_mode()
    def choose_late(self, launched: Pass, chunks: list[Chunk], masks: Numbers) -> None:
        """Start to choose the tokens of these deferred chunks of the pass that was launched last."""
        launched.late = choose_late(self.model.kernels, self.seats, chunks, masks)

    def collect(self, launched: Pass) -> list[Sampled]:
        """Wait for a pass; its sequences that sampled, with their tokens and, where wanted, how probable these were."""
        arrived = launched.tokens.wait().tolist()
        places = zip(launched.rows, launched.chunks, strict=True)
        sampling = [(row, c.sequence) for row, c in places if c.samples and not c.sequence.deferred]
        sampled: list[Sampled] = [(sequence, arrived[row], None) for row, sequence in sampling]
        return sampled if launched.late is None else sampled + launched.late.wait()

    def _views(self, chunks: list[Chunk]) -> list[View]:
        """What text looks at images in a way of its own; a pass with such text has no graph."""
        views = find_views(chunks, self.cache.block_size, self.device)
        config = self.model.config
        for sequence in [view.sequence for view in views if view.sequence.to_thin]:
            if sequence.attention is None:
                heads = config.num_hidden_layers, config.num_key_value_heads
                sequence.attention = torch.zeros(*heads, sequence.visual, device=self.device)
        return views

    def _thin_out(self, sequences: list[Sequence]) -> None:
        """Leave keys of prompts that have just been computed behind, and note where the others are."""
        for sequence in sequences:
            thin_out(sequence, self.cache)
            (blocks,) = send([np.array(sequence.thin_blocks, np.int32)], self.device)
            self.seats.tables[sequence.seat, : len(blocks)] = blocks

    def _summarize(self, sequences: list[Sequence]) -> None:
        """Note what blocks hold among which sequences will choose, of prompts that have just been computed."""
        for sequence in sequences:
            (places,) = np.nonzero(visual_blocks(sequence, self.cache.block_size, self.max_blocks))
            if len(places):
                (blocks,) = send([np.array(sequence.blocks, np.int32)[places]], self.device)
                self.cache.summarize(blocks.long())

    def _pages(self, seats: torch.Tensor) -> Pages | None:
        """By what the decoding sequences of these seats choose blocks, if they are so many that it is worth while."""
        if self.paging is None or len(seats) < self.paging.min_batch:
            return None
        return Pages(seats, self.seats.visual, self.seats.kept, self.paging.dense_layers)

    def _run_singles(self, chunks: list[Chunk], views: list[View]) -> torch.Tensor:
        if views:
            (rows,) = send([make_rows(chunks, self.cache.block_size)], self.device)
            return self._decode(rows, views)
        count = len(chunks)
        size = min((size for size in self.decode_graphs if size >= count), default=count)
        padded = self._pad(chunks, size)
        graph = self.decode_graphs.get(size)
        if graph is None:
            return self._decode(send([padded], self.device)[0])
        graph.inputs[0].copy_(stage(padded, self.device), non_blocking=True)
        return graph.replay()

    def _pad(self, chunks: list[Chunk], size: int) -> Numbers:
        """`make_rows` with rows of the seat that nobody has, up to `size`."""
        rows = np.zeros((ROW, size), np.int32)
        rows[:, : len(chunks)] = make_rows(chunks, self.cache.block_size)
        rows[0, len(chunks) :] = self.seats.padding
        return rows

    def _decode(self, rows: torch.Tensor, views: Seq[View] = ()) -> torch.Tensor:
        """One more token for each of the rows, int32 [ROW, n] -> [n]. Depends on n only, waits for nothing."""
        seats, lengths, _, _, steps = rows
        ids, positions, table = self._read_seats(rows)
        nothing = lengths.new_empty(0)
        batch = Batch(len(seats), positions, nothing, table, lengths, nothing, 0, self._pages(seats))
        return self._sample(self._forward(self.model.embed(ids), batch, views), seats, steps)

    def _run_mixed(self, chunks: list[Chunk], shape: Shape, views: list[View]) -> torch.Tensor:
        self.seats.enter([chunk.sequence for chunk in chunks if chunk.enters])
        places, blocks = send(table_entries(chunks, self.max_blocks), self.device)
        self.seats.tables.view(-1).scatter_(0, places.long(), blocks)
        packed = stage(pack_mixed(chunks, shape, self.seats.padding, self.cache.block_size), self.device)
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
                place_media(hidden[row : row + chunk.length], chunk)
                row += chunk.length
        return hidden

    def _mixed_inputs(self, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs of `_mixed` that consist of nothing but padding."""
        (packed,) = send([pack_mixed([], shape, self.seats.padding, self.cache.block_size)], self.device)
        return packed, self.model.embed(packed.new_zeros(shape.tokens, dtype=torch.int64))

    def _mixed(self, shape: Shape, packed: torch.Tensor, prompts: torch.Tensor, views: Seq[View] = ()) -> torch.Tensor:
        """A pass with prompts, whose embeddings are given -> [singles + chunks] tokens. Depends on the shape only."""
        given = MixedInput.unpack(packed, shape)
        ids, _, table = self._read_seats(given.rows)
        hidden = torch.cat((self.model.embed(ids[: shape.singles]), prompts))
        lengths, pages = given.rows[1], self._pages(given.rows[0, : shape.singles])
        batch = Batch(
            shape.singles, given.positions, given.slots.long(), table, lengths, given.starts, shape.tokens, pages
        )
        hidden = self._forward(hidden, batch, views)[given.last_rows.long()]
        return self._sample(hidden, *given.sampling)

    def _read_seats(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        seats, lengths, positions, blocks, _ = rows
        kept = self.seats.tokens, self.seats.tables
        return self.model.kernels.read_seats(seats, lengths, positions, blocks, *kept, self.cache.block_size)

    def _forward(self, hidden: torch.Tensor, batch: Batch, views: Seq[View] = ()) -> torch.Tensor:
        model = self.model
        attention = PagedAttention(model.kernels, self.cache, model.rotary, batch, model.config)
        return model(hidden, CrossModalAttention(attention, views) if views else attention)  # type: ignore[no-any-return]

    def _sample(self, hidden: torch.Tensor, seats: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        kept = self.seats.records, self.seats.marks, self.seats.tokens, self.seats.logits
        return self.model.kernels.sample(self.model.logits(hidden), seats, steps, *kept)


def place_media(hidden: torch.Tensor, chunk: Chunk) -> None:
    """Put the media's embeddings over the placeholders of one chunk. hidden [chunk.length, hidden_size]"""
    embeddings = chunk.sequence.request.embeddings
    row = 0
    for span in chunk.sequence.media:
        first = max(span.start, chunk.start)
        last = min(span.end, chunk.end)
        if first < last and embeddings is not None:
            rows = embeddings[row + first - span.start : row + last - span.start]
            hidden[first - chunk.start : last - chunk.start] = rows.to(hidden.device, hidden.dtype)
        row += span.length
