"""Wav2Vec2 (Baevski et al. 2020): samples to frames of features, and frames to text by its CTC head.

The modules are transformers'; the way through them is our own, so that a batch of clips of different length gives for
each clip what it gives alone, and nothing waits for the device. Two things would not be so with transformers':

- Checkpoints with a group norm (feat_extract_norm "group") take each channel's mean and variance over the whole clip,
  padding included, and were trained without padding: here the norm sees each clip's own frames.
- transformers leaves the attention mask out of such checkpoints, so that clips would look at the padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.utils.parametrize import remove_parametrizations

from autoglm.audio.checkpoint import SpeechCheckpoint
from autoglm.checkpoint import CheckpointError

EPSILON = 1e-7  # as transformers normalises


class Wav2Vec2:
    """The encoder of one directory, in evaluation mode.

    Args:
        model: transformers' Wav2Vec2Model.
        head: [hidden_size] -> logits of the vocabulary; None if the checkpoint has none.
        tokenizer: transformers' Wav2Vec2CTCTokenizer; needed with a head.
        pad_to: batches are padded to multiples of so many samples. A GPU's convolutions are prepared for each length
            anew, which takes longer than computing them: few lengths keep that rare.
    """

    def __init__(
        self, checkpoint: SpeechCheckpoint, model: Any, head: nn.Module | None, tokenizer: Any, pad_to: int = 1
    ) -> None:
        self.checkpoint = checkpoint
        self.pad_to = pad_to
        self._model = model
        self._head = head
        self._tokenizer = tokenizer
        weight: torch.Tensor = model.feature_projection.projection.weight
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
        half_second = checkpoint.sampling_rate // 2
        return cls(checkpoint, model, head, tokenizer, half_second if device.type == "cuda" else 1)

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
        hidden = self._convolve(clips).transpose(1, 2)
        counts = [self.checkpoint.frames(len(clip)) for clip in clips]
        exists = torch.arange(hidden.shape[1])[None] < torch.tensor(counts)[:, None]  # [n, T]
        exists = self._send(exists)
        hidden, _ = self._model.feature_projection(hidden)
        hidden = hidden.masked_fill(~exists[..., None], 0)  # as the convolution over positions pads a clip alone
        encoder = self._model.encoder
        hidden = hidden + encoder.pos_conv_embed(hidden)
        norm_first = self._model.config.do_stable_layer_norm
        hidden = hidden if norm_first else encoder.layer_norm(hidden)
        for layer in encoder.layers:
            hidden = layer(hidden, attention_mask=exists[:, None, None])
        hidden = encoder.layer_norm(hidden) if norm_first else hidden
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
        """[n, channels, T]; frames behind a clip's own are arbitrary, but finite."""
        longest = max(len(clip) for clip in clips)
        samples = torch.zeros(len(clips), -(-longest // self.pad_to) * self.pad_to)
        for row, clip in zip(samples, clips, strict=True):
            row[: len(clip)] = clip
        hidden: torch.Tensor = self._send(samples).to(self.dtype)[:, None]
        first, *others = self._model.feature_extractor.conv_layers
        if self._model.config.feat_extract_norm == "group":
            hidden = first.conv(hidden)
            kernel, stride = self.checkpoint.kernels[0], self.checkpoint.strides[0]
            for row, clip in zip(hidden, clips, strict=True):
                own = row[None, :, : (len(clip) - kernel) // stride + 1]
                own.copy_(first.layer_norm(own))
            hidden = first.activation(hidden)
        else:
            hidden = first(hidden)
        for layer in others:
            hidden = layer(hidden)
        return hidden

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)
