"""The operations of `autoglm.kernels` at a model's shapes, with their minimum bytes and operations.

The launches of a case read different memory, together more than the L2 cache holds, as the layers of a model do. Bytes
count each input and output once: weights, activations (bf16, or int8 if the weight's kernel takes them), keys and
values with their scales. Operations are those of the matrix products; a multiply-add is two.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from autoglm.checkpoint import TextConfig
from autoglm.kernels.base import AttentionConfig, AttentionMetadata, Kernels, LayerCache, SamplingState, Weight
from autoglm.layers import fit
from autoglm.llm.kv_cache import KVCache
from autoglm.llm.model import attention_config
from autoglm.llm.request_slots import pack_sampling_params
from autoglm.preprocess.sampling_params import SamplingParams
from autoglm.quantization.int8 import Int8Weight
from benchmarks.limits import Work

SPREAD = 300 << 20  # bytes that the launches of a case read together: five times the L2 cache of an H200
MAX_LAUNCHES = 512
BLOCK_SIZE = 16
CACHE_DTYPES = {"bf16": None, "fp8": torch.float8_e4m3fn, "int8": torch.int8}

Launch = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """An operation at one size. `make` allocates the inputs, and returns launches that differ only in memory."""

    name: str
    work: Work
    make: Callable[[], list[Launch]]


@dataclass(frozen=True)
class Cases:
    """The cases of one model on one device. setting: the dtype of the weights, int8 or bf16."""

    kernels: Kernels
    text: TextConfig
    device: torch.device
    dtype: torch.dtype
    setting: str
    spread: int = SPREAD

    def copies(self, size: float) -> int:
        """The number of launches that read `spread` bytes, at `size` bytes each."""
        return int(min(MAX_LAUNCHES, max(3, self.spread // max(1, size))))

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of each linear layer."""
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
            return [partial(self.kernels.embed, ids=row, table=table) for row in ids]

        return Case(f"embed-{rows}", Work(4 * rows * size), make)

    def add_norm(self, rows: int) -> Case:
        """Reads branch and residual, writes residual and x."""
        size = self.text.hidden_size
        quantized = self.setting == "int8" and rows > 1
        moved = rows * size * (6 + (1 if quantized else 2))

        def make() -> list[Launch]:
            norm = self.random(size)
            pairs = [(self.random(1, rows, size), self.random(rows, size)) for _ in range(self.copies(moved))]
            launch = partial(self.kernels.add_norm, branch_norm=norm, norm=norm, eps=1e-5, quantized=quantized)
            return [partial(launch, branch=branch, residual=residual) for branch, residual in pairs]

        return Case(f"add-norm-{rows}", Work(moved), make)

    def quantize(self, rows: int, size: int) -> Case:
        def make() -> list[Launch]:
            inputs = [self.random(rows, size) for _ in range(self.copies(3 * rows * size))]
            return [partial(self.kernels.quantize, x=x) for x in inputs]

        return Case(f"quantize-{rows}x{size}", Work(3 * rows * size), make)

    def product(self, name: str, rows: int) -> Case:
        outputs, inputs = self.products[name]
        results = outputs // 2 if name == "gate-up" else outputs
        item = 1 if self.setting == "int8" else 2
        moved = outputs * inputs * item + rows * (inputs * (1 if item == 1 and rows > 1 else 2) + results * 2)

        def make() -> list[Launch]:
            weights = [self.weight(outputs, inputs) for _ in range(self.copies(outputs * inputs * item))]
            x = fit(self.random(rows, inputs), weights[0], self.kernels)
            compute = self.kernels.gate_up if name == "gate-up" else self.kernels.linear
            return [partial(compute, x=x, weight=weight) for weight in weights]

        return Case(f"{name}-{rows}", Work(moved, 2 * rows * outputs * inputs), make)

    def caches(self, stored: str, num_tokens: int, count: int) -> list[LayerCache]:
        """Random KV caches of `count` layers."""
        dtype = CACHE_DTYPES[stored]
        text = replace(self.text, num_hidden_layers=count)
        blocks = num_tokens // BLOCK_SIZE
        cache = KVCache(text, self.device, self.dtype, num_blocks=blocks, block_size=BLOCK_SIZE, cache_dtype=dtype)
        layers = [cache.layer(layer) for layer in range(count)]
        for layer in layers:
            for data, scales in ((layer.keys, layer.key_scales), (layer.values, layer.value_scales)):
                data.copy_(torch.randn(data.shape, device=self.device) * (40 if dtype == torch.int8 else 1))
                if dtype == torch.int8 and scales is not None:
                    scales.fill_(1 / 40)
        return layers

    def decode_attention(self, batch: int, seq_len: int, stored: str) -> Case:
        text, heads = self.text, self.text.num_attention_heads
        width = (heads + 2 * text.num_key_value_heads) * text.head_dim
        size = KVCache.bytes_per_token(text, CACHE_DTYPES[stored] or torch.bfloat16) // text.num_hidden_layers
        moved = batch * seq_len * size
        blocks = -(-seq_len // BLOCK_SIZE)

        def make() -> list[Launch]:
            caches = self.caches(stored, batch * blocks * BLOCK_SIZE, self.copies(moved))
            seq_lens = torch.full((batch,), seq_len, dtype=torch.int32, device=self.device)
            launch = partial(
                self.kernels.decode_attention,
                qkv=self.random(1, batch, width),
                metadata=AttentionMetadata(
                    positions=(seq_lens - 1).expand(3, -1).contiguous(),
                    block_table=self.block_order(batch * blocks).view(batch, blocks),
                    seq_lens=seq_lens,
                ),
                config=self.attention_config(seq_len),
            )
            return [partial(launch, cache=cache) for cache in caches]

        attention = 4 * batch * seq_len * heads * text.head_dim
        work = Work(moved + 2 * batch * (width + heads * text.head_dim), bf16=attention)
        return Case(f"decode-attention-{batch}x{seq_len}-{stored}", work, make)

    def prefill_attention(self, tokens: int) -> Case:
        """One prompt in a single chunk."""
        heads, size = self.text.num_attention_heads, self.text.head_dim

        def make() -> list[Launch]:
            blocks = -(-tokens // BLOCK_SIZE)
            cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=self.device)
            metadata = AttentionMetadata(
                positions=self.positions(tokens),
                block_table=self.block_order(blocks)[None],
                seq_lens=cu_seqlens[1:],
                cu_seqlens_q=cu_seqlens,
                max_seqlen_q=tokens,
            )
            launch = partial(self.kernels.prefill_attention, q=self.random(tokens, heads, size), metadata=metadata)
            return [partial(launch, cache=cache) for cache in self.caches("bf16", blocks * BLOCK_SIZE, 3)]

        moved = 2 * tokens * size * (2 * heads + 2 * self.text.num_key_value_heads)
        work = Work(moved, bf16=2 * tokens * (tokens + 1) * heads * size)
        return Case(f"prefill-attention-{tokens}", work, make)

    def store_kv(self, tokens: int) -> Case:
        """Reads qkv, writes q, k and v, and k and v again to the cache."""
        text, heads = self.text, self.text.num_attention_heads
        kv_width = 2 * text.num_key_value_heads * text.head_dim
        width = heads * text.head_dim + kv_width

        def make() -> list[Launch]:
            num_slots = -(-tokens // BLOCK_SIZE) * BLOCK_SIZE
            launch = partial(
                self.kernels.store_kv,
                positions=self.positions(tokens),
                slot_mapping=torch.randperm(num_slots, device=self.device)[:tokens],
                config=self.attention_config(tokens),
            )
            caches = self.caches("bf16", num_slots, 3)
            return [partial(launch, qkv=self.random(1, tokens, width), cache=cache) for cache in caches]

        return Case(f"store-kv-{tokens}", Work(2 * tokens * (2 * width + kv_width)), make)

    def sample(self, rows: int) -> Case:
        """Greedy with a frequency penalty, as the AutoGLM client requests: reads fp32 logits and int32 counts."""
        vocab = self.text.vocab_size

        def make() -> list[Launch]:
            metadata = torch.from_numpy(pack_sampling_params(SamplingParams(frequency_penalty=0.2), 0))
            slots = torch.arange(rows, dtype=torch.int32, device=self.device)
            state = SamplingState(
                sampling_metadata=metadata.to(self.device).repeat(rows, 1),
                output_token_counts=torch.zeros(rows, vocab, dtype=torch.int32, device=self.device),
                last_tokens=torch.zeros(rows, dtype=torch.int64, device=self.device),
                logits_buffer=torch.zeros(rows, vocab, device=self.device),
            )
            launch = partial(self.kernels.sample, slots=slots, steps=torch.zeros_like(slots), state=state)
            logits = torch.randn(self.copies(8 * rows * vocab), rows, vocab, device=self.device)
            return [partial(launch, logits=x) for x in logits]

        return Case(f"sample-{rows}", Work(8 * rows * vocab), make)

    def attention_config(self, num_positions: int) -> AttentionConfig:
        return attention_config(self.text, num_positions, self.device, self.dtype)

    def positions(self, tokens: int) -> torch.Tensor:
        return torch.arange(tokens, dtype=torch.int32, device=self.device).expand(3, -1).contiguous()

    def block_order(self, num_blocks: int) -> torch.Tensor:
        return torch.randperm(num_blocks, device=self.device, dtype=torch.int32)

    def all(
        self, rows: tuple[int, ...], prompt_length: int, batch_sizes: tuple[int, ...], seq_lens: tuple[int, ...]
    ) -> Iterator[Case]:
        """Linear layers and norms for each number of rows, decode attention for each batch and length, and prefill."""
        wide = self.text.intermediate_size
        for count in rows:
            yield self.embed(count)
            yield self.add_norm(count)
            if self.setting == "int8":
                yield self.quantize(count, wide)
            for name in self.products:
                if name != "head" or count <= max(batch_sizes):  # the head is applied to last tokens only
                    yield self.product(name, count)
        for batch in batch_sizes:
            for seq_len in seq_lens:
                for stored in CACHE_DTYPES:
                    yield self.decode_attention(batch, seq_len, stored)
        yield self.store_kv(prompt_length)
        yield self.prefill_attention(prompt_length)
        for count in (min(batch_sizes), max(batch_sizes)):
            yield self.sample(count)
