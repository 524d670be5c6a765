"""Sparse cross-modal attention: which visual keys the text looks at.

What holds in every mode:

- Visual keys are those of image placeholders, of all images of a sequence together; sound is text here. The ratio
  applies to them alone: of v of them ceil(ratio * v) are kept, and all keys of text always stay.
- Keys are chosen for each layer and KV head; their strengths are summed over the query heads of its group.
- The softmax goes over the kept keys only, which move neither in position nor in order.

The modes:

- `topk`: every text token, of prompts and of answers, looks at the visual keys before it that have the greatest
  attention weights under dense attention, in all layers but the first `dense_layers`. Visual tokens see everything.
  Exact, and slow: it computes dense attention first. To measure accuracy with.
- `pages`: while answers are decoded, the same by whole blocks of the KV cache, in all layers but the first
  `dense_layers`, in passes of at least `min_batch` sequences (rows that pad a graph count). A block that holds visual
  keys only is kept for an upper bound of its scores (Tang et al. 2024, "Quest"); all other blocks are. Prompts are
  dense, and so are answers that are computed again because their sequence was pushed out.
- `snap`: once, when the prompt is computed: the visual keys that its last text (at most WINDOW tokens, behind the last
  image) gives most attention in sum go to blocks of the sequence's own, and so do the keys of text; nothing else is
  held from there on (Li et al. 2024, "SnapKV"). A block has room for all layers, so that every layer is thinned out.
  For a moment a sequence holds the prompt's blocks and its own: the KV cache must have room for both.
- `prune`: of each image the ceil(ratio * v) most diverse tokens (see `pruning`) enter the language model, at the
  positions that they have among all; the others never do.

What others may reuse: `topk` and `prune` change what a prompt's blocks hold from the first image on, so mode and ratio
go into the names of these. `snap` and `pages` leave the prompt's blocks dense, under their usual names; of what they
compute behind the prompt nothing is named.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Literal

from autoglm.config import SparseAttentionConfig
from autoglm.errors import invalid
from autoglm.llm.block_hash import MediaSpan
from autoglm.preprocess.sampling_params import SamplingParams

Mode = Literal["topk", "pages", "snap", "prune"]

WINDOW = 64
SERVERS_CHOICE = ("topk", "pages")  # they take graphs and memory from all requests: only where the server has them


@dataclass(frozen=True)
class Sparsity:
    """What one request has."""

    mode: Mode
    ratio: float
    dense_layers: int

    @classmethod
    def choose(cls, config: SparseAttentionConfig, wishes: SamplingParams) -> "Sparsity | None":
        """The server's configuration with the request's wishes; None is dense.

        Raises:
            RequestError: a mode that only the server's configuration can turn on.
        """
        mode = wishes.sparse_mode or config.mode
        if mode in SERVERS_CHOICE and mode != config.mode:
            raise invalid("sparse_mode", mode, f"off, snap, prune or the server's own ({config.mode})")
        ratio = config.ratio if wishes.sparse_ratio is None else wishes.sparse_ratio
        return None if mode == "off" else cls(mode, ratio, config.dense_layers)

    def kept(self, visual: int) -> int:
        """How many of so many visual keys stay."""
        return math.ceil(self.ratio * visual - 1e-9)  # 0.07 * 100 is a little more than 7

    def name(self, media: Sequence[MediaSpan]) -> list[MediaSpan]:
        """The media under names that stand for what their tokens and those behind them hold in the KV cache."""
        if self.mode not in ("topk", "prune"):
            return list(media)
        layers = self.dense_layers if self.mode == "topk" else 0
        salt = f"{self.mode} {self.ratio} {layers}".encode()
        named = (replace(span, digest=sha256(span.digest + salt).digest()) for span in media)
        return [salted if span.visual else span for span, salted in zip(media, named, strict=True)]
