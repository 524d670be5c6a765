"""The ViT beyond the parity tests: cached positions, INT8, training, names of tensors."""

from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

from autoglm.checkpoint import VisionConfig
from autoglm.vision import vit
from autoglm.vision.vit import VisionTransformer
from autoglm.weights.reader import checkpoint_tensors
from tests.conftest import Pair
from tests.prompts import GRIDS, random_pixels

CPU = torch.device("cpu")


def test_positions_of_the_most_recent_shapes_are_cached(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model = VisionTransformer.load(pair.checkpoint, CPU, torch.float32)
    compute = Mock(wraps=model.embeddings.forward)
    monkeypatch.setattr(model.embeddings, "forward", compute)
    patches, grids = random_pixels(GRIDS["one"], 1), GRIDS["one"]
    first = model(patches, grids)
    assert torch.equal(model(patches, grids), first) and compute.call_count == 1
    others = [(1, 2, 2 * width) for width in range(10, 10 + vit.CACHED_SHAPES)]
    for grid in others:
        model(random_pixels([grid], 1), [grid])
    assert torch.equal(model(patches, grids), first)
    assert compute.call_count == 2 + len(others)


def alone(model: VisionTransformer, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Position embeddings and rotary angles of one image."""
    merge, half = model.config.spatial_merge_size, model.config.head_dim // 2
    order = torch.arange(height * width).view(height // merge, merge, width // merge, merge)
    order = order.permute(0, 2, 1, 3).flatten()
    rows, cols = order // width, order % width
    weight, side = model.embeddings.position_embedding.weight, model.embeddings.side
    table = weight.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    points = torch.stack(((cols + 0.5) / width, (rows + 0.5) / height), dim=-1) * 2 - 1
    sampled = F.grid_sample(table, points[None, :, None], "bicubic", padding_mode="border", align_corners=False)
    frequencies = 1.0 / model.config.rope_theta ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
    angles = torch.cat((rows[:, None] * frequencies, cols[:, None] * frequencies), dim=-1)
    return sampled[0, :, :, 0].T.to(weight.dtype), torch.stack((angles.cos(), angles.sin()))


@pytest.mark.parametrize("size", [96, 40])
@pytest.mark.parametrize("trained", [False, True])
def test_positions_of_a_pass_are_those_of_each_image(size: int, trained: bool) -> None:
    """New, repeated and cached shapes."""
    config = VisionConfig(
        depth=1, hidden_size=size, num_heads=2, out_hidden_size=32, intermediate_size=32, image_size=336
    )
    model = VisionTransformer(config).bfloat16().requires_grad_(trained)
    passes = [[(4, 6)], [(2, 2), (34, 20), (4, 6), (2, 2), (6, 4)], [(6, 4), (8, 2)], [(6, 4)], [(8, 2)] * 2]
    for shapes in passes:
        layout = model.layout([(1, *shape) for shape in shapes])
        positions, angles = zip(*(alone(model, *shape) for shape in shapes), strict=True)
        assert torch.equal(layout.positions, torch.cat(positions))
        assert torch.equal(layout.angles, torch.cat(angles, dim=1))
        assert layout.positions.is_contiguous() and layout.angles.is_contiguous()


def test_shapes_of_a_pass_are_computed_together_and_cached_separately(monkeypatch: pytest.MonkeyPatch) -> None:
    config = VisionConfig(depth=1, hidden_size=32, num_heads=2, out_hidden_size=32, intermediate_size=32, image_size=56)
    model = VisionTransformer(config).requires_grad_(False)
    compute = Mock(wraps=model.embeddings.forward)
    monkeypatch.setattr(model.embeddings, "forward", compute)
    grids = [(1, 2, 2 * width) for width in range(1, 30)]
    model.layout(grids)
    assert compute.call_count == 1
    model.layout(grids[-vit.CACHED_SHAPES :])
    assert compute.call_count == 1
    cached = [tensor for positions in model._cached_positions.values() for tensor in positions]
    assert len(cached) == 2 * vit.CACHED_SHAPES
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in cached)


def test_int8_is_close_to_float(pair: Pair) -> None:
    exact = VisionTransformer.load(pair.checkpoint, CPU, torch.float32)
    rounded = VisionTransformer.load(pair.checkpoint, CPU, torch.float32, int8=True)
    patches, grids = random_pixels(GRIDS["three"], 1), GRIDS["three"]
    wanted, found = exact(patches, grids), rounded(patches, grids)
    assert 0 < (found - wanted).norm() < 0.05 * wanted.norm()


def test_positions_are_not_cached_in_training() -> None:
    config = VisionConfig(depth=1, hidden_size=32, num_heads=2, out_hidden_size=32, intermediate_size=32, image_size=56)
    model = VisionTransformer(config)
    grids = [(1, 2, 4), (1, 4, 4)]
    model.requires_grad_(False)(torch.ones(24, 1176), grids)  # caches them
    model.requires_grad_(True)
    before = model(torch.ones(24, 1176), grids)
    before.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        model.embeddings.position_embedding.weight.add_(torch.randn(16, 32))
    assert not torch.equal(model(torch.ones(24, 1176), grids), before)


def test_tensor_names_are_those_of_the_checkpoint(pair: Pair) -> None:
    model = VisionTransformer.load(pair.checkpoint, CPU, torch.float32)
    ours = {name: tensor for name, tensor in checkpoint_tensors(model) if isinstance(tensor, torch.Tensor)}
    theirs = dict(pair.reference.model.visual.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
