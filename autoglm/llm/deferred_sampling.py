"""Sampling deferred until the grammar mask is known, which depends on the previous token.

The pass leaves the logits of such rows in their slots. While it runs, the host receives the tokens of the previous
pass, advances the grammars and computes the masks; sampling is then launched after the pass and before the next one.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from autoglm.kernels.base import Kernels
from autoglm.llm.request_slots import RequestSlots
from autoglm.llm.scheduler import Chunk
from autoglm.llm.sequence import Sequence, TokenLogprob
from autoglm.llm.transfer import DeviceResult, Int32Array, send, stage
from autoglm.preprocess.sampling_params import MAX_LOGPROBS

SampledToken: TypeAlias = tuple[Sequence, int, TokenLogprob | None]


@dataclass(frozen=True)
class LogprobResult:
    """The log probabilities of the sampled tokens of some rows, and of the likeliest ones."""

    rows: list[int]
    values: DeviceResult  # fp32 [n, 1 + MAX_LOGPROBS], the sampled token first
    ids: DeviceResult  # int64 [n, MAX_LOGPROBS]


@dataclass(frozen=True)
class DeferredTokens:
    """Tokens being copied from the device, one for each sequence."""

    sequences: list[Sequence]
    tokens: DeviceResult
    logprobs: LogprobResult | None

    def wait(self) -> list[SampledToken]:
        tokens = self.tokens.wait().tolist()
        found: dict[int, TokenLogprob] = {}
        if self.logprobs is not None:
            values, ids = self.logprobs.values.wait().tolist(), self.logprobs.ids.wait().tolist()
            for row, (own, *others), names in zip(self.logprobs.rows, values, ids, strict=True):
                top = list(zip(names, others, strict=True))[: self.sequences[row].request.sampling_params.logprobs]
                found[row] = TokenLogprob(tokens[row], own, top)
        return [(sequence, tokens[row], found.get(row)) for row, sequence in enumerate(self.sequences)]


def sample_deferred(kernels: Kernels, slots: RequestSlots, chunks: Seq[Chunk], masks: Int32Array) -> DeferredTokens:
    """Launch the sampling of deferred rows of the most recent pass. Does not block.

    Args:
        chunks: the rows' chunks; their sequences still have their slots.
        masks: int32 [n, words], the allowed tokens, see `Kernels.sample_deferred`.
    """
    device = slots.device
    sequences = [chunk.sequence for chunk in chunks]
    rows = [row for row, each in enumerate(sequences) if each.request.sampling_params.logprobs is not None]
    steps = [chunk.end - chunk.sequence.prompt_length for chunk in chunks]
    arrays = [np.array(array, np.int32) for array in ([sequence.slot for sequence in sequences], steps, rows)]
    slot_ids, step_ids, wanted = send(arrays, device)
    allowed = stage(masks, device).to(device, non_blocking=True)
    wanted = wanted.long()
    logs = None
    if rows:  # before sampling changes the logits
        logs = slots.state.logits_buffer.index_select(0, slot_ids.long().index_select(0, wanted)).log_softmax(-1)
    tokens = kernels.sample_deferred(slots=slot_ids, steps=step_ids, masks=allowed, state=slots.state)
    if logs is None:
        return DeferredTokens(sequences, DeviceResult(tokens), None)
    own = logs.gather(1, tokens.long().index_select(0, wanted)[:, None])
    values, ids = logs.topk(MAX_LOGPROBS)
    logprobs = LogprobResult(rows, DeviceResult(torch.cat((own, values), 1)), DeviceResult(ids))
    return DeferredTokens(sequences, DeviceResult(tokens), logprobs)
