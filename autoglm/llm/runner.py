"""One forward pass: from the scheduler's choice to the sampled tokens."""

import torch

from autoglm.llm.attention import PagedAttention
from autoglm.llm.kv_cache import KVCache
from autoglm.llm.model import LanguageModel
from autoglm.llm.sampler import sample
from autoglm.llm.scheduler import Chunk
from autoglm.llm.sequence import Sequence


class ModelRunner:
    """Runs the model over packed chunks, keys and values going to the cache."""

    def __init__(self, model: LanguageModel, cache: KVCache) -> None:
        self.model = model
        self.cache = cache
        self.device = cache.keys.device

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> list[tuple[Sequence, int]]:
        """Compute the chunks; returns the next token of each sequence whose tokens are all computed then."""
        chunks = sorted(chunks, key=lambda chunk: chunk.length > 1)  # single tokens first, as PagedAttention wants
        hidden = self.model(*self._inputs(chunks), PagedAttention(self.cache, chunks))
        ends = torch.tensor([chunk.length for chunk in chunks]).cumsum(0) - 1
        rows = [end for end, chunk in zip(ends.tolist(), chunks, strict=True) if chunk.samples]
        if not rows:
            return []
        sequences = [chunk.sequence for chunk in chunks if chunk.samples]
        logits = self.model.logits(hidden[torch.tensor(rows, device=self.device)])
        return list(zip(sequences, sample(logits.float(), sequences), strict=True))

    def _inputs(self, chunks: list[Chunk]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [T, hidden_size] and positions [3, T] of the pass's tokens, packed in the order of `chunks`."""
        ids: list[int] = []
        positions = []
        for chunk in chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.length
            ids += sequence.tokens[chunk.start : end]
            positions.append(sequence.positions[:, chunk.start : end])
            first = max(chunk.start, sequence.prompt_length)
            generated = torch.arange(first, max(first, end), dtype=torch.int32)
            positions.append((generated - sequence.prompt_length + sequence.next_position).expand(3, -1))
        hidden = self.model.embed(torch.tensor(ids, device=self.device))
        offset = 0
        for chunk in chunks:
            place_media(hidden[offset : offset + chunk.length], chunk)
            offset += chunk.length
        return hidden, torch.cat(positions, dim=1).to(self.device)


def place_media(hidden: torch.Tensor, chunk: Chunk) -> None:
    """Put the images' embeddings over the placeholders of one chunk. hidden [chunk.length, hidden_size]"""
    embeddings = chunk.sequence.request.embeddings
    row = 0
    for span in chunk.sequence.media:
        first = max(span.start, chunk.start)
        last = min(span.start + span.length, chunk.start + chunk.length)
        if first < last and embeddings is not None:
            rows = embeddings[row + first - span.start : row + last - span.start]
            hidden[first - chunk.start : last - chunk.start] = rows.to(hidden.device, hidden.dtype)
        row += span.length
