"""Three-axis positions (time, height, width) of a prompt with images: multimodal rotary embedding of GLM-4.1V."""

from collections.abc import Sequence

import torch


def image_runs(
    token_ids: Sequence[int], grids: Sequence[tuple[int, int, int]], image_token_id: int, merge_size: int
) -> list[tuple[int, int]]:
    """Where each image's placeholders stand in a prompt: (start, length), in order.

    Raises:
        ValueError: the runs of placeholders do not match the grids.
    """
    runs = []
    end = 0
    for _, height, width in grids:
        if min(height, width) < merge_size or height % merge_size or width % merge_size:
            raise ValueError(f"a grid is {height} x {width} patches, it must be of multiples of {merge_size}")
        try:
            start = token_ids.index(image_token_id, end)
        except ValueError:
            raise ValueError(f"the prompt has fewer images than the {len(grids)} grids") from None
        length = height * width // merge_size**2
        end = start + length
        if token_ids[start:end] != [image_token_id] * length:
            raise ValueError(f"the image at token {start} has not the {length} placeholders of its grid")
        runs.append((start, length))
    if image_token_id in token_ids[end:]:
        raise ValueError(f"the prompt has more image placeholders than the {len(grids)} grids")
    return runs


def audio_runs(token_ids: Sequence[int], lengths: Sequence[int], audio_token_id: int) -> list[tuple[int, int]]:
    """Where clips' placeholders stand in a prompt: (start, length), in order. Positions count them as text.

    Args:
        lengths: how many tokens each clip has, at least 1.

    Raises:
        ValueError: the runs of placeholders do not match the lengths.
    """
    runs = []
    end = 0
    for length in lengths:
        try:
            start = token_ids.index(audio_token_id, end)
        except ValueError:
            raise ValueError(f"the prompt has fewer clips than the {len(lengths)} of AUDIO_TOKENS") from None
        end = start + length
        if token_ids[start:end] != [audio_token_id] * length:
            raise ValueError(f"the clip at token {start} has not the {length} placeholders that AUDIO_TOKENS says")
        runs.append((start, length))
    if lengths and audio_token_id in token_ids[end:]:
        raise ValueError(f"the prompt has more audio placeholders than the {len(lengths)} clips of AUDIO_TOKENS")
    return runs


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
    current = end = 0
    runs = image_runs(token_ids, grids, image_token_id, merge_size)
    for (start, length), (_, height, width) in zip(runs, grids, strict=True):
        parts.append(_text(current, start - end))
        current += start - end
        rows, cols = height // merge_size, width // merge_size
        places = torch.arange(length, dtype=torch.int32)
        parts.append(torch.stack((torch.zeros_like(places), places // cols, places % cols)) + current)
        current += max(rows, cols)
        end = start + length
    rest = len(token_ids) - end
    parts.append(_text(current, rest))
    return torch.cat(parts, dim=1), current + rest


def _text(start: int, length: int) -> torch.Tensor:
    return torch.arange(start, start + length, dtype=torch.int32).expand(3, -1)
