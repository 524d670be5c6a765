"""The models against transformers, on random checkpoints of several shapes."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from autoglm.kernels.reference.attention import gather_angles, rotate
from autoglm.llm.loader import load_language_model
from autoglm.llm.model import LanguageModel
from autoglm.llm.mrope import prompt_positions
from autoglm.vision.vit import VisionTransformer
from tests.conftest import Pair
from tests.prompts import GRIDS, random_pixels, random_prompt

CPU = torch.device("cpu")


class DenseAttention:
    """Causal attention of one whole sequence, without a cache."""

    def __init__(self, model: LanguageModel, positions: torch.Tensor) -> None:
        self.angles = gather_angles(model.attention_config, positions)
        self.heads = model.config.num_attention_heads, *[model.config.num_key_value_heads] * 2
        self.size = model.config.head_dim

    def __call__(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv.sum(0).view(-1, sum(self.heads), self.size).split(self.heads, dim=1)  # type: ignore[no-untyped-call]
        q, k = (rotate(x.float(), self.angles).to(x.dtype) for x in (q, k))
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1).flatten(1)


@pytest.mark.parametrize("images", ["one", "two", "three"])
def test_vision_embeddings(pair: Pair, images: str) -> None:
    vit = VisionTransformer.load(pair.checkpoint, CPU, torch.float32)
    patches = random_pixels(GRIDS[images], 1)
    expected = pair.reference.model.visual(patches, grid_thw=torch.tensor(GRIDS[images])).pooler_output
    assert (vit(patches, GRIDS[images]) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("images", GRIDS)
def test_positions_and_logits(pair: Pair, images: str) -> None:
    grids, checkpoint = GRIDS[images], pair.checkpoint
    ids = random_prompt(checkpoint, grids, 2)
    token_ids = torch.tensor([ids])
    media = (token_ids == checkpoint.image_token_id).int()
    grid_tensor = torch.tensor(grids) if grids else None
    expected_positions, delta = pair.reference.model.get_rope_index(token_ids, media, grid_tensor)
    positions, following = prompt_positions(ids, grids, checkpoint.image_token_id, 2)
    assert torch.equal(positions, expected_positions[:, 0].int())
    assert following == len(ids) + int(delta)

    patches = random_pixels(grids, 3) if grids else None
    expected = pair.reference(
        input_ids=token_ids, pixel_values=patches, image_grid_thw=grid_tensor, mm_token_type_ids=media
    ).logits[0]
    model = load_language_model(checkpoint, CPU, torch.float32)
    hidden = model.embed(token_ids[0])
    if patches is not None:
        hidden[media[0].bool()] = VisionTransformer.load(checkpoint, CPU, torch.float32)(patches, grids)
    logits = model.logits(model(hidden, DenseAttention(model, positions)))
    assert (logits - expected).abs().max() < 1e-4


def test_bfloat16_chooses_the_same_tokens(pair: Pair) -> None:
    """Wherever the margin in fp32 is larger than the error of bfloat16."""
    ids = torch.tensor([random_prompt(pair.checkpoint, [], 4, before=60)])
    expected = pair.reference(input_ids=ids).logits[0]
    positions, _ = prompt_positions(ids[0].tolist(), [], pair.checkpoint.image_token_id, 2)
    model = load_language_model(pair.checkpoint, CPU, torch.bfloat16)
    logits = model.logits(model(model.embed(ids[0]), DenseAttention(model, positions))).float()
    noise = (logits - expected).abs().amax(-1)
    top = expected.topk(2, dim=-1).values
    clear = top[:, 0] - top[:, 1] > 2 * noise
    assert clear.sum() >= 10
    assert torch.equal(logits.argmax(-1)[clear], expected.argmax(-1)[clear])
    assert noise.max() < 0.1 * expected.abs().max()
