"""The vision encoder's kernels against the reference."""

from typing import Any, cast

import pytest
import torch
from torch import nn

from autoglm.checkpoint import VisionConfig
from autoglm.kernels.base import Kernels, VarlenPacking
from autoglm.kernels.gpu import dispatch as gpu
from autoglm.kernels.gpu import image, image_attention, png
from autoglm.kernels.gpu.swiglu import swiglu
from autoglm.kernels.reference import dispatch as reference
from autoglm.quantization.int8 import quantize_into
from autoglm.quantization.linear import Int8Linear
from autoglm.vision.resample import resample_filter
from autoglm.vision.vit import VisionTransformer
from tests.kernels.device import DEVICE

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("height, width, target", [(30, 41, 56), (57, 23, 28), (5, 300, 3), (1, 1, 200)])
def test_resample_equals_the_reference(height: int, width: int, target: int, axis: int) -> None:
    pixels = torch.randint(0, 256, (height, width, 3), device=DEVICE, dtype=torch.uint8)
    axis_filter = resample_filter(pixels.shape[axis], target, DEVICE)
    inputs: dict[str, Any] = {"pixels": pixels, "resample_filter": axis_filter, "axis": axis}
    assert torch.equal(image.resample(**inputs), reference.resample(**inputs))


@dtypes
@pytest.mark.parametrize("rows, columns, patch, merge, frames", [(1, 3, 14, 2, 2), (3, 2, 4, 1, 1)])
def test_patchify_equals_the_reference(
    *, rows: int, columns: int, patch: int, merge: int, frames: int, dtype: torch.dtype
) -> None:
    side = patch * merge
    inputs: dict[str, Any] = {
        "pixels": torch.randint(0, 256, (rows * side, columns * side, 3), device=DEVICE, dtype=torch.uint8),
        "levels": torch.randn(3, 256, device=DEVICE).to(dtype),
        "patch_size": patch,
        "merge_size": merge,
        "temporal_patch_size": frames,
    }
    assert torch.equal(image.patchify(**inputs), reference.patchify(**inputs))


@dtypes
@pytest.mark.parametrize("num_heads, head_dim, num_partials", [(12, 128, 1), (3, 32, 2), (7, 24, 1)])
def test_rotate_heads_equals_the_reference(
    num_heads: int, head_dim: int, num_partials: int, dtype: torch.dtype
) -> None:
    rows = 5
    qkv = torch.randn(num_partials, rows, 3 * num_heads * head_dim, device=DEVICE)
    qkv = qkv.to(dtype if num_partials == 1 else torch.float32)
    angles = torch.randn(rows, head_dim // 2, device=DEVICE)
    inputs: dict[str, Any] = {
        "angles": torch.stack((angles.cos(), angles.sin())),
        "num_heads": num_heads,
        "dtype": dtype,
    }
    wanted = reference.rotate_heads(qkv=qkv, **inputs)
    for found, expected in zip(image_attention.rotate_heads(qkv=qkv.clone(), **inputs), wanted, strict=True):
        assert found.shape == (rows, num_heads, head_dim) and found.dtype == dtype
        torch.testing.assert_close(found, expected)


def check_image_attention(qkv: torch.Tensor, packing: VarlenPacking) -> None:
    """qkv: [3, N, num_heads, head_dim]"""
    q, k, v = qkv
    found = image_attention.image_attention(q=q, k=k, v=v, packing=packing)
    expected = reference.image_attention(q=q.float(), k=k.float(), v=v.float(), packing=packing)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("lengths", [(64,), (1,), (129, 4, 64, 64, 200, 7), (128, 128)], ids=str)
@pytest.mark.parametrize("num_heads, head_dim", [(2, 128), (3, 32)])
def test_image_attention_equals_the_reference(num_heads: int, head_dim: int, lengths: tuple[int, ...]) -> None:
    qkv = torch.randn(sum(lengths), 3, num_heads, head_dim, device=DEVICE).bfloat16()
    packing = gpu.pack_varlen(lengths=lengths, device=DEVICE)
    check_image_attention(qkv.transpose(0, 1), packing)  # q, k and v are not contiguous


def test_long_images_are_launched_separately_when_their_length_occurs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_attention, "LONG", 100)
    monkeypatch.setattr(image_attention, "_seen_lengths", type(image_attention._seen_lengths)())
    assert gpu.pack_varlen(lengths=(120, 120, 40), device=DEVICE).separate == ()
    packing = gpu.pack_varlen(lengths=(40, 120, 300, 120), device=DEVICE)
    assert packing.separate == ((40, 120), (460, 120))
    assert packing.tiles is not None
    assert packing.tiles.tolist() == [[0, 0, 40], [160, 160, 460], [288, 160, 460], [416, 160, 460]]
    check_image_attention(torch.randn(3, 580, 2, 32, device=DEVICE).bfloat16(), packing)
    assert gpu.pack_varlen(lengths=(120,), device=DEVICE).tiles is None


@dtypes
@pytest.mark.parametrize("rows, width", [(3, 4096), (2, 20)])
def test_swiglu(rows: int, width: int, dtype: torch.dtype) -> None:
    x = (3 * torch.randn(rows, 2 * width, device=DEVICE)).to(dtype)
    gate, up = x.float().chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(x), (torch.nn.functional.silu(gate) * up).to(dtype))


@pytest.mark.parametrize("int8", [False, True])
@torch.inference_mode()
def test_vision_transformer_equals_the_reference(int8: bool) -> None:
    config = VisionConfig(
        depth=2, hidden_size=64, num_heads=2, out_hidden_size=96, intermediate_size=128, image_size=56
    )
    exact = VisionTransformer(config).to(DEVICE)
    model = VisionTransformer(config, cast(Kernels, gpu)).to(DEVICE, torch.bfloat16)
    model.load_state_dict(exact.state_dict())
    if int8:
        linears = {name: layer for name, layer in model.blocks.named_modules() if isinstance(layer, nn.Linear)}
        model.to_int8()
        for name, linear in linears.items():
            quantized = model.blocks.get_submodule(name).to(DEVICE)
            assert isinstance(quantized, Int8Linear)
            quantize_into(quantized.weight, linear.weight)
    grids = [(1, 4, 6), (1, 2, 2), (1, 8, 10)]
    patches = torch.randn(sum(h * w for _, h, w in grids), 1176, device=DEVICE)
    expected, found = exact(patches, grids), model(patches.bfloat16(), grids)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < (0.04 if int8 else 0.02) * expected.norm()


@pytest.mark.parametrize("height, width, channels", [(1, 1, 3), (70, 9, 4), (64, 70, 3), (130, 9, 3)])
def test_unfilter_equals_the_reference(height: int, width: int, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png, "LANES", 64)  # several bands
    rows = torch.randint(0, 256, (height, 1 + width * channels), device=DEVICE, dtype=torch.uint8)
    rows[:, 0] = torch.randint(0, 5, (height,))
    assert torch.equal(png.unfilter(rows=rows, channels=channels), reference.unfilter(rows=rows, channels=channels))
