"""Sparse attention: speed and KV cache memory of each mode with screenshots.

    python -m benchmarks.sparsity --checkpoint DIR [--setting int8|bf16]

A row's setting is the weights' dtype, mode and ratio; `off` is dense. Prompts have 3,422 tokens, 3,354 of them of one
image, always a new one with given embeddings.

sparse-prefill-B: from the submission of B prompts to the last first token. sparse-decode-B: time per output token from
then until the first sequence ends; medians; its roofline counts the keys that the mode reads. sparse-memory: KV cache
of one request while it decodes. sparse-keys: share of the visual keys that a decoding token reads. `topk` is not timed:
it is a reference for accuracy.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing

from autoglm.checkpoint import Checkpoint, TextConfig
from autoglm.config import SparseAttentionConfig
from autoglm.llm.engine import Engine
from autoglm.llm.kv_cache import KVCache
from benchmarks import limits
from benchmarks.decode import SCREENSHOT, SCREENSHOT_GRID
from benchmarks.engines import BenchmarkPrompt, Stream, image_prompt, open_engine, submit
from benchmarks.report import Row, make_row, read_options, report

BATCHES = (1, 16, 64)
RATIOS = (0.2, 0.3, 0.4, 0.5)
TOKENS = 160  # enough for all of 64 prompts to be prefilled before the first answer ends
REPEATS = 2
KV_CACHE_MB = 24576  # 64 prompts in bf16, and the cached blocks of earlier ones
MAX_MIXED_TOKENS = 8192


class Measure:
    """Times one engine with prompts of one shape; `sparse` is None for dense attention."""

    def __init__(
        self,
        engine: Engine,
        options: argparse.Namespace,
        *,
        length: int = SCREENSHOT,
        grid: tuple[int, int, int] = SCREENSHOT_GRID,
        tokens: int = TOKENS,
        repeats: int = REPEATS,
    ) -> None:
        self.engine = engine
        self.options = options
        self.length, self.grid, self.tokens, self.repeats = length, grid, tokens, repeats
        self.num_visual = grid[0] * grid[1] * grid[2] // engine.checkpoint.vision.spatial_merge_size**2

    def rows(self, sparse: SparseAttentionConfig | None, batches: Sequence[int] = BATCHES) -> Iterator[Row]:
        options, text, setting = with_mode(self.options, sparse), self.engine.checkpoint.text, self.options.setting
        share = keys_read(sparse, text)
        num_unread = round((1 - share) * self.num_visual)
        num_prefilled = self.length - num_unread if sparse is not None and sparse.mode == "prune" else self.length
        for batch in batches:
            measured = [self.times(sparse, batch) for _ in range(self.repeats)]
            first, step = (statistics.median(times) for times in zip(*measured, strict=True))
            work = limits.prefill(text, setting, [num_prefilled] * batch)
            limit = limits.milliseconds(work, options.machine, setting)
            yield make_row(options, f"sparse-prefill-{batch}", first * 1e3, "ms", limit)
            work = limits.decode_step(text, setting, batch, self.length - num_unread + self.tokens / 2)
            limit = limits.milliseconds(work, options.machine, setting)
            yield make_row(options, f"sparse-decode-{batch}", step * 1e3, "ms", limit, {"tokens/s": batch / step})
        yield make_row(options, "sparse-memory", self.kv_cache_bytes(sparse) / 2**20, "MiB")
        yield make_row(options, "sparse-keys", 100 * share, "%")

    def times(self, sparse: SparseAttentionConfig | None, batch: int) -> tuple[float, float]:
        """Seconds from the submission of new prompts to the last first token; and seconds per output token from then
        until the first sequence ends."""
        prompts = [image_prompt(self.engine, self.length, self.grid) for _ in range(batch)]
        submitted = time.perf_counter()
        streams = [self.submit(prompt, sparse) for prompt in prompts]
        for stream in streams:
            stream.wait()
        start, end = max(stream.times[0] for stream in streams), min(stream.times[-1] for stream in streams)
        if start >= end:
            raise RuntimeError(f"the first of {batch} answers of {self.tokens} tokens ended before the last one began")
        tokens = sum(start < token_time <= end for stream in streams for token_time in stream.times)
        return start - submitted, (end - start) * batch / tokens

    def submit(self, prompt: BenchmarkPrompt, sparse: SparseAttentionConfig | None) -> Stream:
        mode, ratio = ("off", None) if sparse is None else (sparse.mode, sparse.ratio)
        (stream,) = submit(self.engine, [prompt], self.tokens, sparse_mode=mode, sparse_ratio=ratio)
        return stream

    def kv_cache_bytes(self, sparse: SparseAttentionConfig | None) -> int:
        """KV cache of one request in the middle of its answer, key bounds included."""
        stream = self.submit(image_prompt(self.engine, self.length, self.grid), sparse)
        stream.wait_for(self.tokens // 2)
        num_blocks = self.engine.stats.blocks_held
        stream.wait()
        cache, text = self.engine.model_runner.kv_cache, self.engine.checkpoint.text
        block = KVCache.bytes_per_token(text, cache.keys.dtype) * cache.block_size
        return num_blocks * (block + (0 if cache.key_bounds is None else KVCache.key_bounds_bytes(text, cache.dtype)))


def with_mode(options: argparse.Namespace, sparse: SparseAttentionConfig | None) -> argparse.Namespace:
    """The options with mode and ratio in the setting."""
    name = "off" if sparse is None else f"{sparse.mode} {sparse.ratio}"
    return argparse.Namespace(**{**vars(options), "setting": f"{options.setting} {name}"})


def keys_read(sparse: SparseAttentionConfig | None, text: TextConfig) -> float:
    """The share of the visual keys of all layers that a decoding token reads."""
    if sparse is None:
        return 1.0
    layers = text.num_hidden_layers
    num_dense = min(sparse.dense_layers, layers) if sparse.mode in ("topk", "pages") else 0
    return (num_dense + (layers - num_dense) * sparse.ratio) / layers


def measure(checkpoint: Checkpoint, options: argparse.Namespace) -> list[Row]:
    prune = [SparseAttentionConfig("prune", ratio) for ratio in RATIOS]
    pages = [SparseAttentionConfig("pages", ratio, min_batch=1) for ratio in RATIOS]
    rows: list[Row] = []
    for default, modes in ((None, [None, *prune]), (pages[0], pages)):
        config = {"sparse_attention": default, "max_tokens_per_mixed_step": MAX_MIXED_TOKENS}
        with closing(open_engine(checkpoint, options.setting, KV_CACHE_MB, **config)) as engine:
            timed = Measure(engine, options)
            for sparse in modes[:2]:
                timed.times(sparse, BATCHES[-1])  # warm-up
            for sparse in modes:
                rows += timed.rows(sparse)
    return rows


def main() -> None:
    options = read_options(__doc__)
    report(options, "sparsity", measure(Checkpoint.open(options.checkpoint), options))


if __name__ == "__main__":
    main()
