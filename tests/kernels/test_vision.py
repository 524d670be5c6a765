"""The vision encoder's kernels against their twins."""

from typing import cast

import pytest
import torch
from torch import nn

from autoglm.checkpoint import VisionConfig
from autoglm.kernels.base import Kernels, Packing
from autoglm.kernels.gpu import dispatch as gpu
from autoglm.kernels.gpu import image, image_attention, png
from autoglm.kernels.gpu.swiglu import swiglu
from autoglm.kernels.reference import dispatch as reference
from autoglm.quantization.int8 import quantize_into
from autoglm.quantization.linear import Int8Linear
from autoglm.vision.resample import taps
from autoglm.vision.vit import VisionTransformer
from tests.kernels.device import DEVICE


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("height, width, target", [(30, 41, 56), (57, 23, 28), (5, 700, 3), (1, 1, 400)])
def test_resample_equals_its_twin(height: int, width: int, target: int, axis: int) -> None:
    pixels = torch.randint(0, 256, (height, width, 3), device=DEVICE, dtype=torch.uint8)
    table = taps(pixels.shape[axis], target, DEVICE)
    assert torch.equal(image.resample(pixels, table, axis), reference.resample(pixels, table, axis))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, columns, patch, merge, frames", [(1, 3, 14, 2, 2), (3, 2, 4, 1, 1)])
def test_patchify_equals_its_twin(
    rows: int, columns: int, patch: int, merge: int, frames: int, dtype: torch.dtype
) -> None:
    side = patch * merge
    pixels = torch.randint(0, 256, (rows * side, columns * side, 3), device=DEVICE, dtype=torch.uint8)
    levels = torch.randn(3, 256, device=DEVICE).to(dtype)
    arguments = (levels, patch, merge, frames)
    assert torch.equal(image.patchify(pixels, *arguments), reference.patchify(pixels, *arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, size, splits", [(12, 128, 1), (3, 32, 2), (7, 24, 1)])
def test_rotate_heads_equals_its_twin(heads: int, size: int, splits: int, dtype: torch.dtype) -> None:
    rows = 5
    qkv = torch.randn(splits, rows, 3 * heads * size, device=DEVICE).to(dtype if splits == 1 else torch.float32)
    turns = torch.randn(rows, size // 2, device=DEVICE)
    angles = torch.stack((turns.cos(), turns.sin()))
    wanted = reference.rotate_heads(qkv, angles, heads, dtype)
    for found, expected in zip(image_attention.rotate_heads(qkv.clone(), angles, heads, dtype), wanted, strict=True):
        assert found.shape == (rows, heads, size) and found.dtype == dtype
        torch.testing.assert_close(found, expected)


LENGTHS = [(64,), (1,), (129, 4, 64, 64, 200, 7), (128, 128)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("heads, size", [(2, 128), (3, 32)])
def test_image_attention_stays_inside_each_image(heads: int, size: int, lengths: tuple[int, ...]) -> None:
    qkv = torch.randn(sum(lengths), 3, heads, size, device=DEVICE).bfloat16()
    q, k, v = qkv.unbind(1)  # rows lie apart
    found = image_attention.image_attention(q, k, v, gpu.pack(lengths, DEVICE))
    wanted = reference.image_attention(q.float(), k.float(), v.float(), Packing(lengths))
    torch.testing.assert_close(found.float(), wanted, rtol=1e-2, atol=1e-2)


def test_long_images_get_a_launch_of_their_own_when_their_length_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_attention, "LONG", 100)
    monkeypatch.setattr(image_attention, "_met", type(image_attention._met)())
    assert gpu.pack((120, 120, 40), DEVICE).apart == ()
    packing = gpu.pack((40, 120, 300, 120), DEVICE)
    assert packing.apart == ((40, 120), (460, 120))
    assert packing.tiles is not None
    assert packing.tiles.tolist() == [[0, 0, 40], [160, 160, 460], [288, 160, 460], [416, 160, 460]]
    q, k, v = torch.randn(3, 580, 2, 32, device=DEVICE).bfloat16()
    wanted = reference.image_attention(q.float(), k.float(), v.float(), packing)
    found = image_attention.image_attention(q, k, v, packing)
    torch.testing.assert_close(found.float(), wanted, rtol=1e-2, atol=1e-2)
    assert gpu.pack((120,), DEVICE).tiles is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, width", [(3, 4096), (2, 20)])
def test_swiglu(rows: int, width: int, dtype: torch.dtype) -> None:
    x = (3 * torch.randn(rows, 2 * width, device=DEVICE)).to(dtype)
    gate, up = x.float().chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(x), (torch.nn.functional.silu(gate) * up).to(dtype))


@pytest.mark.parametrize("int8", [False, True])
@torch.inference_mode()
def test_the_whole_encoder_equals_its_twin(int8: bool) -> None:
    config = VisionConfig(
        depth=2, hidden_size=64, num_heads=2, out_hidden_size=96, intermediate_size=128, image_size=56
    )
    torch.manual_seed(0)
    exact = VisionTransformer(config).to(DEVICE)
    model = VisionTransformer(config, cast(Kernels, gpu)).to(DEVICE, torch.bfloat16)
    model.load_state_dict(exact.state_dict())
    if int8:
        linears = {name: layer for name, layer in model.blocks.named_modules() if isinstance(layer, nn.Linear)}
        model.to_int8()
        for name, linear in linears.items():
            held = model.blocks.get_submodule(name).to(DEVICE)
            assert isinstance(held, Int8Linear)
            quantize_into(held.weight, linear.weight)
    grids = [(1, 4, 6), (1, 2, 2), (1, 12, 14)]
    patches = torch.randn(sum(h * w for _, h, w in grids), 1176, device=DEVICE)
    wanted, found = exact(patches, grids), model(patches.bfloat16(), grids)
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).norm() < (0.04 if int8 else 0.02) * wanted.norm()


@pytest.mark.parametrize("height, width, channels", [(1, 1, 3), (70, 9, 4), (64, 130, 3), (130, 21, 3)])
def test_unfilter_equals_its_twin(monkeypatch: pytest.MonkeyPatch, height: int, width: int, channels: int) -> None:
    monkeypatch.setattr(png, "LANES", 64)  # several bands
    rows = torch.randint(0, 256, (height, 1 + width * channels), device=DEVICE, dtype=torch.uint8)
    rows[:, 0] = torch.randint(0, 5, (height,))
    assert torch.equal(png.unfilter(rows, channels), reference.unfilter(rows, channels))
