"""The state of request slots: sampling parameters by column, token counts, visual blocks."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from autoglm.config import SparseAttentionConfig
from autoglm.kernels.sampling_metadata import PROMPT_MASK, WIDTH, Column
from autoglm.llm.block_hash import MediaSpan
from autoglm.llm.request_slots import RequestSlots, pack_sampling_params, token_counts, visual_blocks
from autoglm.llm.transfer import Int32Array
from autoglm.preprocess.options import Choice, Integer, JsonText, Number, Option, options
from autoglm.preprocess.sampling_params import MediaOptions, SamplingParams
from tests.llm.sequences import make_sequence

PACKED = {name: each for name, each in options(SamplingParams).items() if each.column is not None}
FLOAT_COLUMNS = [each.column for each in PACKED.values() if isinstance(each.default, float)]
IMAGES = [MediaSpan(b"a", 3, 10), MediaSpan(b"b", 20, 4), MediaSpan(b"clip", 28, 8, visual=False)]
CHECKPOINT_DEFAULTS: dict[type, list[dict[str, Any]]] = {SamplingParams: [{}], MediaOptions: []}
PAGES = SparseAttentionConfig("pages", 0.4)


def example(each: Option) -> Any:
    """An accepted value of an option, other than its default if it is a number."""
    if isinstance(each.kind, Integer):
        return int(min(each.kind.low + 7, each.kind.high))
    if isinstance(each.kind, Number):
        return each.kind.low + 0.75 * (each.kind.high - each.kind.low)  # exact in fp32
    if isinstance(each.kind, Choice):
        return each.kind.values[-1]
    if isinstance(each.kind, JsonText):
        return '{"type":"json_object"}'
    return each.default


def unpack(row: Int32Array, column: Column) -> Any:
    return row.view(np.float32 if column in FLOAT_COLUMNS else np.uint32)[column]


@pytest.mark.parametrize("name", PACKED)
def test_each_option_with_a_column_is_packed_into_it(name: str) -> None:
    each = PACKED[name]
    assert each.column is not None
    value = example(each)
    assert value != each.default
    row, default = pack_sampling_params(SamplingParams(**{name: value}), 0), pack_sampling_params(SamplingParams(), 0)
    assert row.dtype == np.int32 and row.shape == (WIDTH,)
    assert unpack(row, each.column) == value
    assert unpack(default, each.column) == each.default
    assert np.flatnonzero(row != default).tolist() == [each.column]


def test_every_column_has_one_source() -> None:
    columns = [each.column for each in PACKED.values() if each.column is not None]
    assert sorted([*columns, Column.SEED_LOW, Column.SEED_HIGH, Column.DEFERRED]) == sorted(Column)


def test_seeds_and_deferral_are_packed() -> None:
    row = pack_sampling_params(SamplingParams(), 0xFEDC_BA98_7654_3210, deferred=True)
    assert (unpack(row, Column.SEED_LOW), unpack(row, Column.SEED_HIGH)) == (0x7654_3210, 0xFEDC_BA98)
    assert unpack(row, Column.DEFERRED) == 1
    assert unpack(pack_sampling_params(SamplingParams(), 0), Column.DEFERRED) == 0


@pytest.mark.parametrize("table", [SamplingParams, MediaOptions])
def test_every_option_of_the_tables_is_accepted(table: Any) -> None:
    for field, each in options(table).items():
        for name in (each.name, *each.aliases):
            for value in (example(each), each.default):
                parameters = json.loads(json.dumps({name: value}))  # lists instead of tuples
                params = table.from_parameters(parameters, *CHECKPOINT_DEFAULTS[table])
                assert getattr(params, field) == value


def test_token_counts_include_the_prompt_only_for_a_repetition_penalty() -> None:
    prompt, answer = [1, 2, 2, 3], [2, 5, 5]
    assert token_counts(make_sequence(prompt, answer=answer, presence_penalty=0.5)) == {2: 1, 5: 2}
    expected = {1: PROMPT_MASK, 2: PROMPT_MASK + 1, 3: PROMPT_MASK, 5: 2}
    assert token_counts(make_sequence(prompt, answer=answer, repetition_penalty=1.2)) == expected


def test_visual_blocks_hold_visual_keys_only() -> None:
    sequence = make_sequence(list(range(40)), media=IMAGES, sparse=PAGES)
    assert np.flatnonzero(visual_blocks(sequence, 4, 10)).tolist() == [1, 2, 5]
    for sparse in (None, SparseAttentionConfig("topk"), SparseAttentionConfig("prune")):
        assert not visual_blocks(make_sequence(list(range(40)), media=IMAGES, sparse=sparse), 4, 10).any()


def make_slots(pages: SparseAttentionConfig | None = None) -> RequestSlots:
    return RequestSlots(3, vocab_size=8, max_blocks=10, block_size=4, device=torch.device("cpu"), pages=pages)


def test_initialization_replaces_the_state_of_the_previous_request() -> None:
    slots = make_slots()
    counts, metadata = slots.state.output_token_counts, slots.state.sampling_metadata
    counts.fill_(9)
    before = metadata.clone()
    first = make_sequence([1, 2], answer=[5, 5], slot=2, temperature=0.5, seed=7)
    second = make_sequence([3], slot=0, repetition_penalty=2.0, logprobs=0)
    slots.initialize([first, second])
    slots.initialize([])
    assert counts[[0, 2]].tolist() == [[0, 0, 0, PROMPT_MASK, 0, 0, 0, 0], [0, 0, 0, 0, 0, 2, 0, 0]]
    assert (counts[1] == 9).all()
    expected = pack_sampling_params(first.request.sampling_params, 7, False)
    assert metadata[2].tolist() == expected.tolist()
    assert metadata[0, Column.DEFERRED] == 1  # log probabilities are read from the logits buffer
    assert torch.equal(metadata[[1, 3]], before[[1, 3]])


def test_forced_tokens_are_counted() -> None:
    slots = make_slots()
    sequence = make_sequence([1], slot=1)
    slots.initialize([sequence])
    slots.count_tokens(sequence, [4, 6, 4])
    assert slots.state.output_token_counts.tolist() == [[0] * 8, [0, 0, 0, 0, 2, 0, 1, 0], [0] * 8, [0] * 8]


def test_pages_have_visual_blocks_and_the_number_to_keep() -> None:
    slots = make_slots(PAGES)
    slots.visual_blocks.fill_(9)
    slots.num_kept.fill_(9)
    slots.initialize(
        [make_sequence([1], slot=0), make_sequence(list(range(8)) * 5, slot=2, media=IMAGES, sparse=PAGES)]
    )
    assert slots.visual_blocks[2].tolist() == [0, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert slots.visual_blocks[0].tolist() == [0] * 10
    assert slots.num_kept.tolist() == [0, 9, 2, 9]  # 0.4 * 3 blocks, rounded up


def test_a_waiting_sequence_has_no_slot() -> None:
    with pytest.raises(ValueError, match="request a has no slot"):
        make_slots().initialize([make_sequence([1])])
