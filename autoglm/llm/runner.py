"""Forward passes: launched without waiting for the device, collected later."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from autoglm.llm.attention import PagedAttention
from autoglm.llm.batch import ROW, Batch, MixedInput, Shape, make_rows, pack_mixed, row_places, table_entries
from autoglm.llm.graphs import Graph, capture, chunk_shapes, decode_sizes
from autoglm.llm.kv_cache import KVCache
from autoglm.llm.model import LanguageModel
from autoglm.llm.scheduler import Chunk
from autoglm.llm.seats import Seats
from autoglm.llm.sequence import Sequence
from autoglm.llm.transfer import Arrival, Numbers, send, stage


@dataclass(frozen=True)
class Pass:
    """A launched pass: `rows` says which of the arriving tokens belong to its chunks that sample, in their order."""

    chunks: list[Chunk]
    rows: list[int]
    tokens: Arrival


class ModelRunner:
    """Runs the model over packed chunks, keys and values going to the cache, sampled tokens to the seats."""

    def __init__(self, model: LanguageModel, cache: KVCache, max_batch_size: int, max_context: int) -> None:
        self.model = model
        self.cache = cache
        self.device = cache.keys.device
        self.max_batch_size = max_batch_size
        self.max_blocks = -(-max_context // cache.block_size)
        self.seats = Seats(max_batch_size, model.config.vocab_size, self.max_blocks, self.device)
        self.decode_graphs: dict[int, Graph] = {}
        self.mixed_graphs: dict[Shape, Graph] = {}

    @torch.inference_mode()
    def capture(self, most_tokens: int) -> None:
        """Capture passes that decode, and passes with up to so many tokens of prompts. Only on a CUDA device."""
        shapes = sorted(chunk_shapes(self.max_batch_size, most_tokens), key=lambda s: s.tokens, reverse=True)
        sizes = sorted(decode_sizes(self.max_batch_size), reverse=True)
        mixed = capture((partial(self._mixed, shape), self._mixed_inputs(shape)) for shape in shapes)
        decode = capture((self._decode, (send([self._pad([], size)], self.device)[0],)) for size in sizes)
        self.mixed_graphs = dict(zip(shapes, mixed, strict=True))
        self.decode_graphs = dict(zip(sizes, decode, strict=True))

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk]) -> Pass:
        """Start to compute chunks, those of decoding sequences standing first."""
        if all(chunk.decodes for chunk in chunks):
            return Pass(chunks, list(range(len(chunks))), Arrival(self._run_singles(chunks)))
        wanted = Shape.of(chunks)
        fitting = [shape for shape in self.mixed_graphs if shape.holds(wanted)]
        shape = min(fitting, key=lambda s: (s.tokens, s.singles), default=wanted)
        places = zip(row_places(chunks, shape), chunks, strict=True)
        rows = [place for place, chunk in places if chunk.samples]
        return Pass(chunks, rows, Arrival(self._run_mixed(chunks, shape)))

    def collect(self, launched: Pass) -> list[tuple[Sequence, int]]:
        """Wait for a pass; its sequences that sampled, with their tokens."""
        sampling = [chunk.sequence for chunk in launched.chunks if chunk.samples]
        arrived = launched.tokens.wait()
        return [(sequence, arrived[row]) for sequence, row in zip(sampling, launched.rows, strict=True)]

    def _run_singles(self, chunks: list[Chunk]) -> torch.Tensor:
        count = len(chunks)
        size = min((size for size in self.decode_graphs if size >= count), default=count)
        rows = self._pad(chunks, size)
        graph = self.decode_graphs.get(size)
        if graph is None:
            return self._decode(*send([rows], self.device))
        graph.inputs[0].copy_(stage(rows, self.device), non_blocking=True)
        return graph.replay()

    def _pad(self, chunks: list[Chunk], size: int) -> Numbers:
        """`make_rows` with rows of the seat that nobody has, up to `size`."""
        rows = np.zeros((ROW, size), np.int32)
        rows[:, : len(chunks)] = make_rows(chunks, self.cache.block_size)
        rows[0, len(chunks) :] = self.seats.padding
        return rows

    def _decode(self, rows: torch.Tensor) -> torch.Tensor:
        """One more token for each of the rows, int32 [ROW, n] -> [n]. Depends on n only, waits for nothing."""
        seats, lengths, _, _, steps = rows
        ids, positions, table = self._read_seats(rows)
        nothing = lengths.new_empty(0)
        batch = Batch(len(seats), positions, nothing, table, lengths, nothing, 0)
        return self._sample(self._forward(self.model.embed(ids), batch), seats, steps)

    def _run_mixed(self, chunks: list[Chunk], shape: Shape) -> torch.Tensor:
        self.seats.enter([chunk.sequence for chunk in chunks if chunk.enters])
        places, blocks = send(table_entries(chunks, self.max_blocks), self.device)
        self.seats.tables.view(-1).scatter_(0, places.long(), blocks)
        packed = stage(pack_mixed(chunks, shape, self.seats.padding, self.cache.block_size), self.device)
        graph = self.mixed_graphs.get(shape)
        if graph is None:
            sent = packed.to(self.device, non_blocking=True)
            return self._mixed(shape, sent, self._embed(chunks, MixedInput.unpack(sent, shape).ids))
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

    def _mixed(self, shape: Shape, packed: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """A pass with prompts, whose embeddings are given -> [singles + chunks] tokens. Depends on the shape only."""
        given = MixedInput.unpack(packed, shape)
        ids, _, table = self._read_seats(given.rows)
        hidden = torch.cat((self.model.embed(ids[: shape.singles]), prompts))
        batch = Batch(
            shape.singles, given.positions, given.slots.long(), table, given.rows[1], given.starts, shape.tokens
        )
        hidden = self._forward(hidden, batch)[given.last_rows.long()]
        return self._sample(hidden, *given.sampling)

    def _read_seats(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        seats, lengths, positions, blocks, _ = rows
        kept = self.seats.tokens, self.seats.tables
        return self.model.kernels.read_seats(seats, lengths, positions, blocks, *kept, self.cache.block_size)

    def _forward(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        model = self.model
        attention = PagedAttention(model.kernels, self.cache, model.rotary, batch, model.config)
        return model(hidden, attention)  # type: ignore[no-any-return]

    def _sample(self, hidden: torch.Tensor, seats: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        kept = self.seats.records, self.seats.marks, self.seats.tokens
        return self.model.kernels.sample(self.model.logits(hidden), seats, steps, *kept)


def place_media(hidden: torch.Tensor, chunk: Chunk) -> None:
    """Put the images' embeddings over the placeholders of one chunk. hidden [chunk.length, hidden_size]"""
    embeddings = chunk.sequence.request.embeddings
    row = 0
    for span in chunk.sequence.media:
        first = max(span.start, chunk.start)
        last = min(span.start + span.length, chunk.end)
        if first < last and embeddings is not None:
            rows = embeddings[row + first - span.start : row + last - span.start]
            hidden[first - chunk.start : last - chunk.start] = rows.to(hidden.device, hidden.dtype)
        row += span.length
