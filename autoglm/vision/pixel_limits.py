"""To how many pixels images are resized: the checkpoint says it, the server may change it, a request for itself.

All of them count frames, as the checkpoint does: an image of h x w pixels is two frames, 2 * h * w.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from autoglm.checkpoint import ImageLimits
from autoglm.config import ConfigError, LimitsConfig
from autoglm.errors import invalid


def server_limits(checkpoint: ImageLimits, config: LimitsConfig) -> ImageLimits:
    """The checkpoint's limits with what the configuration replaces.

    Raises:
        ConfigError: no image could obey them.
    """
    limits = replace(
        checkpoint,
        max_pixels=config.max_pixels or checkpoint.max_pixels,
        min_pixels=config.min_pixels or checkpoint.min_pixels,
    )
    if limits.max_pixels < _least(limits):
        raise ConfigError(f"limits.max_pixels is {limits.max_pixels}, it must be at least {_least(limits)}: one token")
    if limits.min_pixels > limits.max_pixels:
        raise ConfigError(f"limits.min_pixels is {limits.min_pixels}, more than max_pixels, {limits.max_pixels}")
    return limits


def request_limits(server: ImageLimits, parameters: Mapping[str, Any]) -> ImageLimits:
    """The server's limits with what one request asks for; an image may get smaller than the server's, not larger.

    Args:
        parameters: of the request; others than `max_pixels` and `min_pixels` are passed over. None counts as absent.

    Raises:
        RequestError: not a whole number, or out of range.
    """
    most = _read(parameters, "max_pixels", server.max_pixels, _least(server), server.max_pixels)
    least = _read(parameters, "min_pixels", min(server.min_pixels, most), 1, most)
    return replace(server, max_pixels=most, min_pixels=least)


def _read(parameters: Mapping[str, Any], name: str, default: int, lowest: int, highest: int) -> int:
    value = parameters.get(name)
    if value is None:
        return default
    if type(value) is not int or not lowest <= value <= highest:
        raise invalid(name, value, f"an integer from {lowest} to {highest} (2 x height x width)")
    return value


def _least(limits: ImageLimits) -> int:
    """Pixels of the smallest image, that of one token."""
    return limits.temporal_patch_size * (limits.patch_size * limits.merge_size) ** 2
