"""Reference implementation of the sampling kernels; see `Kernels`."""

import torch

from autoglm.kernels.base import SamplingState
from autoglm.kernels.sampling_metadata import COUNT_MASK, Column

LARGEST = torch.finfo(torch.float32).max


def read_slots(
    *, rows: torch.Tensor, last_tokens: torch.Tensor, block_tables: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    slots, seq_lens, positions, last_blocks = rows[:4]
    used = seq_lens > 0
    block_tables[slots[used], (seq_lens[used] - 1) // block_size] = last_blocks[used]
    return last_tokens[slots], positions.repeat(3, 1), block_tables[slots]


def sample(*, logits: torch.Tensor, slots: torch.Tensor, steps: torch.Tensor, state: SamplingState) -> torch.Tensor:
    deferred = state.sampling_metadata[slots, Column.DEFERRED] != 0
    state.logits_buffer[slots[deferred]] = logits[deferred]
    sampled = torch.full_like(slots, -1)
    now = ~deferred
    sampled[now] = _sample(logits=logits[now], slots=slots[now], steps=steps[now], state=state)
    return sampled


def sample_deferred(
    *, slots: torch.Tensor, steps: torch.Tensor, masks: torch.Tensor, state: SamplingState
) -> torch.Tensor:
    vocab = state.logits_buffer.shape[1]
    bits = masks[:, :, None] >> torch.arange(32, dtype=torch.int32, device=masks.device)
    allowed = (bits & 1).flatten(1)[:, :vocab] != 0
    logits = state.logits_buffer[slots]
    logits = logits.where(allowed & ~logits.isnan(), -torch.inf)
    return _sample(logits=logits, slots=slots, steps=steps, state=state, allowed=allowed)


def _sample(
    *,
    logits: torch.Tensor,
    slots: torch.Tensor,
    steps: torch.Tensor,
    state: SamplingState,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    metadata = state.sampling_metadata[slots]
    floats = metadata.view(torch.float32)
    logits = apply_penalties(logits, state.output_token_counts[slots], floats)
    drawn = floats[:, Column.TEMPERATURE] > 0
    logits = logits / floats[:, Column.TEMPERATURE].where(drawn, 1)[:, None]
    if allowed is not None:  # allowed tokens stay above masked ones, whatever their logits are
        logits = logits.where(~allowed, logits.clamp(-LARGEST, LARGEST))
    if drawn.any():
        scaled = logits[drawn]
        scaled = scaled.where(scaled >= min_kept_logit(scaled, metadata[drawn]), -torch.inf)
        seeds = metadata[drawn][:, [Column.SEED_LOW, Column.SEED_HIGH]]
        logits[drawn] = scaled + gumbel(seeds, steps[drawn], logits.shape[1])
    sampled = logits.argmax(-1)
    state.last_tokens[slots] = sampled
    state.output_token_counts[slots, sampled] += 1
    return sampled.int()


def apply_penalties(logits: torch.Tensor, token_counts: torch.Tensor, floats: torch.Tensor) -> torch.Tensor:
    """Apply repetition, frequency and presence penalties; all [n, ...]."""
    repetition = floats[:, Column.REPETITION, None]
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(token_counts != 0, repeated, logits)
    counts = token_counts & COUNT_MASK
    penalty = counts * floats[:, Column.FREQUENCY, None] + floats[:, Column.PRESENCE, None]
    return torch.where(counts > 0, logits - penalty, logits)


def min_kept_logit(scaled: torch.Tensor, metadata: torch.Tensor) -> torch.Tensor:
    """The lowest logit [n, 1] kept by min-p, top-k and top-p; equal logits are kept or dropped together."""
    floats = metadata.view(torch.float32)
    ordered = scaled.sort(-1, descending=True).values
    weights = (ordered - ordered[:, :1]).exp()
    indices = torch.arange(ordered.shape[1], device=scaled.device)
    top_k = metadata[:, Column.TOP_K, None].long()
    last = (top_k - 1).clamp(0, ordered.shape[1] - 1)
    kept = (weights >= floats[:, Column.MIN_P, None]) & ((top_k == 0) | (ordered >= ordered.gather(1, last)))
    weights = weights.where(kept, 0)
    # A token is kept if those above it hold less than top_p of the remaining mass; the first always is.
    above = weights.cumsum(-1) - weights
    inside = kept & ((above < floats[:, Column.TOP_P, None] * weights.sum(-1, keepdim=True)) | (indices == 0))
    return ordered.where(inside, torch.inf).amin(-1, keepdim=True)


def gumbel(seeds: torch.Tensor, steps: torch.Tensor, vocab: int) -> torch.Tensor:
    """Gumbel noise, fp32 [n, vocab]. seeds: int32 [n, 2], low and high halves; steps: int32 [n]."""
    counters = torch.arange(-(-vocab // 4), device=seeds.device)
    low, high = (seeds.long() & 0xFFFFFFFF).unsqueeze(-1).unbind(1)
    words = philox(counter=counters, step=steps.long()[:, None], low=low, high=high)
    bits = torch.stack(words, -1).flatten(1)[:, :vocab]
    uniform = (bits.float() * 2.0**-32 + 2.0**-33).clamp(max=1 - 2.0**-24)
    # -log(1 - u), by its series where u is small, which yields the largest noise.
    series = uniform * (1 + uniform * (0.5 + uniform / 3))
    return -torch.where(uniform < 0.01, series, -(1 - uniform).log()).log()


def philox(
    *, counter: torch.Tensor, step: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") of (counter, step, 0, 0).

    All int64, broadcastable; the key is (low, high). Returns four words from 0 to 2**32 - 1.
    """
    c0, c1 = counter, step
    c2 = c3 = torch.zeros_like(counter)
    for _ in range(10):
        high_b, low_b = _multiply(0xCD9E8D57, c2)
        high_a, low_a = _multiply(0xD2511F53, c0)
        c0, c1, c2, c3 = high_b ^ c1 ^ low, low_b, high_a ^ c3 ^ high, low_a
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _multiply(factor: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of a product of two words. int64 overflow keeps the right bits."""
    product = x * factor
    return (product >> 32) & 0xFFFFFFFF, product & 0xFFFFFFFF
