"""The share of a prompt's attention to its image that a sparse mode keeps.

    python -m benchmarks.attention_kept [--checkpoint DIR] [--setting int8|bf16]

Measured for the last token of each of the demo's samples, screenshots with their tasks, on the demo checkpoint or
another trained one. sparse-attention: percent, the mean over samples, KV heads and all but the dense layers; a row's
setting has the weights' dtype, mode and ratio.
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch

from autoglm.checkpoint import Checkpoint
from autoglm.config import SparseAttentionConfig, SparseMode
from autoglm.kernels.reference.attention import dequantize_kv
from autoglm.llm.attention import PagedAttention
from autoglm.llm.engine import Engine
from autoglm.llm.mrope import image_runs, prompt_positions
from autoglm.llm.prefill import BLOCK_SIZE, prefill
from autoglm.llm.sparse.attention import attention_weights
from autoglm.llm.sparse.policy import num_kept
from benchmarks.engines import BenchmarkPrompt
from benchmarks.report import make_parser, make_row, report
from benchmarks.screenshot import Agent
from benchmarks.sparsity import RATIOS, with_mode

DEMO = Path(__file__).parents[1] / "demo"
MODES: tuple[SparseMode, ...] = ("topk", "pages")


def attention_kept(
    engine: Engine, prompt: BenchmarkPrompt, configs: Sequence[SparseAttentionConfig]
) -> dict[SparseAttentionConfig, float]:
    """The kept share, 0 to 1, of each `topk` or `pages` configuration: the mean over KV heads and all but the dense
    layers. The prompt must have one image with text after it."""
    checkpoint, model = engine.checkpoint, engine.model_runner.model
    if prompt.grid is None or prompt.embeddings is None:
        raise ValueError("the prompt must have an image")
    layout = prompt.token_ids, [prompt.grid], checkpoint.image_token_id, checkpoint.vision.spatial_merge_size
    ((start, length),) = image_runs(*layout)
    positions, _ = prompt_positions(*layout)
    with torch.inference_mode():
        hidden = model.embed(torch.tensor(prompt.token_ids, device=engine.model_runner.device))
        hidden[start : start + length] = prompt.embeddings.to(hidden.device, hidden.dtype)
        probes: list[Probe] = []

        def wrap(dense: PagedAttention) -> Probe:
            probes.append(Probe(dense, start, length, configs))
            return probes[-1]

        prefill(model, hidden, positions, wrap)
    return {config: statistics.mean(shares) for config, shares in probes[0].shares.items()}


class Probe:
    """Dense attention of a whole prompt that records the kept shares of its last token in each layer."""

    def __init__(
        self, dense: PagedAttention, start: int, length: int, configs: Sequence[SparseAttentionConfig]
    ) -> None:
        self.dense = dense
        self.start, self.end = start, start + length
        self.configs = configs
        self.shares: defaultdict[SparseAttentionConfig, list[float]] = defaultdict(list)

    def __call__(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """qkv [S, T, (num_heads + 2 * kv_heads) * head_dim], partial sums, not rotated -> [T, num_heads * head_dim]."""
        mixed = self.dense(layer, qkv)
        dense, dtype = self.dense, self.dense.kv_cache.dtype
        cache, indices = dense.kv_cache.layer(layer), torch.arange(qkv.shape[1], device=qkv.device)
        last = indices[-1:]
        q, _, _ = dense.kernels.store_kv(
            qkv=qkv[:, last],
            positions=dense.batch.positions[:, last],
            slot_mapping=torch.full_like(last, -1),  # the cache has the keys already
            cache=cache,
            config=dense.config,
        )
        key, _ = dequantize_kv(cache, indices, dtype)
        weights = attention_weights(q, key, last)[..., self.start : self.end].sum((1, 2))  # [kv_heads, length]
        for config in self.configs:
            if layer >= config.dense_layers:
                kept = self._topk(weights, config) if config.mode == "topk" else self._pages(q[0], key, config)
                share = weights.where(kept, 0).sum(1) / weights.sum(1)
                self.shares[config].append(share.mean().item())
        return mixed

    def _topk(self, weights: torch.Tensor, config: SparseAttentionConfig) -> torch.Tensor:
        """The visual keys that are kept, bool [kv_heads, length]."""
        strongest = weights.topk(num_kept(config.ratio, weights.shape[1])).indices
        return torch.zeros_like(weights, dtype=torch.bool).scatter_(1, strongest, True)

    def _pages(self, q: torch.Tensor, key: torch.Tensor, config: SparseAttentionConfig) -> torch.Tensor:
        """The visual keys in blocks that are kept, bool [kv_heads, length]. q [num_heads, head_dim]"""
        start, end = -(-self.start // BLOCK_SIZE) * BLOCK_SIZE, self.end // BLOCK_SIZE * BLOCK_SIZE
        _, kv_heads, size = key.shape
        blocks = key[start:end].float().view(-1, BLOCK_SIZE, kv_heads, size)
        group = q.float().view(kv_heads, -1, size)
        bounds = torch.einsum("hd,phd->hp", group.clamp(min=0).sum(1), blocks.amax(1))
        bounds += torch.einsum("hd,phd->hp", group.clamp(max=0).sum(1), blocks.amin(1))
        selected = torch.zeros_like(bounds, dtype=torch.bool)
        selected.scatter_(1, bounds.topk(num_kept(config.ratio, len(blocks))).indices, True)
        kept = torch.ones(kv_heads, len(key), dtype=torch.bool, device=key.device)
        kept[:, start:end] = selected.repeat_interleave(BLOCK_SIZE, 1)
        return kept[:, self.start : self.end]


def main() -> None:
    parser = make_parser(__doc__, ("bf16", "int8"))
    parser.add_argument("--checkpoint", type=Path, default=DEMO / "checkpoint", help="a trained one (%(default)s)")
    options = parser.parse_args()
    folder = DEMO / "samples"
    samples = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    configs = [SparseAttentionConfig(mode, ratio) for mode in MODES for ratio in RATIOS]
    with closing(Agent(Checkpoint.open(options.checkpoint), options.setting, kv_cache_mb=256)) as agent:
        prompts = [agent.prompt((folder / sample["image"]).read_bytes(), sample["task"]) for sample in samples]
        kept = [attention_kept(agent.engine, prompt, configs) for prompt in prompts]
    shares = {config: 100 * statistics.mean(each[config] for each in kept) for config in configs}
    rows = [make_row(with_mode(options, config), "sparse-attention", shares[config], "%") for config in configs]
    report(options, "attention", rows)


if __name__ == "__main__":
    main()
