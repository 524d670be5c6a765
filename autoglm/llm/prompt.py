"""A request's prompt as the language model computes it: transcripts in their places, media found, positions counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from autoglm.checkpoint import Checkpoint
from autoglm.errors import ErrorCode, RequestError
from autoglm.llm.block_hash import MediaSpan
from autoglm.llm.mrope import audio_runs, image_runs, prompt_positions
from autoglm.llm.sequence import Clip, Request


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens, their positions int32 [3, T], its media in order, their embeddings one behind another, and the
    position of the first token of the answer."""

    token_ids: list[int]
    positions: torch.Tensor
    media: list[MediaSpan]
    embeddings: torch.Tensor | None
    next_position: int = 0


def with_transcripts(request: Request, audio_token_id: int, encode: Callable[[str], list[int]]) -> Request:
    """The request with the tokens of its transcripts in the places of their placeholders.

    Raises:
        RequestError: the placeholders do not match the clips.
    """
    if all(clip.tokens for clip in request.clips):
        return request
    runs = _checked(audio_runs, request.token_ids, [clip.tokens or 1 for clip in request.clips], audio_token_id)
    ids: list[int] = []
    end = 0
    for clip, (start, length) in zip(request.clips, runs, strict=True):
        ids += request.token_ids[end:start]
        end = start + length
        ids += request.token_ids[start:end] if clip.tokens else encode(clip.transcript)
    return replace(request, token_ids=ids + request.token_ids[end:])


def read_prompt(request: Request, checkpoint: Checkpoint) -> Prompt:
    """Find the media of a request whose transcripts are in their places.

    Raises:
        RequestError: placeholders, grids, clips and embeddings do not match each other.
    """
    ids, merge, image_token = request.token_ids, checkpoint.vision.spatial_merge_size, checkpoint.image_token_id
    runs = _checked(image_runs, ids, request.grids, image_token, merge)
    images = [MediaSpan(digest, *run) for digest, run in zip(request.digests, runs, strict=True)]
    bridged: list[Clip] = [clip for clip in request.clips if clip.tokens]
    runs = _checked(audio_runs, ids, [clip.tokens for clip in bridged], checkpoint.audio_token_id)
    sounds = [MediaSpan(clip.digest, *run, visual=False) for clip, run in zip(bridged, runs, strict=True)]
    parts = [
        *zip(images, _split("image", request.embeddings, images), strict=True),
        *zip(sounds, _split("audio", request.audio_embeddings, sounds), strict=True),
    ]
    parts.sort(key=lambda part: part[0].start)
    embeddings = torch.cat([rows for _, rows in parts]) if sounds else request.embeddings
    positions, following = prompt_positions(ids, request.grids, image_token, merge)
    return Prompt(ids, positions, [span for span, _ in parts], embeddings, following)


def _checked(find: Callable[..., list[tuple[int, int]]], *arguments: object) -> list[tuple[int, int]]:
    try:
        return find(*arguments)
    except ValueError as error:
        raise RequestError(str(error)) from None


def _split(kind: str, embeddings: torch.Tensor | None, spans: Sequence[MediaSpan]) -> Sequence[torch.Tensor]:
    """Each span's rows."""
    rows = 0 if embeddings is None else embeddings.shape[0]
    wanted = sum(span.length for span in spans)
    if rows != wanted:
        raise RequestError(f"embeddings: {rows} rows for {wanted} {kind} tokens", ErrorCode.INTERNAL)
    return () if embeddings is None or not spans else torch.split(embeddings, [span.length for span in spans])
