"""Where a process computes and in which dtype: decided once, at start, here."""

import logging

import torch

from autoglm.config import ConfigError, ModelConfig

log = logging.getLogger(__name__)


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
