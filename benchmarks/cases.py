"""Every operation of `autoglm.kernels`, at a model's shapes, with the bytes and operations that it cannot do without.

A case's launches differ in the memory they read, together more than the L2 cache holds, as in a model whose layers come
one after another. Bytes count each input and output once: weights, activations (bf16, or int8 where the weight wants
them so), keys and values with their scales. Operations count the products (a multiply and an add are two).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from autoglm.checkpoint import TextConfig
from autoglm.kernels.base import Activation, Kernels, LayerCache, Rotary, Weight
from autoglm.llm.kv_cache import KVCache
from autoglm.llm.model import rotary
from autoglm.llm.request_slots import record
from autoglm.preprocess.sampling_params import SamplingParams
from autoglm.quantization.int8 import Int8Weight
from benchmarks.limits import Work

SPREAD = 300 << 20  # bytes that a case's launches read together: five times the L2 cache of an H200
MOST_LAUNCHES = 512
BLOCK_SIZE = 16
CACHES = {"bf16": None, "fp8": torch.float8_e4m3fn, "int8": torch.int8}

Launch = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """An operation at one size. `make` allocates what it needs and gives launches that do the same on other memory."""

    name: str
    work: Work
    make: Callable[[], list[Launch]]


@dataclass(frozen=True)
class Cases:
    """The cases of one model on one device. setting: the type of the weights, int8 or bf16."""

    kernels: Kernels
    text: TextConfig
    device: torch.device
    dtype: torch.dtype
    setting: str
    spread: int = SPREAD

    def copies(self, size: float) -> int:
        """How many launches it takes to read `spread` bytes."""
        return int(min(MOST_LAUNCHES, max(3, self.spread // max(1, size))))

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of each product."""
        text = self.text
        mixed = text.num_attention_heads * text.head_dim
        return {
            "qkv": (mixed + 2 * text.num_key_value_heads * text.head_dim, text.hidden_size),
            "o": (text.hidden_size, mixed),
            "gate-up": (2 * text.intermediate_size, text.hidden_size),
            "down": (text.hidden_size, text.intermediate_size),
            "head": (text.vocab_size, text.hidden_size),
        }

    def weight(self, outputs: int, inputs: int) -> Weight:
        if self.setting == "bf16":
            return self.random(outputs, inputs)
        values = torch.randint(-127, 128, (outputs, inputs), device=self.device, dtype=torch.int8)
        return Int8Weight(values, torch.full((outputs, 1), inputs**-0.5 / 73, device=self.device))

    def embed(self, rows: int) -> Case:
        size = self.text.hidden_size

        def make() -> list[Launch]:
            table = self.random(self.text.vocab_size, size)
            ids = torch.randint(self.text.vocab_size, (self.copies(2 * rows * size), rows), device=self.device)
            return [partial(self.kernels.embed, row, table) for row in ids]

        return Case(f"embed-{rows}", Work(4 * rows * size), make)

    def add_norm(self, rows: int) -> Case:
        """Reads branch and residual, writes the residual and x (int8 where the weights want it so)."""
        size = self.text.hidden_size
        quantized = self.setting == "int8" and rows > 1
        moved = rows * size * (6 + (1 if quantized else 2))

        def make() -> list[Launch]:
            norm = self.random(size)
            pairs = [(self.random(1, rows, size), self.random(rows, size)) for _ in range(self.copies(moved))]
            return [partial(self.kernels.add_norm, *pair, norm, norm, 1e-5, quantized) for pair in pairs]

        return Case(f"add-norm-{rows}", Work(moved), make)

    def quantize(self, rows: int, size: int) -> Case:
        def make() -> list[Launch]:
            inputs = [self.random(rows, size) for _ in range(self.copies(3 * rows * size))]
            return [partial(self.kernels.quantize, x) for x in inputs]

        return Case(f"quantize-{rows}x{size}", Work(3 * rows * size), make)

    def product(self, name: str, rows: int) -> Case:
        outputs, inputs = self.products[name]
        results = outputs // 2 if name == "gate-up" else outputs
        item = 1 if self.setting == "int8" else 2
        moved = outputs * inputs * item + rows * (inputs * (1 if item == 1 and rows > 1 else 2) + results * 2)

        def make() -> list[Launch]:
            weights = [self.weight(outputs, inputs) for _ in range(self.copies(outputs * inputs * item))]
            x = self.random(rows, inputs)
            ready = self.kernels.quantize(x) if self.kernels.quantizes(weights[0], rows) else Activation(x)
            compute = self.kernels.gate_up if name == "gate-up" else self.kernels.linear
            return [partial(compute, ready, weight) for weight in weights]

        return Case(f"{name}-{rows}", Work(moved, 2 * rows * outputs * inputs), make)

    def caches(self, stored: str, slots: int, count: int) -> list[LayerCache]:
        """Layers of a KV cache, filled at random."""
        kind = CACHES[stored] or self.dtype
        cache = KVCache(self._layers(count), slots // BLOCK_SIZE, BLOCK_SIZE, self.device, self.dtype, kind)
        for layer in range(count):
            filled = cache.layer(layer)
            for data, scales in ((filled.keys, filled.key_scales), (filled.values, filled.value_scales)):
                data.copy_(torch.randn(data.shape, device=self.device) * (40 if kind == torch.int8 else 1))
                if kind == torch.int8 and scales is not None:
                    scales.fill_(1 / 40)
        return [cache.layer(layer) for layer in range(count)]

    def decode_attention(self, batch: int, keys: int, stored: str) -> Case:
        text, heads = self.text, self.text.num_attention_heads
        width = (heads + 2 * text.num_key_value_heads) * text.head_dim
        size = KVCache.bytes_per_token(text, CACHES[stored] or torch.bfloat16) // text.num_hidden_layers
        moved = batch * keys * size
        blocks = -(-keys // BLOCK_SIZE)

        def make() -> list[Launch]:
            caches = self.caches(stored, batch * blocks * BLOCK_SIZE, self.copies(moved))
            order = torch.randperm(batch * blocks, device=self.device, dtype=torch.int32).view(batch, blocks)
            lengths = torch.full((batch,), keys, dtype=torch.int32, device=self.device)
            positions = (lengths - 1).expand(3, -1).contiguous()
            qkv = self.random(1, batch, width)
            angles = self.rotary(keys)
            given = (order, lengths, heads, self.dtype)
            return [partial(self.kernels.decode_attention, qkv, positions, angles, cache, *given) for cache in caches]

        work = Work(moved + 2 * batch * (width + heads * text.head_dim), 0, 4 * batch * keys * heads * text.head_dim)
        return Case(f"decode-attention-{batch}x{keys}-{stored}", work, make)

    def prefill_attention(self, tokens: int) -> Case:
        """Of one whole prompt, over the paged cache."""
        heads, size = self.text.num_attention_heads, self.text.head_dim

        def make() -> list[Launch]:
            blocks = -(-tokens // BLOCK_SIZE)
            table = torch.randperm(blocks, device=self.device, dtype=torch.int32)[None]
            starts = torch.tensor([0, tokens], dtype=torch.int32, device=self.device)
            q = self.random(tokens, heads, size)
            given = (table, starts, starts[1:].clone(), tokens)  # a tensor of its own, aligned
            caches = self.caches("bf16", blocks * BLOCK_SIZE, 3)
            return [partial(self.kernels.prefill_attention, q, cache, *given) for cache in caches]

        return Case(f"prefill-attention-{tokens}", self._causal(tokens), make)

    def store_keys(self, tokens: int) -> Case:
        """Reads qkv, writes q, k and v, and k and v once more into the cache."""
        text, heads = self.text, self.text.num_attention_heads
        other = 2 * text.num_key_value_heads * text.head_dim
        width = heads * text.head_dim + other
        moved = 2 * tokens * (2 * width + other)

        def make() -> list[Launch]:
            slots = torch.randperm(-(-tokens // BLOCK_SIZE) * BLOCK_SIZE, device=self.device)[:tokens]
            positions = torch.arange(tokens, dtype=torch.int32, device=self.device).expand(3, -1).contiguous()
            angles = self.rotary(tokens)
            caches = self.caches("bf16", slots.numel() + BLOCK_SIZE, 3)
            given = (slots, heads, self.dtype)
            return [
                partial(self.kernels.store_keys, self.random(1, tokens, width), positions, angles, cache, *given)
                for cache in caches
            ]

        return Case(f"store-keys-{tokens}", Work(moved), make)

    def sample(self, rows: int) -> Case:
        """Greedy with a frequency penalty, as the real client asks for: reads logits (fp32) and marks (int32)."""
        vocab = self.text.vocab_size

        def make() -> list[Launch]:
            wishes = record(SamplingParams(frequency_penalty=0.2), 0)
            records = torch.tensor(wishes, dtype=torch.int32, device=self.device).repeat(rows, 1)
            seats = torch.arange(rows, dtype=torch.int32, device=self.device)
            steps, tokens = torch.zeros_like(seats), torch.zeros(rows, dtype=torch.int64, device=self.device)
            marks = torch.zeros(rows, vocab, dtype=torch.int32, device=self.device)
            kept = torch.zeros(rows, vocab, device=self.device)
            logits = torch.randn(self.copies(8 * rows * vocab), rows, vocab, device=self.device)
            return [partial(self.kernels.sample, x, seats, steps, records, marks, tokens, kept) for x in logits]

        return Case(f"sample-{rows}", Work(8 * rows * vocab), make)

    def rotary(self, positions: int) -> Rotary:
        return rotary(self.text, positions, self.device)

    def _causal(self, tokens: int) -> Work:
        heads, size = self.text.num_attention_heads, self.text.head_dim
        moved = 2 * tokens * size * (2 * heads + 2 * self.text.num_key_value_heads)
        return Work(moved, 0, 2 * tokens * (tokens + 1) * heads * size)

    def _layers(self, count: int) -> TextConfig:
        """The model with another number of layers."""
        return replace(self.text, num_hidden_layers=count)

    def all(
        self, rows: tuple[int, ...], prompt: int, batches: tuple[int, ...], lengths: tuple[int, ...]
    ) -> Iterator[Case]:
        """Products at so many rows, attention at these batches and numbers of keys, and of a prompt."""
        wide = self.text.intermediate_size
        for count in rows:
            yield self.embed(count)
            yield self.add_norm(count)
            if self.setting == "int8":
                yield self.quantize(count, wide)
            for name in self.products:
                if name != "head" or count <= max(batches):  # only last tokens meet the head
                    yield self.product(name, count)
        for batch in batches:
            for keys in lengths:
                for stored in CACHES:
                    yield self.decode_attention(batch, keys, stored)
        yield self.store_keys(prompt)
        yield self.prefill_attention(prompt)
        for count in (min(batches), max(batches)):
            yield self.sample(count)
