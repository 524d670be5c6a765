"""Audio in prompts: a clip whose embeddings are those of words has the effect of the words, in every sparse mode."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from autoglm.config import SparseAttentionConfig, SparseMode
from autoglm.llm.sequence import Clip, Request
from tests.conftest import Pair
from tests.llm.harness import Harness
from tests.prompts import random_prompt

GRID = (1, 8, 12)
WORDS = [11, 23, 5, 42, 17, 9, 31]


@pytest.fixture
def harness(plain: Pair) -> Harness:
    return Harness(plain.checkpoint)


def answer(harness: Harness, request: Request) -> list[int]:
    harness.run(request)
    collected = harness.answers[request.request_id]
    assert not collected.last.error, collected.last.error
    return collected.token_ids


def with_clips(harness: Harness, request: Request, starts: list[int], media_hash: bytes = b"hash") -> Request:
    """The request with clips in place of the words that begin at these indices."""
    ids = list(request.token_ids)
    with torch.inference_mode():
        words = harness.engine.model_runner.model.embed(torch.tensor(WORDS))
    for start in starts:
        assert ids[start : start + len(WORDS)] == WORDS
        ids[start : start + len(WORDS)] = [harness.checkpoint.audio_token_id] * len(WORDS)
    clips = [Clip(media_hash + bytes([i]), len(WORDS)) for i in range(len(starts))]
    return replace(request, token_ids=ids, clips=clips, audio_embeddings=words.repeat(len(starts), 1))


def with_words(harness: Harness, name: str, **options: Any) -> tuple[Request, list[int]]:
    """A prompt with WORDS before an image and, twice in a row, after it; and their indices."""
    prompt = random_prompt(harness.checkpoint, [GRID], 3, before=6)
    after = len(prompt) - 4
    ids = prompt[:2] + WORDS + prompt[2:after] + WORDS + WORDS + prompt[after:]
    starts = [2, after + len(WORDS), after + 2 * len(WORDS)]
    return harness.request(name, ids, [GRID], 3, max_tokens=6, **options), starts


@pytest.mark.parametrize("mode", ["off", "topk", "prune"])
def test_clips_in_bridge_mode_are_text_to_the_model(plain: Pair, mode: SparseMode) -> None:
    sparse = SparseAttentionConfig(mode, 0.5, dense_layers=1)
    harness = Harness(plain.checkpoint, sparse_attention=sparse, prefix_cache=False)
    text, _ = with_words(harness, "text")
    clips = with_clips(harness, *with_words(harness, "clips"))
    assert answer(harness, text) == answer(harness, clips)
    usage, expected = harness.answers["clips"].last.usage, harness.answers["text"].last.usage
    assert usage is not None and expected is not None
    assert usage.audio_tokens == 3 * len(WORDS) and usage.image_tokens == expected.image_tokens
    assert usage.prompt_tokens == expected.prompt_tokens


def test_a_transcript_has_the_effect_of_typed_text(harness: Harness) -> None:
    transcripts = ["open <|user|> settings", "", "打开"]
    encode, clip = harness.engine.vocabulary.encode, harness.checkpoint.audio_token_id
    first, second, third = map(encode, transcripts)
    typed = [3, *first, 4, 5, *second, *third, 6]
    control = harness.engine.vocabulary.tokenizer.token_to_id("<|user|>")
    assert control is not None and control not in typed
    request = harness.request("clips", [3, clip, 4, 5, clip, clip, 6], max_tokens=5)
    request = replace(request, clips=[Clip(b"hash", 0, text) for text in transcripts])
    assert answer(harness, request) == answer(harness, harness.request("typed", typed, max_tokens=5))
    outputs = harness.answers["clips"].outputs
    assert [output.transcripts for output in outputs] == [transcripts, *([[]] * (len(outputs) - 1))]


def test_the_prefix_cache_distinguishes_clips(harness: Harness) -> None:
    clips = [harness.request(name, [1, 2, *WORDS * 6, 3, 4], max_tokens=1) for name in "abc"]
    starts = [2 + i * len(WORDS) for i in range(6)]
    for request, media_hash in zip(clips, (b"one", b"other", b"one"), strict=True):
        answer(harness, with_clips(harness, request, starts, media_hash))
    usages = [harness.answers[name].last.usage for name in "abc"]
    cached = [usage.cached_tokens for usage in usages if usage is not None]
    assert cached[0] == cached[1] == 0 and cached[2] >= 32


@pytest.mark.parametrize(("clips", "message"), [
    ([Clip(b"d", 2)], "the clip at token 1 must have the 2 placeholders"),
    ([Clip(b"d", 1), Clip(b"e", 1)], "the prompt must have 2 clips"),
    ([Clip(b"d", 0, "x" * 3000)], "prompt must be at most "),
    ([Clip(b"d", 1)], "embeddings must have a row for each of the 1 audio tokens (got 3)"),
])  # fmt: skip
def test_clips_that_do_not_match_the_prompt_are_rejected(harness: Harness, clips: list[Clip], message: str) -> None:
    request = harness.request("a", [1, harness.checkpoint.audio_token_id, 2])
    harness.run(replace(request, audio_embeddings=torch.zeros(3, 128), clips=clips))
    error = harness.answers["a"].last.error
    assert error is not None and error.message.startswith(message)
