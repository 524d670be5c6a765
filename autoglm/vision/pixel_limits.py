"""Pixel limits of resized images: the checkpoint's, replaced by the server's, tightened by a request's.

All of them count both frames of an image, as the checkpoint does: 2 * height * width.
"""

from dataclasses import replace

from autoglm.checkpoint import ImageLimits
from autoglm.config import ConfigError, LimitsConfig
from autoglm.errors import invalid


def server_limits(checkpoint: ImageLimits, config: LimitsConfig) -> ImageLimits:
    """The checkpoint's limits, overridden by the configuration.

    Raises:
        ConfigError: no image can satisfy them.
    """
    limits = replace(
        checkpoint,
        max_pixels=config.max_pixels or checkpoint.max_pixels,
        min_pixels=config.min_pixels or checkpoint.min_pixels,
    )
    if limits.max_pixels < _least(limits):
        raise ConfigError(f"limits.max_pixels must be at least {_least(limits)} (got {limits.max_pixels})")
    if limits.min_pixels > limits.max_pixels:
        raise ConfigError(f"limits.min_pixels must be at most {limits.max_pixels} (got {limits.min_pixels})")
    return limits


def request_limits(server: ImageLimits, max_pixels: int | None, min_pixels: int | None) -> ImageLimits:
    """The server's limits, overridden by a request's, which may not raise the maximum.

    Raises:
        RequestError: a value is out of range.
    """
    most = _check("max_pixels", max_pixels, default=server.max_pixels, low=_least(server), high=server.max_pixels)
    least = _check("min_pixels", min_pixels, default=min(server.min_pixels, most), low=1, high=most)
    return replace(server, max_pixels=most, min_pixels=least)


def _check(name: str, value: int | None, *, default: int, low: int, high: int) -> int:
    if value is None:
        return default
    if not low <= value <= high:
        raise invalid(name, value, f"between {low} and {high} (2 x height x width)")
    return value


def _least(limits: ImageLimits) -> int:
    """Pixels of the smallest image, which is one token."""
    return limits.temporal_patch_size * (limits.patch_size * limits.merge_size) ** 2
