"""Loads the vision encoder: from the checkpoint, or, in INT8, from the weight cache."""

import logging
import time
from typing import Any

import torch

from autoglm.checkpoint import Checkpoint
from autoglm.vision.vit import VisionTransformer
from autoglm.weights.cache import CacheKey, WeightCache
from autoglm.weights.safetensors import read_tensors, write_tensors

log = logging.getLogger(__name__)


def cache_key(checkpoint: Checkpoint, dtype: torch.dtype, int8: bool) -> CacheKey:
    """Identifies the weights and everything else that an image's features depend on."""
    settings: dict[str, Any] = {"model": "vision", "dtype": str(dtype).removeprefix("torch."), "int8": int8}
    return CacheKey.of(checkpoint.path, checkpoint.shards, settings)


def load(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    int8: bool = False,
    cache: WeightCache | None = None,
) -> VisionTransformer:
    """The checkpoint's ViT.

    Args:
        int8: round the weights of the blocks' linear layers to INT8.
        cache: for INT8 weights only.

    Raises:
        CheckpointError: the files do not fit the model.
    """
    begin = time.perf_counter()
    cached = False
    model = VisionTransformer.empty(checkpoint, device, dtype, int8)
    if int8 and cache:
        tensors = {name: tensor.data for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        cached = cache.fetch(
            cache_key(checkpoint, dtype, int8),
            sum(tensor.nbytes for tensor in tensors.values()),
            lambda path: read_tensors(path, tensors),
            lambda: model.fill(checkpoint),
            lambda path: write_tensors(path, tensors),
        )
    else:
        model.fill(checkpoint)
    source = "the weight cache" if cached else checkpoint.path
    log.info("vision encoder loaded from %s in %.1f s", source, time.perf_counter() - begin)
    return model
