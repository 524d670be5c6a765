"""The twins of the sampling kernels in plain PyTorch; `Kernels` says what they do."""

import torch

from autoglm.kernels.sampling_metadata import COUNT_MASK, Column

LARGEST = torch.finfo(torch.float32).max


def read_seats(
    seats: torch.Tensor,
    lengths: torch.Tensor,
    positions: torch.Tensor,
    blocks: torch.Tensor,
    tokens: torch.Tensor,
    tables: torch.Tensor,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    real = lengths > 0
    tables[seats[real], (lengths[real] - 1) // block_size] = blocks[real]
    return tokens[seats], positions.repeat(3, 1), tables[seats]


def sample(
    logits: torch.Tensor,
    seats: torch.Tensor,
    steps: torch.Tensor,
    records: torch.Tensor,
    marks: torch.Tensor,
    tokens: torch.Tensor,
    kept: torch.Tensor,
) -> torch.Tensor:
    deferred = records[seats, Column.DEFERRED] != 0
    kept[seats[deferred]] = logits[deferred]
    chosen = torch.full_like(seats, -1)
    now = ~deferred
    chosen[now] = _choose(logits[now], seats[now], steps[now], records, marks, tokens)
    return chosen


def sample_late(
    seats: torch.Tensor,
    steps: torch.Tensor,
    masks: torch.Tensor,
    records: torch.Tensor,
    marks: torch.Tensor,
    tokens: torch.Tensor,
    kept: torch.Tensor,
) -> torch.Tensor:
    vocab = kept.shape[1]
    bits = masks[:, :, None] >> torch.arange(32, dtype=torch.int32, device=masks.device)
    allowed = (bits & 1).flatten(1)[:, :vocab] != 0
    logits = kept[seats]
    logits = logits.where(allowed & ~logits.isnan(), -torch.inf)
    return _choose(logits, seats, steps, records, marks, tokens, allowed)


def _choose(
    logits: torch.Tensor,
    seats: torch.Tensor,
    steps: torch.Tensor,
    records: torch.Tensor,
    marks: torch.Tensor,
    tokens: torch.Tensor,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    wishes = records[seats]
    numbers = wishes.view(torch.float32)
    logits = penalise(logits, marks[seats], numbers)
    drawn = numbers[:, Column.TEMPERATURE] > 0
    logits = logits / numbers[:, Column.TEMPERATURE].where(drawn, 1)[:, None]
    if allowed is not None:  # stays above what is not, whatever its logit was
        logits = logits.where(~allowed, logits.clamp(-LARGEST, LARGEST))
    if drawn.any():
        scaled = logits[drawn]
        scaled = scaled.where(scaled >= lowest_kept(scaled, wishes[drawn]), -torch.inf)
        halves = wishes[drawn][:, [Column.SEED_LOW, Column.SEED_HIGH]]
        logits[drawn] = scaled + gumbel(halves, steps[drawn], logits.shape[1])
    chosen = logits.argmax(-1)
    tokens[seats] = chosen
    marks[seats, chosen] += 1
    return chosen.int()


def penalise(logits: torch.Tensor, marks: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Lower (or raise) the logits of tokens that have come before; all [n, ...]."""
    repetition = numbers[:, Column.REPETITION, None]
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(marks != 0, repeated, logits)
    counts = marks & COUNT_MASK
    penalty = counts * numbers[:, Column.FREQUENCY, None] + numbers[:, Column.PRESENCE, None]
    return torch.where(counts > 0, logits - penalty, logits)


def lowest_kept(scaled: torch.Tensor, wishes: torch.Tensor) -> torch.Tensor:
    """The lowest logit [n, 1] that min-p, top-k and top-p leave; equal ones go or stay together."""
    numbers = wishes.view(torch.float32)
    ordered = scaled.sort(-1, descending=True).values
    weights = (ordered - ordered[:, :1]).exp()
    places = torch.arange(ordered.shape[1], device=scaled.device)
    top_k = wishes[:, Column.TOP_K, None].long()
    last = (top_k - 1).clamp(0, ordered.shape[1] - 1)
    kept = (weights >= numbers[:, Column.MIN_P, None]) & ((top_k == 0) | (ordered >= ordered.gather(1, last)))
    weights = weights.where(kept, 0)
    # A token stays when those above it hold less than top_p of what is left; the first always does.
    above = weights.cumsum(-1) - weights
    inside = kept & ((above < numbers[:, Column.TOP_P, None] * weights.sum(-1, keepdim=True)) | (places == 0))
    return ordered.where(inside, torch.inf).amin(-1, keepdim=True)


def gumbel(halves: torch.Tensor, steps: torch.Tensor, vocab: int) -> torch.Tensor:
    """Noise fp32 [n, vocab]. halves: int32 [n, 2], the seeds; steps: int32 [n]"""
    counters = torch.arange(-(-vocab // 4), device=halves.device)
    low, high = (halves.long() & 0xFFFFFFFF).unsqueeze(-1).unbind(1)
    words = philox(counters, steps.long()[:, None], low, high)
    bits = torch.stack(words, -1).flatten(1)[:, :vocab]
    uniform = (bits.float() * 2.0**-32 + 2.0**-33).clamp(max=1 - 2.0**-24)
    # -log(1 - u), by its series where u is small: there the largest noise comes from.
    series = uniform * (1 + uniform * (0.5 + uniform / 3))
    return -torch.where(uniform < 0.01, series, -(1 - uniform).log()).log()


def philox(
    counter: torch.Tensor, step: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") of (counter, step, 0, 0).

    All int64 and of shapes that broadcast; the key is (low, high). Returns four words from 0 to 2**32 - 1.
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
    """High and low word of the product of two words. int64 overflows to the right bits."""
    product = x * factor
    return (product >> 32) & 0xFFFFFFFF, product & 0xFFFFFFFF
