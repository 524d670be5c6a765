"""What the parity tests do not see of the ViT: kept positions, INT8, training, names of tensors."""

from unittest.mock import Mock

import pytest
import torch

from autoglm.checkpoint import VisionConfig
from autoglm.vision import vit
from autoglm.vision.vit import VisionTransformer
from tests.conftest import Pair
from tests.prompts import GRIDS, random_pixels

CPU = torch.device("cpu")


def test_positions_are_kept_for_the_last_few_shapes(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model = VisionTransformer.load(pair.checkpoint, CPU, torch.float32)
    compute = Mock(wraps=model.embeddings.forward)
    monkeypatch.setattr(model.embeddings, "forward", compute)
    patches, grids = random_pixels(GRIDS["one"], 1), GRIDS["one"]
    first = model(patches, grids)
    assert torch.equal(model(patches, grids), first) and compute.call_count == 1
    others = [(1, 2, 2 * width) for width in range(10, 10 + vit.KEPT_SHAPES)]
    for grid in others:
        model(random_pixels([grid], 1), [grid])
    assert torch.equal(model(patches, grids), first)
    assert compute.call_count == 2 + len(others)


def test_int8_stays_near(pair: Pair) -> None:
    exact = VisionTransformer.load(pair.checkpoint, CPU, torch.float32)
    rounded = VisionTransformer.load(pair.checkpoint, CPU, torch.float32, int8=True)
    patches, grids = random_pixels(GRIDS["three"], 1), GRIDS["three"]
    wanted, found = exact(patches, grids), rounded(patches, grids)
    assert 0 < (found - wanted).norm() < 0.05 * wanted.norm()


def test_it_learns_and_keeps_no_positions_meanwhile() -> None:
    config = VisionConfig(depth=1, hidden_size=32, num_heads=2, out_hidden_size=32, intermediate_size=32, image_size=56)
    model = VisionTransformer(config)
    grids = [(1, 2, 4), (1, 4, 4)]
    before = model(torch.ones(24, 1176), grids)
    before.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        model.embeddings.position_embedding.weight.add_(torch.randn(16, 32))
    assert not torch.equal(model(torch.ones(24, 1176), grids), before)


def test_published_names_are_the_checkpoints(pair: Pair) -> None:
    model = VisionTransformer.load(pair.checkpoint, CPU, torch.float32)
    ours = {full: tensor for name, held in model.named_parameters() for full, tensor in vit.published(name, held)}
    theirs = dict(pair.reference.model.visual.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
