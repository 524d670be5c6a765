"""Builds a request's prompt: inserts transcripts, locates the media, computes positions."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from autoglm.checkpoint import Checkpoint
from autoglm.errors import ErrorCode, RequestError
from autoglm.llm.block_hash import MediaSpan
from autoglm.llm.mrope import audio_runs, image_runs, prompt_positions
from autoglm.llm.sequence import Clip, Prompt, Request


def insert_transcripts(request: Request, audio_token_id: int, encode: Callable[[str], list[int]]) -> Request:
    """The request with the placeholders of transcribed clips replaced by the tokens of their transcripts.

    Raises:
        RequestError: the placeholders do not match the clips.
    """
    if all(clip.num_tokens for clip in request.clips):
        return request
    lengths = [clip.num_tokens or 1 for clip in request.clips]
    runs = _checked(audio_runs, request.token_ids, lengths, audio_token_id)
    ids: list[int] = []
    end = 0
    for clip, (start, length) in zip(request.clips, runs, strict=True):
        ids += request.token_ids[end:start]
        end = start + length
        ids += request.token_ids[start:end] if clip.num_tokens else encode(clip.transcript)
    return replace(request, token_ids=ids + request.token_ids[end:])


def build_prompt(request: Request, checkpoint: Checkpoint) -> Prompt:
    """The prompt of a request whose transcripts are inserted.

    Raises:
        RequestError: placeholders, grids, clips and embeddings do not match.
    """
    ids, merge, image_token = request.token_ids, checkpoint.vision.spatial_merge_size, checkpoint.image_token_id
    grids = request.image_grids
    runs = _checked(image_runs, ids, grids, image_token, merge)
    images = [MediaSpan(each, *run) for each, run in zip(request.image_hashes, runs, strict=True)]
    embedded: list[Clip] = [clip for clip in request.clips if clip.num_tokens]
    runs = _checked(audio_runs, ids, [clip.num_tokens for clip in embedded], checkpoint.audio_token_id)
    clips = [MediaSpan(clip.media_hash, *run, visual=False) for clip, run in zip(embedded, runs, strict=True)]
    parts = [
        *zip(images, _split("image", request.image_embeddings, images), strict=True),
        *zip(clips, _split("audio", request.audio_embeddings, clips), strict=True),
    ]
    parts.sort(key=lambda part: part[0].start)
    positions, next_position = prompt_positions(ids, grids, image_token, merge)
    return Prompt(
        token_ids=ids,
        positions=positions,
        next_position=next_position,
        media=[span for span, _ in parts],
        embeddings=torch.cat([rows for _, rows in parts]) if clips else request.image_embeddings,
    )


def _checked(find: Callable[..., list[tuple[int, int]]], *arguments: object) -> list[tuple[int, int]]:
    try:
        return find(*arguments)
    except ValueError as error:
        raise RequestError(str(error)) from None


def _split(kind: str, embeddings: torch.Tensor | None, spans: Sequence[MediaSpan]) -> Sequence[torch.Tensor]:
    """The rows of each span."""
    num_rows = 0 if embeddings is None else embeddings.shape[0]
    num_tokens = sum(span.length for span in spans)
    if num_rows != num_tokens:
        message = f"embeddings must have a row for each of the {num_tokens} {kind} tokens (got {num_rows})"
        raise RequestError(message, ErrorCode.INTERNAL)
    return () if embeddings is None or not spans else torch.split(embeddings, [span.length for span in spans])
