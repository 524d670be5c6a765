"""The speech encoder and the bridge: their configuration, their initial weights, and their export.

A Wav2Vec2 with three wide convolutions instead of seven narrow ones. The first one, 16 ms long, is initialized as a
bank of band-pass filters, which training then need not discover. There are 50 frames per second, as usual.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from autoglm.audio.projector import Projector, ProjectorConfig
from demo.speech.commands import names, wording_words
from demo.speech.rooms import ClipBatch
from demo.speech.voices import RATE

PAD, SPACE, UNKNOWN = "<pad>", "|", "<unk>"
FRAMES_PER_TOKEN = 5
FILTER_GAIN = 0.1  # scale of the first filters' outputs; their layer norm adds 1e-5 to the variance


def _ctc_labels() -> list[str]:
    """The English words and Chinese characters of all commands, in a fixed order."""
    words = {word for text in (*wording_words("en"), *names("en")) for word in text.split()}
    characters = set("".join((*wording_words("zh"), *names("zh"))))
    return [PAD, SPACE, UNKNOWN, *sorted(words), *sorted(characters)]


CTC_LABELS = _ctc_labels()
Network = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # as SpeechModel.forward


@dataclass(frozen=True)
class SpeechOutput:
    """Outputs for a batch of clips."""

    logits: torch.Tensor  # of CTC_LABELS, [B, T, labels]
    num_frames: torch.Tensor  # of each clip, [B] on the CPU
    embeddings: torch.Tensor  # of the bridge, [B, S, output_size]
    num_embeddings: torch.Tensor  # of each clip, [B] on the CPU


class UnfoldedConv1d(nn.Conv1d):
    """A convolution as one matrix product of all windows; with cuDNN it would take longer than all other layers."""

    def forward(self, signal: torch.Tensor) -> torch.Tensor:
        """[B, in, T] -> [B, out, (T - kernel) // stride + 1]"""
        (kernel,), (stride,) = self.kernel_size, self.stride
        windows = signal.transpose(1, 2).unfold(1, kernel, stride).transpose(2, 3).flatten(2)
        return F.linear(windows, self.weight.transpose(1, 2).flatten(1), self.bias).transpose(1, 2)


class SpeechModel(nn.Module):
    """transformers' Wav2Vec2ForCTC, and the projector to the language model's embeddings."""

    def __init__(self, output_size: int) -> None:
        super().__init__()
        from transformers import Wav2Vec2Config, Wav2Vec2ForCTC  # slow to import

        config = Wav2Vec2Config(
            vocab_size=len(CTC_LABELS),
            hidden_size=256,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=768,
            conv_dim=(192, 256, 256),
            conv_kernel=(256, 8, 4),
            conv_stride=(40, 4, 2),
            conv_bias=True,
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
            num_conv_pos_embeddings=32,
            num_conv_pos_embedding_groups=8,
            hidden_dropout=0.1,
            attention_dropout=0.0,
            activation_dropout=0.0,
            feat_proj_dropout=0.0,
            final_dropout=0.0,
            layerdrop=0.0,
            apply_spec_augment=False,
            ctc_loss_reduction="mean",
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
        encoder: Any = Wav2Vec2ForCTC(config)
        self.encoder = encoder
        self.projector = Projector(
            ProjectorConfig(frames_per_token=FRAMES_PER_TOKEN, input_size=256, hidden_size=512, output_size=output_size)
        )
        for layer in encoder.wav2vec2.feature_extractor.conv_layers:
            conv = layer.conv
            layer.conv = UnfoldedConv1d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride)
        first = encoder.wav2vec2.feature_extractor.conv_layers[0].conv
        with torch.no_grad():
            first.weight.copy_(band_filters(first.weight.shape[0], first.weight.shape[-1])[:, None])
            first.bias.zero_()

    def forward(self, samples: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of CTC_LABELS [B, T, labels] and embeddings [B, S, output_size].

        Args:
            samples: [B, samples].
            mask: bool [B, T], False for padding.
        """
        wav2vec2 = self.encoder.wav2vec2
        signal = samples[:, None]
        for layer in wav2vec2.feature_extractor.conv_layers:
            signal = layer(signal)
        hidden, _ = wav2vec2.feature_projection(signal.transpose(1, 2))
        hidden = hidden * mask[..., None]
        hidden = wav2vec2.encoder.dropout(hidden + wav2vec2.encoder.pos_conv_embed(hidden))
        for layer in wav2vec2.encoder.layers:
            hidden = layer(hidden, attention_mask=mask[:, None, None])
        hidden = wav2vec2.encoder.layer_norm(hidden)
        padded = F.pad(hidden * mask[..., None], (0, 0, 0, -hidden.shape[1] % FRAMES_PER_TOKEN))
        embeddings = self.projector([padded.flatten(0, 1)])[0].unflatten(0, (len(padded), -1))
        return self.encoder.lm_head(hidden), embeddings

    def encode(self, batch: ClipBatch, network: Network | None = None) -> SpeechOutput:
        """Encode clips; `network` replaces `forward`, such as by its CUDA graphs."""
        samples = batch.samples
        most, num_frames = map(self.encoder._get_feat_extract_output_lengths, (samples.shape[1], batch.lengths))
        mask = torch.arange(int(most))[None] < num_frames[:, None]
        logits, embeddings = (network or self)(samples, mask.to(samples.device, non_blocking=True))
        return SpeechOutput(logits, num_frames, embeddings, (num_frames + FRAMES_PER_TOKEN - 1) // FRAMES_PER_TOKEN)


def band_filters(count: int, length: int) -> torch.Tensor:
    """Band-pass filters [count, length] on the mel scale: windowed waves in four phases per band, so that the sum of
    their activations is the band's loudness."""
    low, high = (2595 * math.log10(1 + hertz / 700) for hertz in (80, 7600))
    mels = torch.linspace(low, high, count // 4)
    hertz = 700 * (10 ** (mels / 2595) - 1)
    phases = torch.arange(4) * math.pi / 2
    time = (torch.arange(length) - length / 2) / RATE
    angles = 2 * math.pi * hertz[:, None, None] * time + phases[:, None]
    return (angles.cos() * torch.hann_window(length)).flatten(0, 1) * (FILTER_GAIN / math.sqrt(length))


def resume(model: SpeechModel, out: Path) -> None:
    """Load the weights that `export` wrote, for further training."""
    for part, name in ((model.encoder, "encoder"), (model.projector, "bridge")):
        part.load_state_dict(load_file(out / name / "model.safetensors"))


def export(model: SpeechModel, out: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write out/encoder and out/bridge for the server."""
    model = model.cpu().eval()
    encoder, bridge = out / "encoder", out / "bridge"
    encoder.mkdir(parents=True, exist_ok=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(dtype)
    model.encoder.save_pretrained(encoder)
    model.projector.save(bridge)
    model.float().load_state_dict(before)
    files: dict[str, dict[str, Any]] = {
        "vocab.json": {label: index for index, label in enumerate(CTC_LABELS)},
        "tokenizer_config.json": {
            "tokenizer_class": "Wav2Vec2CTCTokenizer",
            "pad_token": PAD,
            "unk_token": UNKNOWN,
            "word_delimiter_token": SPACE,
            "bos_token": None,
            "eos_token": None,
            "do_lower_case": False,
            "clean_up_tokenization_spaces": False,
        },
        "preprocessor_config.json": {
            "feature_extractor_type": "Wav2Vec2FeatureExtractor",
            "feature_size": 1,
            "sampling_rate": RATE,
            "padding_value": 0.0,
            "do_normalize": True,
            "return_attention_mask": True,
        },
    }
    for name, content in files.items():
        (encoder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
