"""Wav2Vec2 (Baevski et al. 2020): samples to frames of features, and frames to text by its CTC head.

The weights are read by transformers; the way through them is our own (`autoglm.audio.layers`): a batch of clips of
different length gives for each clip what it gives alone, nothing waits for the device, and the device does not wait for
the host for long. Two things would not be so with transformers':

- Checkpoints with a group norm (feat_extract_norm "group") take each channel's mean and variance over the whole clip,
  padding included, and were trained without padding: here the norm sees each clip's own frames.
- transformers leaves the attention mask out of such checkpoints, so that clips would look at the padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import remove_parametrizations

from autoglm.audio.checkpoint import SpeechCheckpoint
from autoglm.audio.layers import Convolution, EncoderLayer, PositionalConvolution
from autoglm.checkpoint import CheckpointError

EPSILON = 1e-7  # as transformers normalises


class Wav2Vec2:
    """The encoder of one directory, in evaluation mode.

    Args:
        model: transformers' Wav2Vec2Model.
        head: [hidden_size] -> logits of the vocabulary; None if the checkpoint has none.
        tokenizer: transformers' Wav2Vec2CTCTokenizer; needed with a head.
    """

    def __init__(self, checkpoint: SpeechCheckpoint, model: Any, head: nn.Module | None, tokenizer: Any) -> None:
        self.checkpoint = checkpoint
        config, extractor, encoder = model.config, model.feature_extractor, model.encoder
        self._norms_groups = config.feat_extract_norm == "group"
        self._norm_first = config.do_stable_layer_norm
        self._convolutions = [(Convolution(layer.conv), layer) for layer in extractor.conv_layers]
        self._projection = model.feature_projection
        self._positions = PositionalConvolution(encoder.pos_conv_embed)
        self._norm = encoder.layer_norm
        self._layers = [EncoderLayer(layer, self._norm_first) for layer in encoder.layers]
        self._head = head
        self._tokenizer = tokenizer
        weight: torch.Tensor = self._projection.projection.weight
        self.device, self.dtype = weight.device, weight.dtype

    @classmethod
    def load(cls, checkpoint: SpeechCheckpoint, device: torch.device, dtype: torch.dtype) -> Wav2Vec2:
        """Read the weights.

        Raises:
            CheckpointError: the files do not fit the model.
        """
        from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2ForCTC, Wav2Vec2Model  # seconds, and only needed here

        kind: Any = Wav2Vec2ForCTC if checkpoint.has_head else Wav2Vec2Model
        try:
            loaded, found = kind.from_pretrained(
                checkpoint.path,
                dtype=torch.float32,
                attn_implementation="sdpa",
                local_files_only=True,
                output_loading_info=True,
            )
            tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(checkpoint.path) if checkpoint.has_head else None
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{checkpoint.path}: {error}") from None
        # Only training masks spans of its input: old files lack what it puts there.
        missing = sorted(name for name in found["missing_keys"] if not name.endswith("masked_spec_embed"))
        if missing:
            raise CheckpointError(f"{checkpoint.path}: {len(missing)} tensors are missing, the first is {missing[0]}")
        model = loaded.wav2vec2 if checkpoint.has_head else loaded
        remove_parametrizations(model.encoder.pos_conv_embed.conv, "weight")  # weight norm: else computed in each pass
        loaded.eval().requires_grad_(False).to(device, dtype)
        head = loaded.lm_head if checkpoint.has_head else None
        return cls(checkpoint, model, head, tokenizer)

    def prepare(self, samples: npt.NDArray[np.float32]) -> torch.Tensor:
        """A clip as `encode` takes it: fp32 [samples] on the CPU, normalised if the checkpoint wants it."""
        if self.checkpoint.do_normalize:
            samples = (samples - samples.mean()) / np.sqrt(samples.var() + EPSILON)
        return torch.from_numpy(np.ascontiguousarray(samples, np.float32))

    @torch.inference_mode()
    def encode(self, clips: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Features of prepared clips, all in one pass.

        Args:
            clips: fp32 [samples] each, of at least `least_samples`.

        Returns:
            [frames, hidden_size] of each on the device, views of one tensor.
        """
        counts = [self.checkpoint.frames(len(clip)) for clip in clips]
        longest = max(counts)
        hidden, _ = self._projection(self._convolve(clips)[:, :longest])
        mask = None
        if min(counts) < longest:
            exists = self._send(torch.arange(longest)[None] < torch.tensor(counts)[:, None])  # [n, T]
            hidden = hidden.masked_fill(~exists[..., None], 0)  # as the convolution over positions pads a clip alone
            mask = torch.zeros_like(exists, dtype=self.dtype).masked_fill(~exists, float("-inf"))[:, None, None]
        hidden = hidden + self._positions(hidden)
        hidden = hidden if self._norm_first else self._norm(hidden)
        for layer in self._layers:
            hidden = layer(hidden, mask)
        hidden = self._norm(hidden) if self._norm_first else hidden
        return [row[:count] for row, count in zip(hidden, counts, strict=True)]

    @torch.inference_mode()
    def transcribe(self, features: Sequence[torch.Tensor]) -> list[str]:
        """The text of each clip, greedily: the likeliest letter of each frame, repetitions and blanks left out.

        Args:
            features: [frames, hidden_size] each, as `encode` returns them. Waits for the device.

        Raises:
            ValueError: the checkpoint has no CTC head.
        """
        if self._head is None:
            raise ValueError(f"{self.checkpoint.path} has no CTC head")
        letters = self._head(torch.cat(list(features))).argmax(-1).cpu()
        return [self._tokenizer.decode(ids) for ids in letters.split([len(clip) for clip in features])]

    def _convolve(self, clips: Sequence[torch.Tensor]) -> torch.Tensor:
        """[n, T, channels]; frames behind a clip's own are arbitrary, but finite."""
        step = math.prod(self.checkpoint.strides)
        length = -(-max(len(clip) for clip in clips) // step) * step  # all layers' frames begin anew with each clip
        samples = torch.zeros(len(clips), length)
        for row, clip in zip(samples, clips, strict=True):
            row[: len(clip)] = clip
        hidden = self._send(samples).to(self.dtype).view(-1, 1)
        for number, (convolve, layer) in enumerate(self._convolutions):
            hidden = convolve(hidden)
            if not self._norms_groups:
                hidden = layer.layer_norm(hidden)
            elif number == 0:
                for clip, rows in zip(clips, torch.split(hidden, length // convolve.stride), strict=True):
                    norm_channels(rows[: (len(clip) - convolve.kernel) // convolve.stride + 1], layer.layer_norm)
            hidden = layer.activation(hidden)
        frames = length // step
        return F.pad(hidden, (0, 0, 0, len(clips) * frames - len(hidden))).view(len(clips), frames, -1)

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


def norm_channels(rows: torch.Tensor, norm: nn.GroupNorm) -> None:
    """Bring each channel of one clip to zero mean and unit variance, in place, then scale and shift it as learnt."""
    values = rows.float()
    variance, mean = torch.var_mean(values, 0, correction=0)
    scale = (variance + norm.eps).rsqrt() * norm.weight
    rows.copy_(torch.addcmul(norm.bias - mean * scale, values, scale))
