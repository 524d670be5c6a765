"""The sampling kernels against the reference, and the reference against plain definitions."""

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from autoglm.kernels.base import SamplingState
from autoglm.kernels.gpu import sampling
from autoglm.kernels.reference import sampling as reference
from autoglm.kernels.sampling_metadata import COUNT_MASK, PROMPT_MASK, WIDTH
from autoglm.llm.request_slots import pack_sampling_params
from autoglm.preprocess.sampling_params import SamplingParams
from tests.kernels.device import DEVICE

PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "frequency penalty": {"frequency_penalty": 0.2},
    "all penalties": {"frequency_penalty": 0.5, "presence_penalty": -0.3, "repetition_penalty": 1.3},
    "temperature": {"temperature": 0.8},
    "top-p": {"temperature": 1.2, "top_p": 0.9},
    "top-k": {"temperature": 0.7, "top_k": 5, "presence_penalty": 0.2},
    "top-k, top-p and min-p": {"temperature": 1.5, "top_k": 40, "top_p": 0.8, "min_p": 0.02, "frequency_penalty": 0.1},
    "min-p": {"temperature": 2.0, "min_p": 0.1},
    "top-k of 1": {"temperature": 1.0, "top_k": 1},
    "top-k above the vocabulary": {"temperature": 1.0, "top_k": 10**6},
}
INT32_MAX = 2**31 - 1


@triton.jit  # type: ignore[untyped-decorator]
def store_noise_bits(out, low, high, step, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    indices = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    low, high = tl.load(low), tl.load(high)
    tl.store(out + indices, sampling.noise_bits(low, high, tl.load(step), tl.program_id(0) * COUNT, COUNT))


def pack(params: list[dict[str, Any]], num_deferred: int = 0) -> torch.Tensor:
    """Sampling metadata of rows with these parameters; the last `num_deferred` are deferred."""
    first = len(params) - num_deferred
    rows = [pack_sampling_params(SamplingParams(**own), 2**63 - 5 * i, i >= first) for i, own in enumerate(params)]
    return torch.from_numpy(np.stack(rows))


def make_state(metadata: torch.Tensor, counts: torch.Tensor) -> SamplingState:
    """Copies for the slots of a batch, with last tokens of -7 and a logits buffer of -5."""
    num_slots, vocab = counts.shape
    return SamplingState(
        sampling_metadata=metadata.to(DEVICE, copy=True),
        output_token_counts=counts.to(DEVICE, copy=True),
        last_tokens=torch.full((num_slots,), -7, device=DEVICE),
        logits_buffer=torch.full((num_slots, vocab), -5.0, device=DEVICE),
    )


def zero_counts(num_slots: int, vocab: int) -> torch.Tensor:
    return torch.zeros(num_slots, vocab, dtype=torch.int32)


def random_counts(num_slots: int, vocab: int, generator: torch.Generator) -> torch.Tensor:
    counts = torch.randint(0, 3, (num_slots, vocab), generator=generator, dtype=torch.int32)
    return counts + PROMPT_MASK * torch.randint(0, 2, (num_slots, vocab), generator=generator, dtype=torch.int32)


def pack_masks(allowed: torch.Tensor) -> torch.Tensor:
    """bool [n, vocab] -> int32 [n, ceil(vocab / 32)], with ones past the vocabulary."""
    padded = torch.nn.functional.pad(allowed, (0, -allowed.shape[1] % 32), value=True)
    bits = padded.view(len(allowed), -1, 32).long() << torch.arange(32)
    return bits.sum(-1).to(torch.int32)


def test_philox_gives_the_known_answer_of_random123() -> None:
    zero = torch.tensor(0)
    words = reference.philox(counter=zero, step=zero, low=zero, high=zero)
    assert [int(word) for word in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**40 + 7, 2**64 - 1])
@pytest.mark.parametrize("step", [0, 1, 12345])
def test_noise_equals_the_reference_bit_for_bit(seed: int, step: int) -> None:
    low, high = (torch.tensor(word, device=DEVICE) for word in (seed & 0xFFFFFFFF, seed >> 32))
    counter, step_tensor = torch.arange(128, device=DEVICE), torch.tensor(step, device=DEVICE)
    words = reference.philox(counter=counter, step=step_tensor, low=low, high=high)
    out = torch.full((600,), -1, dtype=torch.int64, device=DEVICE)
    halves = [word.to(torch.uint32).view(torch.int32) for word in (low, high)]
    store_noise_bits[(4,)](out, *halves, torch.tensor(step, dtype=torch.int32, device=DEVICE), 128)
    assert torch.equal(out[:512], torch.stack(words, -1).flatten())
    assert (out[512:] == -1).all()


@pytest.mark.parametrize("vocab", [12, 384, 1024, 2500])
@pytest.mark.parametrize("seed", range(3))
def test_sample_equals_the_reference(vocab: int, seed: int) -> None:
    """All parameters in one batch. Memory of no row is neither read nor written."""
    generator = torch.Generator().manual_seed(seed)
    rows, num_slots = len(PARAMS), len(PARAMS) + 3
    slots = torch.randperm(num_slots, generator=generator)[:rows].int()
    metadata = torch.full((num_slots, WIDTH), INT32_MAX, dtype=torch.int32)
    metadata[slots.long()] = pack(list(PARAMS.values()))
    counts = random_counts(num_slots, vocab, generator)
    logits = torch.randn(rows, vocab, generator=generator) * 3
    steps = torch.randint(0, 100, (rows,), generator=generator, dtype=torch.int32)
    results = []
    for module in (reference, sampling):
        space = torch.full((rows + 2, vocab), float("nan"), device=DEVICE)
        space[1:-1] = logits
        state = make_state(metadata, counts)
        sampled = module.sample(logits=space[1:-1], slots=slots.to(DEVICE), steps=steps.to(DEVICE), state=state)
        assert space[0].isnan().all() and space[-1].isnan().all()
        assert (state.logits_buffer == -5).all()
        results.append((sampled, state.last_tokens, state.output_token_counts))
    for found, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(found, expected)
    sampled, last_tokens, new_counts = (t.cpu() for t in results[0])
    assert torch.equal(last_tokens[slots.long()].int(), sampled)
    assert ((new_counts - counts).sum(1) == torch.zeros(num_slots).index_fill(0, slots.long(), 1)).all()


@pytest.mark.parametrize("vocab", [12, 384, 1024, 2500])
@pytest.mark.parametrize("seed", range(3))
def test_deferred_sampling_equals_sampling_of_masked_logits(vocab: int, seed: int) -> None:
    """All parameters, deferred or not, in one batch. Until they are sampled, deferred rows change only the buffer."""
    generator = torch.Generator().manual_seed(seed)
    params = list(PARAMS.values())
    rows, num_slots, num_deferred = 2 * len(params), 2 * len(params) + 3, len(params)
    slots = torch.randperm(num_slots, generator=generator)[:rows].int()
    metadata, undeferred = (torch.full((num_slots, WIDTH), INT32_MAX, dtype=torch.int32) for _ in range(2))
    metadata[slots.long()] = pack(params * 2, num_deferred)
    undeferred[slots.long()] = pack(params * 2)
    shuffled = torch.randperm(rows, generator=generator)
    counts = random_counts(num_slots, vocab, generator)
    logits = torch.randn(rows, vocab, generator=generator) * 3
    steps = torch.randint(0, 100, (rows,), generator=generator, dtype=torch.int32)
    allowed = torch.rand(rows, vocab, generator=generator) < torch.rand(rows, 1, generator=generator)
    allowed[:, seed] = True
    allowed[: rows - num_deferred] = True
    allowed[-1] = torch.arange(vocab) == vocab - 1
    masked = logits.where(allowed, -torch.inf)
    wanted = SamplingState(**{name: tensor.cpu() for name, tensor in vars(make_state(undeferred, counts)).items()})
    expected = reference.sample(logits=masked, slots=slots, steps=steps, state=wanted)
    assert allowed[torch.arange(rows), expected.long()].all()
    for module in (reference, sampling):
        state = make_state(metadata, counts)
        batch = {"logits": logits, "slots": slots, "steps": steps}
        found = module.sample(**{name: t[shuffled].to(DEVICE) for name, t in batch.items()}, state=state).cpu()
        buffered, last_tokens, new_counts = (
            each.cpu() for each in (state.logits_buffer, state.last_tokens, state.output_token_counts)
        )
        deferred = slots[rows - num_deferred :].long()
        assert torch.equal(buffered[deferred], logits[rows - num_deferred :])
        assert ((buffered != -5).any(1) == torch.zeros(num_slots).index_fill(0, deferred, 1)).all()
        assert (last_tokens[deferred] == -7).all() and torch.equal(new_counts[deferred], counts[deferred])
        assert torch.equal(found, expected.where(torch.arange(rows) < rows - num_deferred, -1)[shuffled])
        order = torch.randperm(num_deferred, generator=torch.Generator().manual_seed(seed)) + rows - num_deferred
        batch = {"slots": slots, "steps": steps, "masks": pack_masks(allowed)}
        found = module.sample_deferred(**{name: t[order].to(DEVICE) for name, t in batch.items()}, state=state).cpu()
        assert torch.equal(found, expected[order])
        assert torch.equal(state.output_token_counts.cpu(), wanted.output_token_counts)
        assert torch.equal(state.last_tokens.cpu(), wanted.last_tokens)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", PARAMS)
def test_masked_tokens_are_never_sampled(value: float, name: str) -> None:
    """In row 0 no allowed token has a finite logit; in row 1 no masked token has one."""
    allowed = torch.zeros(2, 1500, dtype=torch.bool)
    allowed[:, [700, 1200, 1499]] = True
    logits = torch.zeros(2, 1500).where(~allowed, value)
    logits[1] = torch.full((1500,), value).where(~allowed[1], -50.0)
    results = []
    for module in (reference, sampling):
        slots = torch.arange(2, dtype=torch.int32, device=DEVICE)
        state = make_state(pack([PARAMS[name]] * 2, 2), zero_counts(2, 1500))
        state.logits_buffer.copy_(logits)
        sampled = module.sample_deferred(
            slots=slots, steps=slots, masks=pack_masks(allowed).to(DEVICE), state=state
        ).cpu()
        assert allowed[[0, 1], sampled.long()].all()
        results.append(sampled)
    assert torch.equal(*results)


def test_many_draws_from_one_distribution_equal_the_reference() -> None:
    draws = 12
    sampling_params = {name: own for name, own in PARAMS.items() if "temperature" in own}
    params = [own for own in sampling_params.values() for _ in range(draws)]
    rows = len(params)
    logits = (torch.randn(1, 97, generator=torch.Generator().manual_seed(4)) * 2).repeat(rows, 1)
    results = []
    for module in (reference, sampling):
        slots = torch.arange(rows, dtype=torch.int32, device=DEVICE)
        state = make_state(pack(params), zero_counts(rows, 97))
        results.append(module.sample(logits=logits.to(DEVICE, copy=True), slots=slots, steps=slots, state=state))
    assert torch.equal(*results)
    first = list(sampling_params).index("temperature") * draws
    assert len(results[0][first : first + draws].unique()) >= 4


def test_ties_go_to_the_first_token() -> None:
    for module in (reference, sampling):
        slots = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        logits = torch.zeros(1, 3000, device=DEVICE)
        logits[0, 5] = logits[0, 1500] = logits[0, 2999] = 1.0
        state = make_state(pack([{}]), zero_counts(1, 3000))
        assert int(module.sample(logits=logits, slots=slots, steps=slots, state=state)) == 5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["greedy", "temperature", "top-k, top-p and min-p"])
def test_a_row_without_finite_logits_still_gives_a_token(value: float, name: str) -> None:
    slots = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    logits = torch.full((1, 1500), value, device=DEVICE)
    state = make_state(pack([PARAMS[name]]), zero_counts(1, 1500))
    assert 0 <= int(sampling.sample(logits=logits, slots=slots, steps=slots, state=state)) < 1500


@pytest.mark.parametrize("max_blocks", [1, 5, 1024, 1500])
def test_read_slots_equals_the_reference(max_blocks: int) -> None:
    rng = np.random.default_rng(max_blocks)
    num_slots = 7
    slots, seq_lens = [3, 0, 6, 2, 6], [*rng.integers(1, 4 * max_blocks + 1, 2), 0, 4 * max_blocks, 0]
    rows = np.array([slots, seq_lens, rng.integers(0, 999, 5), rng.integers(0, 999, 5)], np.int32)
    batch = {"rows": torch.from_numpy(rows), "last_tokens": torch.from_numpy(rng.integers(0, 999, num_slots))}
    tables = torch.from_numpy(rng.integers(0, 999, (num_slots, max_blocks)).astype(np.int32))
    results = []
    for module in (reference, sampling):
        space = torch.full((num_slots + 2, max_blocks), -1, dtype=torch.int32, device=DEVICE)
        space[1:-1] = tables
        inputs: dict[str, Any] = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
        results.append([*module.read_slots(**inputs, block_tables=space[1:-1], block_size=4), space])
    for found, expected in zip(results[1], results[0], strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    ids, positions, table, space = (t.cpu() for t in results[0])
    index, seq_len, position, last_block = batch["rows"].long()
    assert torch.equal(ids, batch["last_tokens"][index]) and (positions == position).all()
    wanted = tables.clone()
    for row in (0, 1, 3):
        wanted[index[row], (seq_len[row] - 1) // 4] = last_block[row]
    assert torch.equal(space[1:-1], wanted) and (space[[0, -1]] == -1).all()
    assert torch.equal(table, wanted[index])


def test_token_counts_never_reach_the_prompt_mask() -> None:
    assert PROMPT_MASK & COUNT_MASK == 0 and PROMPT_MASK | COUNT_MASK < 2**31
