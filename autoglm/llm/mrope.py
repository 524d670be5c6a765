"""Multimodal RoPE of GLM-4.1V: three-axis positions (time, height, width) of a prompt with images."""

from collections.abc import Sequence

import torch


def image_runs(
    token_ids: Sequence[int], grids: Sequence[tuple[int, int, int]], image_token_id: int, merge_size: int
) -> list[tuple[int, int]]:
    """The runs of image placeholders in a prompt: (start, length), in order.

    Raises:
        ValueError: the runs of placeholders do not match the grids.
    """
    runs = []
    end = 0
    for _, height, width in grids:
        if min(height, width) < merge_size or height % merge_size or width % merge_size:
            raise ValueError(f"an image grid must be of multiples of {merge_size} patches (got {height} x {width})")
        try:
            start = token_ids.index(image_token_id, end)
        except ValueError:
            raise ValueError(f"the prompt must have an image for each grid (got fewer than {len(grids)})") from None
        length = height * width // merge_size**2
        end = start + length
        if token_ids[start:end] != [image_token_id] * length:
            raise ValueError(f"the image at token {start} must have the {length} placeholders of its grid")
        runs.append((start, length))
    if image_token_id in token_ids[end:]:
        raise ValueError(f"the prompt must have an image for each grid (got more than {len(grids)})")
    return runs


def audio_runs(token_ids: Sequence[int], lengths: Sequence[int], audio_token_id: int) -> list[tuple[int, int]]:
    """The runs of audio placeholders in a prompt: (start, length), in order. Positions count them as text.

    Args:
        lengths: tokens of each clip, at least 1.

    Raises:
        ValueError: the runs of placeholders do not match the lengths.
    """
    runs = []
    end = 0
    for length in lengths:
        try:
            start = token_ids.index(audio_token_id, end)
        except ValueError:
            raise ValueError(f"the prompt must have {len(lengths)} clips, as AUDIO_TOKENS has (got fewer)") from None
        end = start + length
        if token_ids[start:end] != [audio_token_id] * length:
            raise ValueError(f"the clip at token {start} must have the {length} placeholders given by AUDIO_TOKENS")
        runs.append((start, length))
    if lengths and audio_token_id in token_ids[end:]:
        raise ValueError(f"the prompt must have {len(lengths)} clips, as AUDIO_TOKENS has (got more)")
    return runs


def prompt_positions(
    token_ids: Sequence[int], grids: Sequence[tuple[int, int, int]], image_token_id: int, merge_size: int
) -> tuple[torch.Tensor, int]:
    """Positions of every token of a prompt.

    A text token takes the next index on all three axes. An image keeps the current index as its time, counts the rows
    and columns of its merged grid from there, and advances the index by the longer side.

    Args:
        token_ids: the prompt, each image as a run of `image_token_id`.
        grids: (1, height, width) in patches of each image, in order.

    Returns:
        int32 [3, len(token_ids)] on the CPU, and the position of the first generated token.

    Raises:
        ValueError: the runs of placeholders do not match the grids.
    """
    parts: list[torch.Tensor] = []
    current = end = 0
    runs = image_runs(token_ids, grids, image_token_id, merge_size)
    for (start, length), (_, height, width) in zip(runs, grids, strict=True):
        parts.append(_text(current, start - end))
        current += start - end
        rows, cols = height // merge_size, width // merge_size
        indices = torch.arange(length, dtype=torch.int32)
        parts.append(torch.stack((torch.zeros_like(indices), indices // cols, indices % cols)) + current)
        current += max(rows, cols)
        end = start + length
    remaining = len(token_ids) - end
    parts.append(_text(current, remaining))
    return torch.cat(parts, dim=1), current + remaining


def _text(start: int, length: int) -> torch.Tensor:
    return torch.arange(start, start + length, dtype=torch.int32).expand(3, -1)
