"""Choosing among visual keys and tokens, each rule against one that is written out in loops."""

import math

import pytest
import torch

from autoglm.config import SparseAttentionConfig, load_config
from autoglm.errors import RequestError
from autoglm.kernels.reference import dispatch as reference
from autoglm.kernels.reference.sparse import AT_ONCE, topk_attention, visual_attention
from autoglm.llm.block_hash import MediaSpan
from autoglm.llm.prompt import Prompt
from autoglm.llm.sparse.divprune import prune
from autoglm.llm.sparse.policy import Sparsity
from autoglm.llm.thinning import keep_strongest
from autoglm.preprocess.sampling_params import SamplingParams

HEADS, KV_HEADS, SIZE = 6, 2, 8


def test_ratio_counts_whole_keys() -> None:
    assert [Sparsity("topk", 0.3, 2).kept(n) for n in (0, 1, 10, 11)] == [0, 1, 3, 4]
    assert Sparsity("topk", 0.07, 2).kept(100) == 7
    assert Sparsity("topk", 1.0, 2).kept(3354) == 3354


@pytest.mark.parametrize("word", ["off", "'off'", "false"])
def test_off_in_yaml(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOGLM_OVERRIDES", f"sparse_attention: {{mode: {word}, ratio: 0.5, dense_layers: 0}}")
    assert load_config().sparse_attention == SparseAttentionConfig("off", 0.5, dense_layers=0)


def test_requests_choose_within_what_the_server_has() -> None:
    def choose(server: str, **wishes: object) -> Sparsity | None:
        config = SparseAttentionConfig(mode=server)  # type: ignore[arg-type]
        return Sparsity.choose(config, SamplingParams.from_parameters(wishes, {}))

    assert choose("off") is None
    assert choose("snap") == Sparsity("snap", 0.3, 2)
    assert choose("snap", sparse_mode="off") is None
    assert choose("pages", sparse_mode="prune", sparse_ratio=0.5) == Sparsity("prune", 0.5, 2)
    assert choose("topk", sparse_ratio=1) == Sparsity("topk", 1.0, 2)
    for mode in ("topk", "pages"):
        with pytest.raises(RequestError, match=r"sparse_mode: got .*; allowed: off, snap, prune or the server's own"):
            choose("snap", sparse_mode=mode)


@pytest.mark.parametrize("wishes", [{"sparse_mode": "some"}, {"sparse_mode": True}, {"sparse_ratio": 0}])
def test_wishes_that_cannot_be(wishes: dict[str, object]) -> None:
    with pytest.raises(RequestError, match="sparse_"):
        SamplingParams.from_parameters(wishes, {})


def test_names_say_what_is_in_the_blocks() -> None:
    media = [MediaSpan(b"a", 3, 5)]
    dense = [Sparsity(mode, 0.3, 2).name(media) for mode in ("snap", "pages")]  # type: ignore[arg-type]
    others = [("topk", 0.3, 2), ("topk", 0.4, 2), ("topk", 0.3, 1), ("prune", 0.3, 2), ("prune", 0.5, 2)]
    names = [Sparsity(*other).name(media)[0] for other in others]  # type: ignore[arg-type]
    assert dense == [media, media]
    assert len({name.digest for name in [*names, *media]}) == len(others) + 1
    assert {(name.start, name.length) for name in names} == {(3, 5)}


@pytest.mark.parametrize("ratio", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("first", [40, 7])
def test_topk_equals_dense_attention_under_a_mask(ratio: float, first: int) -> None:
    """Images at 3 to 16 and 20 to 34 of 40 + AT_ONCE keys; a query between the two sees the first alone."""
    torch.manual_seed(first)
    length = 40 + AT_ONCE
    visual = torch.zeros(length, dtype=torch.bool)
    visual[3:17] = visual[20:35] = True
    places = torch.tensor([p for p in range(first, length) if not visual[p]])
    counts = torch.tensor([math.ceil(ratio * int(visual[:p].sum())) for p in places.tolist()])
    q = torch.randn(len(places), HEADS, SIZE)
    key, value = torch.randn(2, length, KV_HEADS, SIZE)
    mixed = topk_attention(q, key, value, places, visual, counts)
    for row, (place, count) in enumerate(zip(places.tolist(), counts.tolist(), strict=True)):
        for kv_head in range(KV_HEADS):
            group = q[row].view(KV_HEADS, -1, SIZE)[kv_head]
            scores = group @ key[: place + 1, kv_head].T / math.sqrt(SIZE)
            strength = scores.softmax(-1).sum(0)
            seen = visual[: place + 1].nonzero()[:, 0]
            mask = ~visual[: place + 1]
            mask[seen[strength[seen].topk(count).indices]] = True
            assert int(mask.sum()) == place + 1 - len(seen) + count
            expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value[: place + 1, kv_head]
            torch.testing.assert_close(mixed[row].view(KV_HEADS, -1, SIZE)[kv_head], expected)


def test_attention_of_a_window_is_a_sum_of_its_parts() -> None:
    torch.manual_seed(0)
    q, key = torch.randn(5, HEADS, SIZE), torch.randn(30, KV_HEADS, SIZE)
    places, visual = torch.arange(25, 30), torch.arange(4, 20)
    whole = visual_attention(q, key, places, visual)
    parts = [visual_attention(q[i : i + 1], key[: 26 + i], places[i : i + 1], visual) for i in range(5)]
    torch.testing.assert_close(whole, torch.stack(parts).sum(0))
    everything = visual_attention(q, key, places, torch.arange(30))
    torch.testing.assert_close(everything.sum(-1), torch.full((KV_HEADS,), 5.0 * HEADS / KV_HEADS))


def test_the_strongest_stay_in_order() -> None:
    attention = torch.tensor([[[0.1, 0.9, 0.5, 0.2]], [[0.7, 0.0, 0.1, 0.8]]])
    places = keep_strongest(attention, 2, torch.tensor([1, 2, 5, 6]), torch.tensor([0, 3, 4, 7]))
    assert places.tolist() == [[[0, 2, 3, 4, 5, 7]], [[0, 1, 3, 4, 6, 7]]]


def test_pruned_prompt_keeps_positions() -> None:
    torch.manual_seed(0)
    media = [MediaSpan(b"a", 2, 10), MediaSpan(b"b", 15, 4)]
    ids = [0, 1, *[99] * 10, 12, 13, 14, *[99] * 4, 19]
    positions = torch.arange(20, dtype=torch.int32).expand(3, -1)
    embeddings = torch.randn(14, 16)
    pruned = prune(Prompt(ids, positions, media, embeddings), Sparsity("prune", 0.5, 0), reference)
    assert pruned.token_ids == [0, 1, *[99] * 5, 12, 13, 14, *[99] * 2, 19]
    assert pruned.media == [MediaSpan(b"a", 2, 5), MediaSpan(b"b", 10, 2)]
    stay = pruned.positions[0].tolist()
    assert [p for p in stay if p not in range(2, 12) and p not in range(15, 19)] == [0, 1, 12, 13, 14, 19]
    rows = [p - 2 if p < 12 else p - 5 for p in stay if p in range(2, 12) or p in range(15, 19)]
    assert pruned.embeddings is not None
    assert torch.equal(pruned.embeddings, embeddings[rows])
    whole = prune(Prompt(ids, positions, media, embeddings), Sparsity("prune", 1.0, 0), reference)
    assert whole.embeddings is not None
    assert whole.token_ids == ids and torch.equal(whole.embeddings, embeddings)
