"""From requests to sequences: rejections, forced beginnings, pruned prompts."""

from typing import Any

import pytest
import torch

from autoglm.checkpoint import Checkpoint
from autoglm.config import EngineConfig, SparseAttentionConfig
from autoglm.errors import ErrorCode, RequestError
from autoglm.llm.input_processor import InputProcessor
from autoglm.llm.loader import load_language_model
from autoglm.llm.model import LanguageModel
from autoglm.llm.sequence import Request
from autoglm.preprocess.sampling_params import SamplingParams
from autoglm.preprocess.tokenizer import Vocabulary
from tests.conftest import Pair
from tests.prompts import Grid, random_prompt

GRIDS: list[Grid] = [(1, 16, 12), (1, 4, 6)]  # 48 and 6 tokens
FORCED = '{"type":"json_schema","json_schema":{"schema":{"const":"yes, indeed"}}}'


@pytest.fixture(scope="module")
def model(plain: Pair) -> LanguageModel:
    return load_language_model(plain.checkpoint, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def processor(plain: Pair, model: LanguageModel) -> InputProcessor:
    return make_processor(plain.checkpoint, model)


def make_processor(checkpoint: Checkpoint, model: LanguageModel, sparse_mode: Any = "off") -> InputProcessor:
    sparse_attention = SparseAttentionConfig(sparse_mode, ratio=0.25)
    config = EngineConfig(default_max_tokens=16)
    return InputProcessor(checkpoint, config, sparse_attention, Vocabulary(checkpoint.path), model, max_context=100)


def make_request(token_ids: list[int], options: dict[str, Any] | None = None, **media: Any) -> Request:
    params = SamplingParams.from_parameters(options or {}, {})
    return Request(request_id="a", token_ids=token_ids, sampling_params=params, sink=lambda output: None, **media)


def image_request(checkpoint: Checkpoint, options: dict[str, Any] | None = None, num_rows: int = 54) -> Request:
    return make_request(
        random_prompt(checkpoint, GRIDS, 1),
        options,
        image_grids=GRIDS,
        image_hashes=[b"first", b"second"],
        image_embeddings=torch.randn(num_rows, checkpoint.text.hidden_size),
    )


@pytest.mark.parametrize(("token_ids", "options", "message"), [
    ([], {}, "prompt must be at least one token (got 0 tokens)"),
    ([1] * 100, {}, "prompt must be at most 99 tokens, one less than the context of 100 (got 100 tokens)"),
    ([1, -1], {}, "prompt must have token ids between 0 and 383 (got -1)"),
    ([384, 1], {}, "prompt must have token ids between 0 and 383 (got 384)"),
    ([1], {"response_format": '{"type":"phone_action"}', "max_tokens": 63},
     "max_tokens must be at least 64 with response_format phone_action, as must the rest of the context (got 63)"),
    ([1] * 50, {"response_format": '{"type":"phone_action"}', "max_tokens": 80},
     "max_tokens must be at least 64 with response_format phone_action, as must the rest of the context (got 50)"),
])  # fmt: skip
def test_invalid_prompts_and_options_are_rejected(
    processor: InputProcessor, token_ids: list[int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError) as rejected:
        processor.process(make_request(token_ids, options))
    assert (rejected.value.message, rejected.value.code) == (message, ErrorCode.INVALID_ARGUMENT)


def test_images_that_do_not_match_the_prompt_are_rejected(processor: InputProcessor, plain: Pair) -> None:
    image = plain.checkpoint.image_token_id
    cases: list[tuple[list[int], Grid, str]] = [
        ([1, 2], (1, 2, 2), "the prompt must have an image for each grid (got fewer than 1)"),
        ([image, 1, image], (1, 2, 2), "the prompt must have an image for each grid (got more than 1)"),
        ([1, image], (1, 2, 4), "the image at token 1 must have the 2 placeholders of its grid"),
        ([image], (1, 3, 4), "an image grid must be of multiples of 2 patches (got 3 x 4)"),
    ]
    for token_ids, grid, message in cases:
        with pytest.raises(RequestError) as rejected:
            processor.process(make_request(token_ids, image_grids=[grid], image_hashes=[b"x"]))
        assert (rejected.value.message, rejected.value.code) == (message, ErrorCode.INVALID_ARGUMENT)


def test_missing_embeddings_are_an_internal_error(processor: InputProcessor, plain: Pair) -> None:
    with pytest.raises(RequestError) as rejected:
        processor.process(image_request(plain.checkpoint, num_rows=53))
    expected = "embeddings must have a row for each of the 54 image tokens (got 53)"
    assert (rejected.value.message, rejected.value.code) == (expected, ErrorCode.INTERNAL)


def test_the_modes_of_other_servers_are_rejected_for_requests_with_images(
    processor: InputProcessor, plain: Pair
) -> None:
    with pytest.raises(RequestError) as rejected:
        processor.process(image_request(plain.checkpoint, {"sparse_mode": "topk"}))
    assert rejected.value.message == "sparse_mode must be one of off, prune on this server (got 'topk')"
    assert processor.process(make_request([1], {"sparse_mode": "topk"})).sparse is None


@pytest.mark.parametrize(("length", "options", "max_tokens"), [
    (10, {}, 16), (10, {"max_tokens": 20}, 20), (90, {"max_tokens": 20}, 10), (99, {}, 1),
])  # fmt: skip
def test_max_tokens_are_limited_by_the_context(
    processor: InputProcessor, length: int, options: dict[str, Any], max_tokens: int
) -> None:
    sequence = processor.process(make_request([1] * length, options))
    assert (sequence.prompt_length, sequence.max_length) == (length, length + max_tokens)


def test_a_forced_beginning_is_computed_with_the_prompt(processor: InputProcessor) -> None:
    sequence = processor.process(make_request([1, 2, 3], {"response_format": FORCED}))
    assert sequence.prompt_length == 3 and sequence.token_ids[:3] == [1, 2, 3]
    assert processor.vocabulary.decode(sequence.token_ids[3:]).startswith('"')
    assert sequence.finish_reason == "stop" and sequence.num_computed == 0
    with_logprobs = processor.process(make_request([1, 2, 3], {"response_format": FORCED, "logprobs": 0}))
    assert with_logprobs.token_ids == [1, 2, 3]


def test_a_prompt_with_images(processor: InputProcessor, plain: Pair) -> None:
    request = image_request(plain.checkpoint)
    sequence = processor.process(request)
    prompt, first = sequence.prompt, request.token_ids.index(plain.checkpoint.image_token_id)
    assert sequence.token_ids == request.token_ids
    assert [(span.media_hash, span.start, span.length) for span in prompt.media] == [
        (b"first", first, 48), (b"second", first + 48 + 7, 6),
    ]  # fmt: skip
    assert prompt.embeddings is request.image_embeddings
    assert sequence.request.image_embeddings is None, "only the prompt refers to the embeddings"


def test_a_pruned_prompt(plain: Pair, model: LanguageModel) -> None:
    request = image_request(plain.checkpoint)
    sequence = make_processor(plain.checkpoint, model, "prune").process(request)
    prompt, whole = sequence.prompt, make_processor(plain.checkpoint, model).process(request).prompt
    assert sequence.sparse is not None and sequence.sparse.mode == "prune"
    assert [span.length for span in prompt.media] == [12, 2]  # a quarter of the tokens, rounded up
    assert sequence.token_ids.count(plain.checkpoint.image_token_id) == 14
    assert sequence.prompt_length == len(request.token_ids) - 54 + 14
    assert prompt.positions.shape == (3, sequence.prompt_length) and prompt.next_position == whole.next_position
    assert request.image_embeddings is not None and prompt.embeddings is not None
    rows = {tuple(row) for row in request.image_embeddings.tolist()}
    assert len(prompt.embeddings) == 14 and all(tuple(row) in rows for row in prompt.embeddings.tolist())
    assert prompt.media[0].media_hash not in (b"first", whole.media[0].media_hash)
