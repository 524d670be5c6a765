"""Pixel limits of the checkpoint, the server and a request."""

import pytest

from autoglm.checkpoint import ImageLimits
from autoglm.config import ConfigError, LimitsConfig
from autoglm.errors import RequestError
from autoglm.vision.pixel_limits import request_limits, server_limits
from tests.vision.test_image_processor import LIMITS

LEAST = 2 * 28 * 28  # of one token


def pixels(limits: ImageLimits) -> tuple[int, int]:
    return limits.min_pixels, limits.max_pixels


def test_the_configuration_overrides_the_checkpoint() -> None:
    assert server_limits(LIMITS, LimitsConfig()) == LIMITS
    assert pixels(server_limits(LIMITS, LimitsConfig(max_pixels=500_000))) == (LIMITS.min_pixels, 500_000)
    larger = LimitsConfig(max_pixels=2 * LIMITS.max_pixels, min_pixels=9)
    assert pixels(server_limits(LIMITS, larger)) == (9, 2 * LIMITS.max_pixels)


def test_impossible_configurations_are_rejected() -> None:
    with pytest.raises(ConfigError, match=rf"^limits.max_pixels must be at least {LEAST} \(got {LEAST - 1}\)"):
        server_limits(LIMITS, LimitsConfig(max_pixels=LEAST - 1, min_pixels=1))
    with pytest.raises(ConfigError, match=r"^limits.min_pixels must be at most 10000 \(got 20000\)"):
        server_limits(LIMITS, LimitsConfig(max_pixels=10_000, min_pixels=20_000))


def test_a_request_overrides_the_server() -> None:
    assert request_limits(LIMITS, None, None) == LIMITS
    assert pixels(request_limits(LIMITS, 50_000, 20_000)) == (20_000, 50_000)
    assert pixels(request_limits(LIMITS, LEAST, None)) == (LEAST, LEAST)  # the server's minimum is lowered with it


@pytest.mark.parametrize(("max_pixels", "min_pixels", "message"), [
    (LIMITS.max_pixels + 1, None, f"max_pixels must be between {LEAST} and {LIMITS.max_pixels} "),
    (LEAST - 1, None, f"max_pixels must be between {LEAST} and {LIMITS.max_pixels} "),
    (None, 0, f"min_pixels must be between 1 and {LIMITS.max_pixels} "),
    (20_000, 30_000, "min_pixels must be between 1 and 20000 "),
])  # fmt: skip
def test_a_request_may_not_exceed_the_server(max_pixels: int | None, min_pixels: int | None, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        request_limits(LIMITS, max_pixels, min_pixels)
    assert caught.value.message.startswith(message)
