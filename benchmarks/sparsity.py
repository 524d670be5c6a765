"""What it saves, and what it costs, when text looks at a part of a screenshot's keys only.

    python -m benchmarks.sparsity --checkpoint DIR [--setting int8|bf16]

Mode and ratio stand behind the weights in a row's setting; `off` is dense. Prompts have 3 422 tokens with one image of
3 354, each another one, embeddings ready.

sparse-prefill-B: from the submission of B prompts to the last of their first tokens. sparse-decode-B: time per token of
B sequences from there until the first of them ends, medians; its limit counts the keys that the mode reads.
sparse-memory: what one request holds of the KV cache while it is answered. sparse-keys: visual keys that a decoding
token reads, of all. `topk` is there for accuracy: it is not timed.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence

from autoglm.checkpoint import Checkpoint, TextConfig
from autoglm.config import SparseAttentionConfig
from autoglm.llm.engine import Engine
from autoglm.llm.kv_cache import KVCache
from autoglm.llm.sparse.policy import Sparsity
from benchmarks import limits
from benchmarks.decode import SCREENSHOT, SCREENSHOT_GRID
from benchmarks.engines import Prompt, Stream, image_prompt, open_engine, submit
from benchmarks.report import Row, make_row, read_options, report

BATCHES = (1, 16, 64)
RATIOS = (0.2, 0.3, 0.4, 0.5)
TOKENS = 160  # the first of 64 prompts must not be answered before the last is computed
REPEATS = 2
DENSE_LAYERS = SparseAttentionConfig().dense_layers
KV_CACHE_MB = 24576  # 64 prompts in bf16, and what is left of them, at once
AT_ONCE = 8192  # tokens of prompts beside others that are being answered


class Measure:
    """One engine, timed with prompts of one form."""

    def __init__(
        self,
        engine: Engine,
        options: argparse.Namespace,
        length: int = SCREENSHOT,
        grid: tuple[int, int, int] = SCREENSHOT_GRID,
        tokens: int = TOKENS,
        repeats: int = REPEATS,
    ) -> None:
        self.engine = engine
        self.options = options
        self.length, self.grid, self.tokens, self.repeats = length, grid, tokens, repeats
        self.visual = grid[0] * grid[1] * grid[2] // engine.checkpoint.vision.spatial_merge_size**2

    def rows(self, choice: Sparsity | None, batches: Sequence[int] = BATCHES) -> Iterator[Row]:
        options, text, setting = named(self.options, choice), self.engine.checkpoint.text, self.options.setting
        share = keys_read(choice, text)
        unread = round((1 - share) * self.visual)
        computed = self.length - unread if choice is not None and choice.mode == "prune" else self.length
        for batch in batches:
            measured = [self.times(choice, batch) for _ in range(self.repeats)]
            first, step = (statistics.median(times) for times in zip(*measured, strict=True))
            least = limits.milliseconds(limits.prefill(text, setting, [computed] * batch), options.machine, setting)
            yield make_row(options, f"sparse-prefill-{batch}", first * 1e3, "ms", least)
            work = limits.decode_step(text, setting, batch, self.length - unread + self.tokens / 2)
            least = limits.milliseconds(work, options.machine, setting)
            yield make_row(options, f"sparse-decode-{batch}", step * 1e3, "ms", least, {"tokens/s": batch / step})
        yield make_row(options, "sparse-memory", self.held(choice) / 2**20, "MiB")
        yield make_row(options, "sparse-keys", 100 * share, "%")

    def times(self, choice: Sparsity | None, batch: int) -> tuple[float, float]:
        """Seconds from the submission of fresh prompts to the last of their first tokens; and per token from there on
        until the first of them ends."""
        prompts = [image_prompt(self.engine, self.length, self.grid) for _ in range(batch)]
        began = time.perf_counter()
        streams = [self.submit(prompt, choice) for prompt in prompts]
        for stream in streams:
            stream.wait()
        start, end = max(stream.times[0] for stream in streams), min(stream.times[-1] for stream in streams)
        if start >= end:
            raise RuntimeError(f"the first of {batch} answers of {self.tokens} tokens ended before all had begun")
        tokens = sum(start < moment <= end for stream in streams for moment in stream.times)
        return start - began, (end - start) * batch / tokens

    def submit(self, prompt: Prompt, choice: Sparsity | None) -> Stream:
        mode, ratio = ("off", None) if choice is None else (choice.mode, choice.ratio)
        (stream,) = submit(self.engine, [prompt], self.tokens, sparse_mode=mode, sparse_ratio=ratio)
        return stream

    def held(self, choice: Sparsity | None) -> int:
        """Bytes of the KV cache that belong to one request in the middle of its answer, summaries included."""
        stream = self.submit(image_prompt(self.engine, self.length, self.grid), choice)
        stream.wait_for(self.tokens // 2)
        blocks, cache, text = self.engine.stats.blocks_held, self.engine.runner.cache, self.engine.checkpoint.text
        stream.wait()
        block = KVCache.bytes_per_token(text, cache.keys.dtype) * cache.block_size
        return blocks * (block + (0 if cache.summaries is None else KVCache.summary_bytes(text, cache.dtype)))


def named(options: argparse.Namespace, choice: Sparsity | None) -> argparse.Namespace:
    """The options with mode and ratio behind the setting."""
    name = "off" if choice is None else f"{choice.mode} {choice.ratio}"
    return argparse.Namespace(**{**vars(options), "setting": f"{options.setting} {name}"})


def keys_read(choice: Sparsity | None, text: TextConfig) -> float:
    """Of the visual keys of all layers, the share that a decoding token reads."""
    if choice is None:
        return 1.0
    dense = choice.dense_layers if choice.mode in ("topk", "pages") else 0
    dense = min(dense, text.num_hidden_layers)
    return (dense + (text.num_hidden_layers - dense) * choice.ratio) / text.num_hidden_layers


def measure(checkpoint: Checkpoint, options: argparse.Namespace) -> list[Row]:
    engine = open_engine(checkpoint, options.setting, KV_CACHE_MB, max_tokens_per_mixed_step=AT_ONCE)
    try:
        plain = Measure(engine, options)
        for choice in (None, Sparsity("snap", RATIOS[0], DENSE_LAYERS), Sparsity("prune", RATIOS[0], DENSE_LAYERS)):
            plain.times(choice, BATCHES[-1])  # what happens once happens here
        rows = list(plain.rows(None))
        for ratio in RATIOS:
            rows += plain.rows(Sparsity("snap", ratio, DENSE_LAYERS))
            rows += plain.rows(Sparsity("prune", ratio, DENSE_LAYERS))
    finally:
        engine.close()
    sparse = SparseAttentionConfig("pages", min_batch=1, dense_layers=DENSE_LAYERS)
    engine = open_engine(
        checkpoint, options.setting, KV_CACHE_MB, sparse_attention=sparse, max_tokens_per_mixed_step=AT_ONCE
    )
    try:
        paged = Measure(engine, options)
        paged.times(Sparsity("pages", RATIOS[0], DENSE_LAYERS), BATCHES[-1])
        for ratio in RATIOS:
            rows += paged.rows(Sparsity("pages", ratio, DENSE_LAYERS))
    finally:
        engine.close()
    return rows


def main() -> None:
    options = read_options(__doc__)
    report(options, "sparsity", measure(Checkpoint.open(options.checkpoint), options))


if __name__ == "__main__":
    main()
