"""Sound in prompts: a clip whose embeddings are those of words is these words, in every mode of attention."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from autoglm.llm.sequence import Clip, Request
from tests.conftest import Pair
from tests.llm.harness import Harness
from tests.prompts import random_prompt

GRID = (1, 8, 12)
WORDS = [11, 23, 5, 42, 17, 9, 31]


@pytest.fixture
def make(plain: Pair) -> Callable[..., Harness]:
    return lambda **options: Harness(plain.checkpoint, **options)


def answer(harness: Harness, request: Request) -> list[int]:
    harness.run(request)
    reply = harness.answers[request.request_id]
    assert not reply.last.error, reply.last.error
    return reply.token_ids


def spoken(harness: Harness, request: Request, starts: list[int], digest: bytes = b"d") -> Request:
    """The request with embeddings in place of the words that begin at these indices."""
    ids = list(request.token_ids)
    with torch.inference_mode():
        words = harness.engine.runner.model.embed(torch.tensor(WORDS))
    for start in starts:
        assert ids[start : start + len(WORDS)] == WORDS
        ids[start : start + len(WORDS)] = [harness.checkpoint.audio_token_id] * len(WORDS)
    clips = [Clip(digest + bytes([i]), len(WORDS)) for i in range(len(starts))]
    return replace(request, token_ids=ids, clips=clips, audio_embeddings=words.repeat(len(starts), 1))


def written(harness: Harness, name: str, **options: Any) -> tuple[Request, list[int]]:
    """A prompt with words in front of an image, behind it twice without a gap, and where they begin."""
    around = random_prompt(harness.checkpoint, [GRID], 3, before=6)
    behind = len(around) - 4
    ids = around[:2] + WORDS + around[2:behind] + WORDS + WORDS + around[behind:]
    starts = [2, behind + len(WORDS), behind + 2 * len(WORDS)]
    return harness.request(name, ids, [GRID], 3, max_tokens=6, **options), starts


@pytest.mark.parametrize("options", [{}, {"sparse_mode": "snap", "sparse_ratio": 0.5}, {"sparse_mode": "prune"}])
def test_a_bridged_clip_is_text_to_the_model(make: Callable[..., Harness], options: dict[str, Any]) -> None:
    harness = make(prefix_cache=False)
    text, _ = written(harness, "text", **options)
    assert answer(harness, text) == answer(harness, spoken(harness, *written(harness, "spoken", **options)))
    pieces = harness.answers["spoken"].pieces
    usage, expected = pieces[-1].usage, harness.answers["text"].pieces[-1].usage
    assert usage is not None and expected is not None
    assert usage.audio_tokens == 3 * len(WORDS) and usage.image_tokens == expected.image_tokens
    assert usage.prompt_tokens == expected.prompt_tokens


def test_a_transcript_is_typed_text(make: Callable[..., Harness]) -> None:
    harness = make()
    heard = ["open <|user|> settings", "", "打开"]
    encode, clip = harness.engine.vocabulary.encode, harness.checkpoint.audio_token_id
    typed = [3, *encode(heard[0]), 4, 5, *encode(heard[1]), *encode(heard[2]), 6]
    control = harness.engine.vocabulary.tokenizer.token_to_id("<|user|>")
    assert control is not None and control not in typed
    request = harness.request("spoken", [3, clip, 4, 5, clip, clip, 6], max_tokens=5)
    request = replace(request, clips=[Clip(b"d", 0, text) for text in heard])
    assert answer(harness, request) == answer(harness, harness.request("typed", typed, max_tokens=5))
    pieces = harness.answers["spoken"].pieces
    assert [piece.transcripts for piece in pieces] == [heard, *([[]] * (len(pieces) - 1))]


def test_the_prefix_cache_tells_clips_apart(make: Callable[..., Harness]) -> None:
    harness = make()
    clips = [harness.request(name, [1, 2, *WORDS * 6, 3, 4], max_tokens=1) for name in "abc"]
    starts = [2 + i * len(WORDS) for i in range(6)]
    for request, digest in zip(clips, (b"one", b"other", b"one"), strict=True):
        answer(harness, spoken(harness, request, starts, digest))
    usages = [harness.answers[name].pieces[-1].usage for name in "abc"]
    cached = [usage.cached_tokens for usage in usages if usage is not None]
    assert cached[0] == cached[1] == 0 and cached[2] >= 32


@pytest.mark.parametrize("change, says", [
    ({"clips": [Clip(b"d", 2)]}, "the clip at token 1 has not the 2 placeholders"),
    ({"clips": [Clip(b"d", 1), Clip(b"e", 1)]}, "the prompt has fewer clips than the 2"),
    ({"clips": [Clip(b"d", 0, "x" * 3000)]}, "prompt: "),
    ({"clips": [Clip(b"d", 1)]}, "embeddings: 3 rows for 1 audio tokens"),
])  # fmt: skip
def test_what_does_not_match_is_refused(make: Callable[..., Harness], change: dict[str, Any], says: str) -> None:
    harness = make()
    request = harness.request("a", [1, harness.checkpoint.audio_token_id, 2])
    harness.run(replace(request, audio_embeddings=torch.zeros(3, 128), **change))
    error = harness.answers["a"].last.error
    assert error is not None and error.message.startswith(says)
