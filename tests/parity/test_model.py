"""The library's models against transformers, in fp32, on random checkpoints of several shapes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from autoglm.checkpoint import Checkpoint
from autoglm.llm.attention import DenseAttention
from autoglm.llm.model import LanguageModel
from autoglm.llm.positions import prompt_positions
from autoglm.vision.vit import VisionTransformer
from tests.checkpoints import SHAPES, make_checkpoint

CPU = torch.device("cpu")
GRIDS = {"one": [(1, 8, 4)], "two": [(1, 4, 6), (1, 10, 8)], "three": [(1, 6, 4), (1, 6, 4), (1, 2, 2)], "none": []}


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Any]:
    directory: Path = tmp_path_factory.mktemp(request.param)
    reference = make_checkpoint(directory, SHAPES[request.param])
    return Checkpoint.open(directory), reference


def make_prompt(checkpoint: Checkpoint, grids: list[tuple[int, int, int]], seed: int) -> list[int]:
    """Random text with an image of each grid between its turns."""
    generator = torch.Generator().manual_seed(seed)

    def text(count: int) -> list[int]:
        return torch.randint(0, 300, (count,), generator=generator).tolist()  # type: ignore[no-any-return]

    ids = text(7)
    for _, height, width in grids:
        ids += [checkpoint.image_start_token_id, *[checkpoint.image_token_id] * (height * width // 4)]
        ids += [checkpoint.image_end_token_id, *text(5)]
    return ids


def pixels(grids: list[tuple[int, int, int]], seed: int) -> torch.Tensor:
    count = sum(height * width for _, height, width in grids)
    return torch.randn(count, 1176, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("images", ["one", "two", "three"])
def test_vit(pair: tuple[Checkpoint, Any], images: str) -> None:
    checkpoint, reference = pair
    vit = VisionTransformer.load(checkpoint, CPU, torch.float32)
    patches = pixels(GRIDS[images], 1)
    expected = reference.model.visual(patches, grid_thw=torch.tensor(GRIDS[images])).pooler_output
    assert (vit(patches, GRIDS[images]) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("images", GRIDS)
def test_positions_and_logits(pair: tuple[Checkpoint, Any], images: str) -> None:
    checkpoint, reference = pair
    grids = GRIDS[images]
    ids = make_prompt(checkpoint, grids, 2)
    token_ids = torch.tensor([ids])
    media = (token_ids == checkpoint.image_token_id).int()
    grid_tensor = torch.tensor(grids) if grids else None
    wanted, delta = reference.model.get_rope_index(token_ids, media, grid_tensor)
    positions, following = prompt_positions(ids, grids, checkpoint.image_token_id, 2)
    assert torch.equal(positions, wanted[:, 0].int())
    assert following == len(ids) + int(delta)

    patches = pixels(grids, 3) if grids else None
    expected = reference(
        input_ids=token_ids, pixel_values=patches, image_grid_thw=grid_tensor, mm_token_type_ids=media
    ).logits[0]
    model = LanguageModel.load(checkpoint, CPU, torch.float32)
    hidden = model.embed(token_ids[0])
    if patches is not None:
        hidden[media[0].bool()] = VisionTransformer.load(checkpoint, CPU, torch.float32)(patches, grids)
    logits = model.logits(model(hidden, positions, DenseAttention(1)))
    assert (logits - expected).abs().max() < 1e-4


def test_bf16_argmax(pair: tuple[Checkpoint, Any]) -> None:
    """In bf16 the choice is the same wherever fp32's margin is larger than what bf16 itself moves the logits."""
    checkpoint, reference = pair
    ids = torch.tensor([make_prompt(checkpoint, [], 4)])
    exact = reference(input_ids=ids).logits[0]
    positions, _ = prompt_positions(ids[0].tolist(), [], checkpoint.image_token_id, 2)
    model = LanguageModel.load(checkpoint, CPU, torch.bfloat16)
    rounded = model.logits(model(model.embed(ids[0]), positions, DenseAttention(1))).float()
    noise = (rounded - exact).abs().amax(-1)
    top = exact.topk(2, dim=-1).values
    clear = top[:, 0] - top[:, 1] > 2 * noise
    assert clear.any()
    assert torch.equal(rounded.argmax(-1)[clear], exact.argmax(-1)[clear])
    assert noise.max() < 0.1 * exact.abs().max()
