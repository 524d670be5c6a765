"""The choice of visual keys and tokens, against plain loops."""

import pytest
import torch

from autoglm.config import SparseAttentionConfig, SparseMode, load_config
from autoglm.errors import RequestError
from autoglm.kernels.reference import dispatch as reference
from autoglm.llm.block_hash import MediaSpan
from autoglm.llm.sequence import Prompt
from autoglm.llm.sparse.divprune import prune
from autoglm.llm.sparse.policy import num_kept, resolve, salt_media
from autoglm.preprocess.sampling_params import SamplingParams


def test_the_number_of_kept_keys_is_rounded_up() -> None:
    assert [num_kept(0.3, n) for n in (0, 1, 10, 11)] == [0, 1, 3, 4]
    assert num_kept(0.07, 100) == 7
    assert num_kept(1.0, 3354) == 3354


@pytest.mark.parametrize("word", ["off", "'off'", "false"])
def test_off_can_be_written_in_yaml(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOGLM_OVERRIDES", f"sparse_attention: {{mode: {word}, ratio: 0.5, dense_layers: 0}}")
    assert load_config().sparse_attention == SparseAttentionConfig("off", 0.5, dense_layers=0)


def test_requests_choose_among_the_modes_of_the_server() -> None:
    def choose(server_mode: str, **parameters: object) -> tuple[str, float] | None:
        config = SparseAttentionConfig(mode=server_mode)  # type: ignore[arg-type]
        resolved = resolve(config, SamplingParams.from_parameters(parameters, {}))
        return None if resolved is None else (resolved.mode, resolved.ratio)

    assert choose("off") is None
    assert choose("prune") == ("prune", 0.3)
    assert choose("prune", sparse_mode="off") is None
    assert choose("pages", sparse_mode="prune", sparse_ratio=0.5) == ("prune", 0.5)
    assert choose("topk", sparse_ratio=1) == ("topk", 1.0)
    for mode in ("topk", "pages"):
        with pytest.raises(
            RequestError, match=rf"^sparse_mode must be one of off, prune on this server \(got '{mode}'\)"
        ):
            choose("prune", sparse_mode=mode)
    with pytest.raises(RequestError, match="one of off, prune, pages on this server"):
        choose("pages", sparse_mode="topk")


def test_unknown_modes_are_rejected() -> None:
    with pytest.raises(RequestError, match=r"^sparse_mode must be one of off, topk, pages, prune \(got 'snap'\)$"):
        SamplingParams.from_parameters({"sparse_mode": "snap"}, {})


@pytest.mark.parametrize("parameters", [{"sparse_mode": "some"}, {"sparse_mode": True}, {"sparse_ratio": 0}])
def test_invalid_options_are_rejected(parameters: dict[str, object]) -> None:
    with pytest.raises(RequestError, match="sparse_"):
        SamplingParams.from_parameters(parameters, {})


def test_media_hashes_depend_on_how_the_mode_changes_keys() -> None:
    media = [MediaSpan(b"a", 3, 5)]

    def salted(mode: SparseMode, ratio: float, dense_layers: int) -> MediaSpan:
        return salt_media(SparseAttentionConfig(mode, ratio, dense_layers=dense_layers), media)[0]

    assert salted("pages", 0.3, 2) == media[0]
    spans = [salted("topk", 0.3, 2), salted("topk", 0.4, 2), salted("topk", 0.3, 1)]
    spans += [salted("prune", 0.3, 2), salted("prune", 0.5, 2)]
    assert salted("prune", 0.3, 1) == spans[3]
    assert len({span.media_hash for span in [*spans, *media]}) == len(spans) + 1
    assert {(span.start, span.length) for span in spans} == {(3, 5)}


def test_pruned_prompts_keep_their_positions() -> None:
    torch.manual_seed(0)
    media = [MediaSpan(b"a", 2, 10), MediaSpan(b"b", 15, 4)]
    ids = [0, 1, *[99] * 10, 12, 13, 14, *[99] * 4, 19]
    positions = torch.arange(20, dtype=torch.int32).expand(3, -1)
    embeddings = torch.randn(14, 16)
    pruned = prune(Prompt(ids, positions, 20, media, embeddings), 0.5, reference)
    assert pruned.token_ids == [0, 1, *[99] * 5, 12, 13, 14, *[99] * 2, 19]
    assert pruned.media == [MediaSpan(b"a", 2, 5), MediaSpan(b"b", 10, 2)]
    stay = pruned.positions[0].tolist()
    assert [p for p in stay if p not in range(2, 12) and p not in range(15, 19)] == [0, 1, 12, 13, 14, 19]
    rows = [p - 2 if p < 12 else p - 5 for p in stay if p in range(2, 12) or p in range(15, 19)]
    assert pruned.embeddings is not None
    assert torch.equal(pruned.embeddings, embeddings[rows])
    whole = prune(Prompt(ids, positions, 20, media, embeddings), 1.0, reference)
    assert whole.embeddings is not None
    assert whole.token_ids == ids and torch.equal(whole.embeddings, embeddings)
