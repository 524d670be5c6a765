"""Sampling kernels against their twins, and the twins against plain definitions."""

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from autoglm.kernels.gpu import sampling
from autoglm.kernels.reference import sampling as reference_sampling
from autoglm.kernels.sampling_metadata import COUNT_MASK, IN_PROMPT, WIDTH
from autoglm.llm.request_slots import record
from autoglm.preprocess.sampling_params import SamplingParams

SEATS = 7
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "the real client's": {"frequency_penalty": 0.2},
    "all penalties": {"frequency_penalty": 0.5, "presence_penalty": -0.3, "repetition_penalty": 1.3},
    "warm": {"temperature": 0.8},
    "top-p": {"temperature": 1.2, "top_p": 0.9},
    "top-k": {"temperature": 0.7, "top_k": 5, "presence_penalty": 0.2},
    "all cuts": {"temperature": 1.5, "top_k": 40, "top_p": 0.8, "min_p": 0.02, "frequency_penalty": 0.1},
    "min-p": {"temperature": 2.0, "min_p": 0.1},
    "one": {"temperature": 1.0, "top_k": 1},
    "all of them": {"temperature": 1.0, "top_k": 10**6},
}


@triton.jit  # type: ignore[untyped-decorator]
def store_bits(out, low, high, step, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    low, high = tl.load(low), tl.load(high)
    tl.store(out + places, sampling.noise_bits(low, high, tl.load(step), tl.program_id(0) * COUNT, COUNT))


def make_records(kinds: list[dict[str, Any]], device: torch.device, deferred: int = 0) -> torch.Tensor:
    """The last `deferred` of them are."""
    first = len(kinds) - deferred
    rows = [record(SamplingParams(**kind), 2**63 - 5 * i, i >= first) for i, kind in enumerate(kinds)]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def no_more(seats: int, vocab: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Somewhere for the tokens, and for logits that nobody keeps."""
    return torch.zeros(seats, dtype=torch.int64, device=device), torch.zeros(seats, vocab, device=device)


def pack_masks(allowed: torch.Tensor) -> torch.Tensor:
    """bool [n, vocab] -> int32 [n, ceil(vocab / 32)], with ones behind the vocabulary."""
    padded = torch.nn.functional.pad(allowed, (0, -allowed.shape[1] % 32), value=True)
    bits = padded.view(len(allowed), -1, 32).long() << torch.arange(32)
    return bits.sum(-1).to(torch.int32)


def test_philox_is_philox() -> None:
    """Known answers of Random123's test vectors, whose counters end in zeros."""
    words = reference_sampling.philox(*(torch.tensor(0) for _ in range(4)))
    assert [int(word) for word in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**40 + 7, 2**64 - 1])
@pytest.mark.parametrize("step", [0, 1, 12345])
def test_noise_is_the_same_bit_for_bit(seed: int, step: int, device: torch.device) -> None:
    low, high = (torch.tensor(word, device=device) for word in (seed & 0xFFFFFFFF, seed >> 32))
    words = reference_sampling.philox(torch.arange(128, device=device), torch.tensor(step, device=device), low, high)
    out = torch.full((600,), -1, dtype=torch.int64, device=device)
    halves = [word.to(torch.uint32).view(torch.int32) for word in (low, high)]
    store_bits[(4,)](out, *halves, torch.tensor(step, dtype=torch.int32, device=device), 128)
    assert torch.equal(out[:512], torch.stack(words, -1).flatten())
    assert (out[512:] == -1).all()


@pytest.mark.parametrize("vocab", [12, 384, 1024, 2500])
@pytest.mark.parametrize("seed", range(3))
def test_sample_equals_its_twin(vocab: int, seed: int, device: torch.device) -> None:
    """All kinds of rows in one batch; nothing is read or written that belongs to no row."""
    generator = torch.Generator().manual_seed(seed)
    kinds = list(KINDS.values())
    rows, count = len(kinds), len(kinds) + 3
    seats = torch.randperm(count, generator=generator)[:rows].int()
    records = torch.full((count, WIDTH), 2**31 - 1, dtype=torch.int32)
    records[seats.long()] = make_records(kinds, torch.device("cpu"))
    marks = torch.randint(0, 3, (count, vocab), generator=generator, dtype=torch.int32)
    marks += IN_PROMPT * torch.randint(0, 2, (count, vocab), generator=generator, dtype=torch.int32)
    logits = torch.randn(rows, vocab, generator=generator) * 3
    steps = torch.randint(0, 100, (rows,), generator=generator, dtype=torch.int32)
    results = []
    for module in (reference_sampling, sampling):
        space = torch.full((rows + 2, vocab), float("nan"), device=device)
        space[1:-1] = logits
        copies = [t.to(device, copy=True) for t in (seats, steps, records, marks)]
        tokens = torch.full((count,), -7, device=device)
        kept = torch.full((count, vocab), -5.0, device=device)
        chosen = module.sample(space[1:-1], *copies, tokens, kept)
        assert space[0].isnan().all() and space[-1].isnan().all()
        assert (kept == -5).all()
        results.append((chosen, tokens, copies[3]))
    for ours, wanted in zip(results[1], results[0], strict=True):
        assert torch.equal(ours, wanted)
    chosen, tokens, counted = results[0]
    assert torch.equal(tokens[seats.long()].int(), chosen)
    assert ((counted.cpu() - marks).sum(1) == torch.zeros(count).index_fill(0, seats.long(), 1)).all()


@pytest.mark.parametrize("vocab", [12, 384, 1024, 2500])
@pytest.mark.parametrize("seed", range(3))
def test_late_choice_equals_its_twin_and_that_of_masked_logits(vocab: int, seed: int, device: torch.device) -> None:
    """All kinds of rows, at once and deferred; the latter leave nothing but their logits behind before their turn."""
    generator = torch.Generator().manual_seed(seed)
    kinds = list(KINDS.values())
    rows, count, late = 2 * len(kinds), 2 * len(kinds) + 3, len(kinds)
    order = torch.randperm(count, generator=generator)[:rows].int()
    records, plain = (torch.full((count, WIDTH), 2**31 - 1, dtype=torch.int32) for _ in range(2))
    records[order.long()] = make_records(kinds * 2, torch.device("cpu"), late)
    plain[order.long()] = make_records(kinds * 2, torch.device("cpu"))
    mixed = torch.randperm(rows, generator=generator)
    marks = torch.randint(0, 3, (count, vocab), generator=generator, dtype=torch.int32)
    marks += IN_PROMPT * torch.randint(0, 2, (count, vocab), generator=generator, dtype=torch.int32)
    logits = torch.randn(rows, vocab, generator=generator) * 3
    steps = torch.randint(0, 100, (rows,), generator=generator, dtype=torch.int32)
    allowed = torch.rand(rows, vocab, generator=generator) < torch.rand(rows, 1, generator=generator)
    allowed[:, seed] = True
    allowed[: rows - late] = True
    allowed[-1] = torch.arange(vocab) == vocab - 1
    masked = logits.where(allowed, -torch.inf)
    counted, tokens = marks.clone(), torch.full((count,), -7)
    choices = reference_sampling.sample(masked, order, steps, plain, counted, tokens, torch.empty(count, vocab))
    assert allowed[torch.arange(rows), choices.long()].all()
    for module in (reference_sampling, sampling):
        state = [t.to(device, copy=True) for t in (records, marks, torch.full((count,), -7))]
        kept = torch.full((count, vocab), -5.0, device=device)
        inputs = [t[mixed].to(device) for t in (logits, order, steps)]
        chosen = module.sample(*inputs, *state, kept)
        behind = order[rows - late :].long()
        assert torch.equal(kept[behind.to(device)].cpu(), logits[rows - late :])
        assert ((kept != -5).any(1).cpu() == torch.zeros(count).index_fill(0, behind, 1)).all()
        assert (state[2][behind] == -7).all() and torch.equal(state[1][behind].cpu(), marks[behind])
        assert torch.equal(chosen.cpu(), choices.where(torch.arange(rows) < rows - late, -1)[mixed])
        back = torch.randperm(late, generator=torch.Generator().manual_seed(seed)) + rows - late
        inputs = [t[back].to(device) for t in (order, steps, pack_masks(allowed))]
        assert torch.equal(module.sample_late(*inputs, *state, kept).cpu(), choices[back])
        assert torch.equal(state[1].cpu(), counted) and torch.equal(state[2].cpu(), tokens)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_forbidden_is_chosen_whatever_the_logits(value: float, kind: str, device: torch.device) -> None:
    """Allowed tokens have no finite logit, forbidden ones good ones; the latter also beside allowed finite ones."""
    allowed = torch.zeros(2, 1500, dtype=torch.bool)
    allowed[:, [700, 1200, 1499]] = True
    rows = torch.zeros(2, 1500).where(~allowed, value)
    rows[1] = torch.full((1500,), value).where(~allowed[1], -50.0)
    results = []
    for module in (reference_sampling, sampling):
        seats = torch.arange(2, dtype=torch.int32, device=device)
        state = make_records([KINDS[kind]] * 2, device, 2), torch.zeros(2, 1500, dtype=torch.int32, device=device)
        tokens = torch.zeros(2, dtype=torch.int64, device=device)
        masks = pack_masks(allowed).to(device)
        chosen = module.sample_late(seats, seats, masks, *state, tokens, rows.to(device, copy=True)).cpu()
        assert allowed[[0, 1], chosen.long()].all()
        results.append(chosen)
    assert torch.equal(*results)


def test_many_draws_of_one_row_equal_the_twin(device: torch.device) -> None:
    logits = (torch.randn(1, 97, generator=torch.Generator().manual_seed(4)) * 2).repeat(len(KINDS) * 30, 1)
    kinds = [kind for kind in KINDS.values() for _ in range(30)]
    rows = len(kinds)
    results = []
    for module in (reference_sampling, sampling):
        state = make_records(kinds, device), torch.zeros(rows, 97, dtype=torch.int32, device=device)
        seats = torch.arange(rows, dtype=torch.int32, device=device)
        chosen = module.sample(logits.to(device, copy=True), seats, seats, *state, *no_more(rows, 97, device))
        results.append(chosen)
    assert torch.equal(*results)
    assert len(results[0][90:120].unique()) > 4


def test_equal_logits_choose_the_first(device: torch.device) -> None:
    for module in (reference_sampling, sampling):
        seats = torch.zeros(1, dtype=torch.int32, device=device)
        state = make_records([{}], device), torch.zeros(1, 3000, dtype=torch.int32, device=device)
        row = torch.zeros(1, 3000, device=device)
        row[0, 5] = row[0, 1500] = row[0, 2999] = 1.0
        assert int(module.sample(row, seats, seats, *state, *no_more(1, 3000, device))) == 5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["greedy", "warm", "all cuts"])
def test_a_broken_row_still_gives_a_token(value: float, kind: str, device: torch.device) -> None:
    seats = torch.zeros(1, dtype=torch.int32, device=device)
    state = make_records([KINDS[kind]], device), torch.zeros(1, 1500, dtype=torch.int32, device=device)
    row = torch.full((1, 1500), value, device=device)
    chosen = sampling.sample(row, seats, seats, *state, *no_more(1, 1500, device))
    assert 0 <= int(chosen) < 1500


@pytest.mark.parametrize("width", [1, 5, 1024, 1500])
def test_read_seats_equals_its_twin(width: int, device: torch.device) -> None:
    chance = np.random.default_rng(width)
    seats = torch.tensor([3, 0, 6, 2, 6], dtype=torch.int32)
    lengths = torch.tensor([*chance.integers(1, 4 * width + 1, 2), 0, 4 * width, 0], dtype=torch.int32)
    positions, blocks = (torch.from_numpy(chance.integers(0, 999, 5).astype(np.int32)) for _ in range(2))
    tokens = torch.from_numpy(chance.integers(0, 999, SEATS))
    tables = torch.from_numpy(chance.integers(0, 999, (SEATS, width)).astype(np.int32))
    results = []
    for module in (reference_sampling, sampling):
        space = torch.full((SEATS + 2, width), -1, dtype=torch.int32, device=device)
        space[1:-1] = tables
        inputs = [t.to(device) for t in (seats, lengths, positions, blocks, tokens)]
        results.append([*module.read_seats(*inputs, space[1:-1], 4), space])
    for ours, wanted in zip(results[1], results[0], strict=True):
        assert ours.dtype == wanted.dtype and torch.equal(ours, wanted)
    ids, axes, table, space = (t.cpu() for t in results[0])
    assert torch.equal(ids, tokens[seats.long()]) and (axes == positions).all()
    wanted = tables.clone()
    for row in (0, 1, 3):
        wanted[seats[row], (lengths[row] - 1) // 4] = blocks[row]
    assert torch.equal(space[1:-1], wanted) and (space[[0, -1]] == -1).all()
    assert torch.equal(table, wanted[seats.long()])


def test_counting_never_reaches_the_prompt_mark() -> None:
    assert IN_PROMPT & COUNT_MASK == 0 and IN_PROMPT | COUNT_MASK < 2**31
