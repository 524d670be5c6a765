"""The device and dtype a process computes with, and the facts about the device: asked once, at start-up, here."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch

from autoglm.config import ConfigError, ModelConfig

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class DeviceInfo:
    """The facts that kernels are tuned by. On the CPU, for Triton's interpreter, they are those of a small GPU."""

    name: str
    num_sms: int
    capability: tuple[int, int]


@lru_cache
def device_info(device: torch.device) -> DeviceInfo:
    """The facts about a device."""
    if device.type != "cuda":
        return DeviceInfo("the CPU", 16, (0, 0))
    properties = torch.cuda.get_device_properties(device)
    return DeviceInfo(properties.name, properties.multi_processor_count, (properties.major, properties.minor))


def choose_device(config: ModelConfig, index: int = 0) -> tuple[torch.device, torch.dtype]:
    """The configured device and dtype; `auto` takes a GPU where there is one.

    Args:
        index: which of the visible GPUs.

    Raises:
        ConfigError: `cuda` is configured and there is no such GPU.
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
    log.info("computing in %s on %s", name, device_info(device))
    return device, dtype


def run_on_side_stream(device: torch.device, compute: Callable[[], T]) -> T:
    """Run `compute` and wait for its result; on a GPU in a stream of its own, ahead of work queued in other streams.

    Its inputs must be complete. Call `record_stream()` before using a tensor of the result on another stream.
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
    """One for all callers: each stream has memory of its own."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
