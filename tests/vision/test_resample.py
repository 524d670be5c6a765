"""The resize against Pillow, bit for bit."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from autoglm.vision.resample import resize


def check(pixels: NDArray[np.uint8], height: int, width: int) -> None:
    expected = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    assert np.array_equal(resize(torch.from_numpy(pixels), (height, width)).numpy(), np.asarray(expected))


@pytest.mark.parametrize("seed", range(5))
def test_random_sizes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(60):
        height, width, new_height, new_width = np.exp(rng.uniform(0, np.log(250), 4)).astype(int).tolist()
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        check(pixels, new_height, new_width)
        check(np.where(pixels < 128, np.uint8(0), np.uint8(255)), new_height, new_width)  # overshoots are clipped
        check(pixels, height, new_width)
        check(pixels, new_height, width)
        check(pixels, height, width)


@pytest.mark.parametrize(
    "source, target",
    [((2400, 1080), (2408, 1092)), ((427, 640), (420, 644)), ((301, 3), (224, 224)), ((300, 3), (224, 84))],
    ids=["screenshot", "lower and wider", "a hundred times as high as wide", "just below that"],
)
def test_the_order_of_the_axes_equals_pillow(source: tuple[int, int], target: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*source, 3), dtype=np.uint8)
    check(pixels, *target)
