"""Wav2Vec2 (Baevski et al. 2020): samples to frames of features, and frames to text by its CTC head.

transformers reads the weights; the forward pass is our own (`autoglm.audio.layers`). In a batch of clips of different
lengths each clip gets the same features as alone, and `encode` never synchronises with the device. transformers'
forward pass differs for checkpoints with a group norm (feat_extract_norm "group"), which were trained without padding:

- It computes each channel's mean and variance over the whole row, padding included; here over the clip's own frames.
- It applies no attention mask, so clips would attend to padding.
"""

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

EPSILON = 1e-7  # of transformers' normalisation


class Wav2Vec2:
    """The encoder of one directory, in evaluation mode.

    Args:
        model: transformers' Wav2Vec2Model.
        head: [hidden_size] -> logits of the vocabulary, or None.
        tokenizer: transformers' Wav2Vec2CTCTokenizer; required with a head.
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
    def load(cls, checkpoint: SpeechCheckpoint, device: torch.device, dtype: torch.dtype) -> "Wav2Vec2":
        """Load the weights.

        Raises:
            CheckpointError: the files do not match the model.
        """
        from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2ForCTC, Wav2Vec2Model  # takes seconds

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
        except Exception as error:  # transformers raises a dozen types
            files = ", ".join(sorted(path.name for path in checkpoint.path.iterdir()))
            accepted = f"a valid checkpoint of {kind.__name__}" + (" with its tokenizer" if checkpoint.has_head else "")
            raise CheckpointError(f"{checkpoint.path} must contain {accepted} (got {files})") from error
        # The embedding of masked spans is only used in training; old files lack it.
        missing = sorted(name for name in found["missing_keys"] if not name.endswith("masked_spec_embed"))
        if missing:
            raise CheckpointError(f"{checkpoint.path}: {len(missing)} tensors are missing, the first is {missing[0]}")
        model = loaded.wav2vec2 if checkpoint.has_head else loaded
        remove_parametrizations(model.encoder.pos_conv_embed.conv, "weight")  # fold the weight norm
        loaded.eval().requires_grad_(False).to(device, dtype)
        head = loaded.lm_head if checkpoint.has_head else None
        return cls(checkpoint, model, head, tokenizer)

    def prepare(self, samples: npt.NDArray[np.float32]) -> torch.Tensor:
        """The input of `encode` for a clip: fp32 [samples] on the CPU, normalised if the checkpoint requires it."""
        if self.checkpoint.do_normalize:
            samples = (samples - samples.mean()) / np.sqrt(samples.var() + EPSILON)
        return torch.from_numpy(np.ascontiguousarray(samples, np.float32))

    @torch.inference_mode()
    def encode(self, clips: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Encode prepared clips in one pass.

        Args:
            clips: fp32 [samples] each, at least `least_samples` long.

        Returns:
            [frames, hidden_size] of each on the device, views of one tensor.
        """
        counts = [self.checkpoint.frames(len(clip)) for clip in clips]
        longest = max(counts)
        hidden, _ = self._projection(self._convolve(clips)[:, :longest])
        mask = None
        if min(counts) < longest:
            padding = self._send(torch.arange(longest)[None] >= torch.tensor(counts)[:, None])  # [n, T]
            hidden = hidden.masked_fill(padding[..., None], 0)  # the zero padding of the positional convolution
            mask = torch.zeros_like(padding, dtype=self.dtype).masked_fill(padding, float("-inf"))[:, None, None]
        hidden = hidden + self._positions(hidden)
        hidden = hidden if self._norm_first else self._norm(hidden)
        for layer in self._layers:
            hidden = layer(hidden, mask)
        hidden = self._norm(hidden) if self._norm_first else hidden
        return [row[:count] for row, count in zip(hidden, counts, strict=True)]

    @torch.inference_mode()
    def transcribe(self, features: Sequence[torch.Tensor]) -> list[str]:
        """Decode each clip greedily: the likeliest letter of each frame, without repetitions and blanks.

        Synchronises with the device.

        Args:
            features: [frames, hidden_size] each, from `encode`.

        Raises:
            ValueError: the checkpoint has no CTC head.
        """
        if self._head is None:
            raise ValueError(f"{self.checkpoint.path} has no CTC head")
        letters = self._head(torch.cat(list(features))).argmax(-1).cpu()
        return [self._tokenizer.decode(ids) for ids in letters.split([len(clip) for clip in features])]

    def _convolve(self, clips: Sequence[torch.Tensor]) -> torch.Tensor:
        """[n, T, channels]; frames past the end of a clip are arbitrary but finite."""
        step = math.prod(self.checkpoint.strides)
        length = -(-max(len(clip) for clip in clips) // step) * step  # clips start at a frame boundary of every layer
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
    """Apply a group norm with one group per channel to one clip, in place."""
    values = rows.float()
    variance, mean = torch.var_mean(values, 0, correction=0)
    scale = (variance + norm.eps).rsqrt() * norm.weight
    rows.copy_(torch.addcmul(norm.bias - mean * scale, values, scale))
