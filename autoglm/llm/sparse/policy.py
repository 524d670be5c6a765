"""Sparse cross-modal attention: which visual keys text attends to.

In every mode:

- Visual keys are those of image placeholders, of all images of a sequence together; audio counts as text. Of v visual
  keys ceil(ratio * v) are kept; all keys of text are.
- Keys are chosen for each layer and KV head, by scores summed over the query heads of a group.
- The softmax is over the kept keys. They keep their positions and their order.

The modes:

- `topk`: each text token, of prompts and answers, attends to the earlier visual keys with the largest attention weights
  under dense attention, in all layers but the first `dense_layers`. Visual tokens attend to everything. Exact but slow:
  it computes dense attention first. A reference for evaluation.
- `pages`: during decoding, the same by whole blocks of the KV cache, in all layers but the first `dense_layers`, in
  passes of at least `min_batch` rows (padding included). Blocks that hold visual keys only are ranked by an upper bound
  of their scores (Tang et al. 2024, "Quest"); all other blocks are kept. Prompts are dense, and so are answers that are
  recomputed after a preemption.
- `prune`: the ceil(ratio * v) most diverse tokens of each image (see `divprune`) enter the language model, at their
  original positions; the others do not.

Prefix cache: `topk` and `prune` change the keys of a prompt from the first image on, so the media hashes include mode
and ratio. `pages` leaves a prompt's blocks dense, under their usual hashes; blocks of its answers are not cached.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256

from autoglm.config import SparseAttentionConfig
from autoglm.errors import invalid
from autoglm.llm.block_hash import MediaSpan
from autoglm.preprocess.sampling_params import SamplingParams

SERVER_MODES = ("topk", "pages")  # they cost all requests CUDA graphs or memory: only the configuration enables them


def resolve(config: SparseAttentionConfig, params: SamplingParams) -> SparseAttentionConfig | None:
    """The server's configuration with a request's options applied; None is dense attention.

    Raises:
        RequestError: the mode can only be enabled by the server's configuration.
    """
    mode = params.sparse_mode or config.mode
    if mode in SERVER_MODES and mode != config.mode:
        accepted = dict.fromkeys(("off", "prune", config.mode))
        raise invalid("sparse_mode", mode, f"one of {', '.join(accepted)} on this server")
    ratio = config.ratio if params.sparse_ratio is None else params.sparse_ratio
    return None if mode == "off" else replace(config, mode=mode, ratio=ratio)


def num_kept(ratio: float, num_visual: int) -> int:
    """How many visual keys are kept."""
    return math.ceil(ratio * num_visual - 1e-9)  # 0.07 * 100 is slightly more than 7


def salt_media(config: SparseAttentionConfig, media: Sequence[MediaSpan]) -> list[MediaSpan]:
    """The media with hashes that also identify how the mode changes their keys, and those of all later tokens."""
    if config.mode not in ("topk", "prune"):
        return list(media)
    layers = config.dense_layers if config.mode == "topk" else 0
    salt = f"{config.mode} {config.ratio} {layers}".encode()
    salted = (replace(span, media_hash=sha256(span.media_hash + salt).digest()) for span in media)
    return [new if span.visual else span for span, new in zip(media, salted, strict=True)]
