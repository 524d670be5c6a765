"""Three-axis positions (time, height, width) of a prompt with images: multimodal rotary embedding of GLM-4.1V."""

from collections.abc import Sequence

import torch


def prompt_positions(
    token_ids: Sequence[int], grids: Sequence[tuple[int, int, int]], image_token_id: int, merge_size: int
) -> tuple[torch.Tensor, int]:
    """Positions of every token of a prompt.

    A text token takes the next index on all three axes. An image keeps time at the current index, counts rows and
    columns of its merged grid from there, and moves the index on by the longer side.

    Args:
        token_ids: the prompt, each image as a run of `image_token_id`.
        grids: (1, height, width) in patches of each image, in order.

    Returns:
        int32 [3, len(token_ids)] on the CPU, and the position of the first generated token.

    Raises:
        ValueError: the runs of placeholders do not match the grids.
    """
    parts: list[torch.Tensor] = []
    current = index = 0
    for _, height, width in grids:
        try:
            start = token_ids.index(image_token_id, index)
        except ValueError:
            raise ValueError(f"the prompt has fewer images than the {len(grids)} grids") from None
        rows, cols = height // merge_size, width // merge_size
        index = start + rows * cols
        if token_ids[start:index] != [image_token_id] * (rows * cols):
            raise ValueError(f"the image at token {start} has not the {rows * cols} placeholders of its grid")
        text = start - sum(part.shape[1] for part in parts)
        parts.append(_text(current, text))
        current += text
        places = torch.arange(rows * cols, dtype=torch.int32)
        parts.append(torch.stack((torch.zeros_like(places), places // cols, places % cols)) + current)
        current += max(rows, cols)
    rest = len(token_ids) - index
    if image_token_id in token_ids[index:]:
        raise ValueError(f"the prompt has more image placeholders than the {len(grids)} grids")
    parts.append(_text(current, rest))
    return torch.cat(parts, dim=1), current + rest


def _text(start: int, length: int) -> torch.Tensor:
    return torch.arange(start, start + length, dtype=torch.int32).expand(3, -1)
