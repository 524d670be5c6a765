"""How much of the attention that a prompt's last token gives to an image goes to the keys that a mode keeps.

    python -m benchmarks.attention_kept [--checkpoint DIR] [--setting int8|bf16]

Over the demo's samples, screenshots with their tasks; of the demo checkpoint, unless another trained one is named.
sparse-attention: percent, the mean over the samples, KV heads and all layers that are not dense; mode and ratio stand
behind the weights in a row's setting.
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from autoglm.checkpoint import Checkpoint
from autoglm.config import SparseAttentionConfig
from autoglm.kernels.reference.attention import decode
from autoglm.kernels.reference.sparse import attention_weights, visual_attention
from autoglm.llm.attention import PagedAttention
from autoglm.llm.engine import Engine
from autoglm.llm.mrope import image_runs, prompt_positions
from autoglm.llm.prefill import BLOCK_SIZE, prefill
from autoglm.llm.sparse.policy import WINDOW, Mode, Sparsity
from benchmarks.engines import Prompt
from benchmarks.report import make_parser, make_row, report
from benchmarks.screenshot import open_agent
from benchmarks.sparsity import RATIOS, named

DEMO = Path(__file__).parents[1] / "demo"
MODES: tuple[Mode, ...] = ("topk", "pages", "snap")


def attention_kept(engine: Engine, prompt: Prompt, choices: Sequence[Sparsity]) -> dict[Sparsity, float]:
    """By choice, from 0 to 1, the mean over KV heads and all layers that are not dense.

    Under `snap` the text in front of the last token chooses. The prompt has one image, and text behind it.
    """
    checkpoint, model = engine.checkpoint, engine.runner.model
    if prompt.grid is None or prompt.embeddings is None:
        raise ValueError("the prompt has no image")
    places = prompt.token_ids, [prompt.grid], checkpoint.image_token_id, checkpoint.vision.spatial_merge_size
    ((first, length),) = image_runs(*places)
    positions, _ = prompt_positions(*places)
    with torch.inference_mode():
        hidden = model.embed(torch.tensor(prompt.token_ids, device=engine.runner.device))
        hidden[first : first + length] = prompt.embeddings.to(hidden.device, hidden.dtype)
        probes: list[Probe] = []

        def watch(dense: PagedAttention) -> Probe:
            probes.append(Probe(dense, first, length, choices))
            return probes[-1]

        prefill(model, hidden, positions, watch)
    return {choice: sum(found) / len(found) for choice, found in probes[0].found.items()}


class Probe:
    """Dense attention of one whole prompt, whose last tokens are looked at."""

    def __init__(self, dense: PagedAttention, first: int, length: int, choices: Sequence[Sparsity]) -> None:
        self.dense = dense
        self.first, self.length = first, length
        self.choices = choices
        self.found: defaultdict[Sparsity, list[float]] = defaultdict(list)

    def __call__(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """qkv [S, T, (heads + 2 * kv_heads) * head_dim], partial sums, not rotated -> [T, heads * head_dim]."""
        mixed = self.dense(layer, qkv)
        dense, cache, tokens, end = self.dense, self.dense.cache, qkv.shape[1], self.first + self.length
        rows = torch.arange(max(end, tokens - 1 - WINDOW), tokens, device=qkv.device)
        q, _, _ = dense.kernels.store_keys(
            qkv[:, rows],
            dense.batch.positions[:, rows],
            dense.rotary,
            cache.layer(layer),
            rows.new_full(rows.shape, -1),  # the cache has them already
            dense.heads,
            cache.dtype,
        )
        key, _ = decode(cache.layer(layer), torch.arange(tokens, device=qkv.device), cache.dtype)
        visual = torch.arange(self.first, end, device=qkv.device)
        given = attention_weights(q[-1:], key, rows[-1:])[..., visual].sum((1, 2))  # [kv_heads, v]
        window = visual_attention(q[:-1], key, rows[:-1], visual)
        for choice in self.choices:
            if choice.mode == "snap" or layer >= choice.dense_layers:
                if choice.mode == "pages":
                    kept = self._pages(q[-1], key, choice)
                else:
                    strength = window if choice.mode == "snap" else given
                    strongest = strength.topk(choice.kept(self.length)).indices
                    kept = torch.zeros_like(given, dtype=torch.bool).scatter_(1, strongest, True)
                share = given.where(kept, 0).sum(1) / given.sum(1)
                self.found[choice].append(share.mean().item())
        return mixed

    def _pages(self, q: torch.Tensor, key: torch.Tensor, choice: Sparsity) -> torch.Tensor:
        """Which visual keys lie in blocks that stay, bool [kv_heads, v]. q [heads, head_dim]"""
        begin, end = -(-self.first // BLOCK_SIZE), (self.first + self.length) // BLOCK_SIZE
        _, kv_heads, size = key.shape
        blocks = key[begin * BLOCK_SIZE : end * BLOCK_SIZE].float().view(-1, BLOCK_SIZE, kv_heads, size)
        group = q.float().view(kv_heads, -1, size)
        bounds = torch.einsum("hd,phd->hp", group.clamp(min=0).sum(1), blocks.amax(1))
        bounds += torch.einsum("hd,phd->hp", group.clamp(max=0).sum(1), blocks.amin(1))
        stays = torch.ones(kv_heads, len(key), dtype=torch.bool, device=key.device)
        chosen = torch.zeros_like(bounds, dtype=torch.bool)
        chosen.scatter_(1, bounds.topk(choice.kept(len(blocks))).indices, True)
        stays[:, begin * BLOCK_SIZE : end * BLOCK_SIZE] = chosen.repeat_interleave(BLOCK_SIZE, 1)
        return stays[:, self.first : self.first + self.length]


def main() -> None:
    parser = make_parser(__doc__, ("bf16", "int8"))
    parser.add_argument("--checkpoint", type=Path, default=DEMO / "checkpoint", help="a trained one (%(default)s)")
    options = parser.parse_args()
    samples = DEMO / "samples"
    choices = [Sparsity(mode, ratio, SparseAttentionConfig().dense_layers) for mode in MODES for ratio in RATIOS]
    with open_agent(Checkpoint.open(options.checkpoint), options.setting, kv_cache_mb=256) as agent:
        found = [
            attention_kept(agent.engine, agent.read((samples / asked["image"]).read_bytes(), asked["task"]), choices)
            for asked in json.loads((samples / "samples.json").read_text(encoding="utf-8"))
        ]
    shares = {choice: statistics.mean(kept[choice] for kept in found) for choice in choices}
    rows = [make_row(named(options, choice), "sparse-attention", 100 * shares[choice], "%") for choice in choices]
    report(options, "attention", rows)


if __name__ == "__main__":
    main()
