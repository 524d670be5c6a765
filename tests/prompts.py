"""Random prompts with images, for the models and the engine."""

import torch

from autoglm.checkpoint import Checkpoint

Grid = tuple[int, int, int]
GRIDS: dict[str, list[Grid]] = {
    "none": [],
    "one": [(1, 8, 4)],
    "two": [(1, 4, 6), (1, 10, 8)],
    "three": [(1, 6, 4), (1, 6, 4), (1, 2, 2)],
}


def random_text(count: int, seed: int) -> list[int]:
    """Ids of ordinary tokens."""
    return torch.randint(0, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()  # type: ignore[no-any-return]


def random_prompt(checkpoint: Checkpoint, grids: list[Grid], seed: int, before: int = 7, after: int = 5) -> list[int]:
    """Random text, then each image followed by random text."""
    ids = random_text(before, seed)
    for index, (_, height, width) in enumerate(grids):
        ids += [checkpoint.image_start_token_id, *[checkpoint.image_token_id] * (height * width // 4)]
        ids += [checkpoint.image_end_token_id, *random_text(after, seed + index + 1)]
    return ids


def random_pixels(grids: list[Grid], seed: int) -> torch.Tensor:
    """Patches [N, 1176] of images of these grids."""
    count = sum(height * width for _, height, width in grids)
    return torch.randn(count, 1176, generator=torch.Generator().manual_seed(seed))
