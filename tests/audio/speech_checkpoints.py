"""Small random speech encoders and projectors as Hugging Face directories, and audio clips."""

import io
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import soundfile
import torch

from autoglm.audio.projector import Projector, ProjectorConfig

LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVKJXQZ'"]
HIDDEN = 32


def write_encoder(
    directory: Path, norm: Literal["group", "layer"], seed: int = 0, head: bool = True, adapters: int | None = None
) -> Path:
    """A Wav2Vec2 like the base ("group") or the large ("layer") checkpoints, with the real strides.

    adapters: size of the adapters in its layers, if it has any.
    """
    import transformers

    untyped: Any = transformers
    large = norm == "layer"
    config = untyped.Wav2Vec2Config(
        vocab_size=len(LETTERS),
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=[16] * 7,
        conv_bias=large,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        feat_extract_norm=norm,
        do_stable_layer_norm=large,
        pad_token_id=0,
        adapter_attn_dim=adapters,
    )
    torch.manual_seed(seed)
    model = (untyped.Wav2Vec2ForCTC if head else untyped.Wav2Vec2Model)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "lm_head.weight":
                parameter.normal_()  # so that letters differ
            elif "layer_norm" in name:
                parameter.add_(torch.randn_like(parameter) / 4)
    model.save_pretrained(directory)
    (directory / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(LETTERS)}))
    untyped.Wav2Vec2CTCTokenizer(str(directory / "vocab.json")).save_pretrained(directory)
    untyped.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=large).save_pretrained(directory)
    return directory


def write_projector(directory: Path, output_size: int, frames_per_token: int = 5, norm: bool = False) -> Path:
    torch.manual_seed(1)
    config = ProjectorConfig(
        frames_per_token=frames_per_token, input_size=HIDDEN, hidden_size=48, output_size=output_size
    )
    Projector(config, norm).save(directory)
    return directory


def sound_file(samples: npt.NDArray[np.float32], rate: int = 16000, format: str = "WAV", **options: Any) -> bytes:
    """An encoded audio file; samples [n] or [n, channels]."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, **options)
    return file.getvalue()


def tone(seconds: float, rate: int = 16000, pitch: float = 220.0, seed: int = 0) -> npt.NDArray[np.float32]:
    """fp32 [samples]: a tone of rising pitch with noise."""
    times = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.05, len(times))
    return (0.3 * np.sin(2 * np.pi * pitch * times * (1 + times / 4)) + noise).astype(np.float32)
