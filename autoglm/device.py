"""Where a process computes and in which dtype: decided once, at start, here."""

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import torch

from autoglm.config import ConfigError, ModelConfig

log = logging.getLogger(__name__)

T = TypeVar("T")


def choose_device(config: ModelConfig, index: int = 0) -> tuple[torch.device, torch.dtype]:
    """The device and dtype that the configuration asks for; `auto` is the best that is there.

    Args:
        index: which of the visible GPUs, where one is used.

    Raises:
        ConfigError: `cuda` is asked for and there is no such GPU.
    """
    available = torch.cuda.device_count()
    if config.device == "cuda" and index >= available:
        raise ConfigError(f"model.device is cuda, but GPU {index} is not among the {available} visible")
    on_gpu = config.device != "cpu" and index < available
    device = torch.device("cuda", index) if on_gpu else torch.device("cpu")
    name = config.dtype
    if name == "auto":
        name = "bfloat16" if on_gpu else "float32"
    dtype: torch.dtype = getattr(torch, name)
    if on_gpu:
        torch.cuda.set_device(device)
    log.info("computing on %s in %s", torch.cuda.get_device_name(device) if on_gpu else "the CPU", name)
    return device, dtype


def beside(device: torch.device, compute: Callable[[], T]) -> T:
    """What `compute` returns, once it is there.

    On a GPU it is computed in a stream of its own, ahead of what waits in others; what it reads must be there already.
    Who uses a tensor of the result in another stream has to say so (`record_stream`).
    """
    if device.type != "cuda":
        return compute()
    stream = _side_stream(device)
    with torch.cuda.stream(stream):
        result = compute()
        stream.synchronize()
    return result


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: each stream has memory of its own."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
