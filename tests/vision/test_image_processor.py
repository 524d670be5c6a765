"""Image preprocessing against transformers, on photographs and screens."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import smart_resize as reference_resize

from autoglm.checkpoint import ImageLimits
from autoglm.errors import RequestError
from autoglm.vision.image_processor import device_patches, grid_of, patches, smart_resize, tokens_of

PHOTOS = Path(__file__).parent / "photos"
LIMITS = ImageLimits(
    min_pixels=12544,
    max_pixels=9633792,
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
SMALL = ImageLimits(**{**LIMITS.__dict__, "max_pixels": 200_000})


def photo(name: str) -> Image.Image:
    return Image.open(PHOTOS / name).convert("RGB")


def screen(width: int, height: int) -> Image.Image:
    """A settings page with flat areas, rounded cards and small text."""
    image = Image.new("RGB", (width, height), (250, 250, 252))
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(max(9, width // 30))
    colours = np.random.default_rng(1).integers(120, 255, (30, 3))
    for i, colour in enumerate(colours.tolist()):
        top = int((i + 0.2) * height / 30)
        draw.rounded_rectangle((width // 50, top, width - width // 50, top + height // 40), 9, fill=tuple(colour))
        draw.text((width // 18, top + 2), f"Setting {i}: Wi-Fi, Bluetooth, 08:30", fill=(10, 10, 20), font=font)
    return image


def images() -> Iterator[tuple[str, Image.Image]]:
    yield "portrait photo", photo("grace_hopper.jpg")
    yield "landscape photo", photo("rocket.jpg")
    yield "phone photo", photo("rocket.jpg").resize((1440, 3200))
    yield "phone screen", screen(1080, 2400)
    yield "small screen", screen(224, 448)
    yield "tiny", photo("rocket.jpg").resize((1, 1))
    yield "thin", photo("rocket.jpg").resize((900, 5))
    yield "wide", photo("rocket.jpg").resize((31, 700))


@pytest.mark.parametrize("limits", [LIMITS, SMALL], ids=["published", "small"])
@pytest.mark.parametrize("image", [pytest.param(image, id=name) for name, image in images()])
def test_patches_equal_transformers(image: Image.Image, limits: ImageLimits) -> None:
    reference = Glm4vImageProcessorPil(size={"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels})
    expected = reference(images=[image], return_tensors="np")
    size = smart_resize(image.height, image.width, limits)
    ours = patches(image, size, limits)
    assert ours.dtype == np.float32 and expected["pixel_values"].dtype == np.float32
    assert grid_of(size, limits) == tuple(expected["image_grid_thw"][0])
    assert np.array_equal(ours, expected["pixel_values"])
    pixels = torch.from_numpy(np.array(image))
    assert np.array_equal(device_patches(pixels, size, limits).numpy(), ours)
    rounded = device_patches(pixels, size, limits, torch.bfloat16)
    assert torch.equal(rounded, torch.from_numpy(ours).bfloat16())


def test_normalised_levels_equal_transformers() -> None:
    levels = np.tile(np.arange(256, dtype=np.uint8), 28 * 28 * 4 // 256 + 1)[: 56 * 56]
    image = Image.fromarray(np.repeat(levels.reshape(56, 56, 1), 3, axis=2))
    reference = Glm4vImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 9633792})
    limits = ImageLimits(**{**LIMITS.__dict__, "min_pixels": 784})
    ours = patches(image, (56, 56), limits)
    assert len(np.unique(ours)) == 3 * 256
    assert np.array_equal(ours, reference(images=[image], return_tensors="np")["pixel_values"])


def test_sizes_equal_transformers() -> None:
    sides = [1, 2, 13, 14, 27, 28, 29, 41, 42, 43, 70, 97, 112, 113, 350, 481, 720, 1080, 1219, 1600, 2400, 3200, 9000]
    refused = 0
    for limits in (LIMITS, SMALL):
        for height, width in itertools.product(sides, sides):
            try:
                expected = reference_resize(
                    2, height, width, min_pixels=limits.min_pixels, max_pixels=limits.max_pixels
                )
            except ValueError:
                refused += 1
                with pytest.raises(RequestError):
                    smart_resize(height, width, limits)
            else:
                assert smart_resize(height, width, limits) == expected, (height, width)
    assert 0 < refused < len(sides) ** 2 // 2


@pytest.mark.parametrize(
    "width, height, tokens",
    [(1080, 2400, 3354), (1080, 2340, 3276), (1080, 1920, 2691), (1220, 2712, 4268), (1440, 3200, 5814), (1, 1, 9)],
)
def test_number_of_tokens_of_common_screens(width: int, height: int, tokens: int) -> None:
    assert tokens_of(grid_of(smart_resize(height, width, LIMITS), LIMITS), LIMITS) == tokens


def test_an_extreme_aspect_ratio_is_rejected() -> None:
    with pytest.raises(ValueError, match="aspect ratio"):
        reference_resize(2, 10, 4000)
    with pytest.raises(
        RequestError, match=r"IMAGES\[3\] must be an image with an aspect ratio of at most 200 \(got 400\)"
    ):
        smart_resize(10, 4000, LIMITS, "IMAGES[3]")
    assert smart_resize(28, 28 * 200, LIMITS) == reference_resize(2, 28, 28 * 200)


@pytest.mark.parametrize("dtype, share_equal, furthest", [(torch.uint8, 0.92, 7), (torch.float32, 0.75, 16)])
def test_distance_to_the_torchvision_backend(dtype: torch.dtype, share_equal: float, furthest: int) -> None:
    """torchvision cannot be installed next to torch for the CPU, so its `resize` is reproduced here: torch's
    antialiased bicubic kernel on bytes (CPU) or on floats, clamped and rounded (GPU)."""
    for image in (photo("grace_hopper.jpg"), photo("rocket.jpg"), screen(1080, 2400)):
        size = smart_resize(image.height, image.width, LIMITS)
        ours = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC)).astype(int)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(dtype)
        theirs = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)
        theirs = theirs.clamp(0, 255).round()[0].permute(1, 2, 0)
        difference = np.abs(theirs.numpy().astype(int) - ours)
        assert (difference == 0).mean() > share_equal
        assert 0 < difference.max() <= furthest
