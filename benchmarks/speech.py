"""The speech encoder on clips of ten seconds.

    python -m benchmarks.speech [--setting bf16|fp32] [--encoder DIR]

From WAV files (16 kHz noise) to embeddings of the 9B shape on the device, uncached. The default encoder has
wav2vec2-base's shape and random weights; the projector is random. speech-N: N clips in one pass. Medians.
"""

import argparse
import io
import json
import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from autoglm.audio.encoder import AudioEncoder
from autoglm.audio.projector import Projector, ProjectorConfig
from autoglm.audio.speech import Speech
from autoglm.config import AudioSection, load_config
from autoglm.device import choose_device
from autoglm.errors import RequestError
from autoglm.media.audio_file import AudioPart
from benchmarks import limits
from benchmarks.report import Row, make_parser, make_row, report
from benchmarks.vision import median_seconds

NUM_SAMPLES, RATE = 160_000, 16_000
BATCHES = (1, 16)
REPEATS = 20
EMBEDDING = 4096


def measure(
    encoder_path: Path, options: argparse.Namespace, num_samples: int = NUM_SAMPLES, repeats: int = REPEATS
) -> list[Row]:
    config = json.loads((encoder_path / "config.json").read_text(encoding="utf-8"))
    projector = ProjectorConfig(
        frames_per_token=5, input_size=config["hidden_size"], hidden_size=2048, output_size=EMBEDDING
    )
    audio = AudioSection(feature_cache_mb=0)
    device, _ = choose_device(load_config().model)
    dtype = torch.bfloat16 if options.setting == "bf16" else torch.float32
    with tempfile.TemporaryDirectory() as bridge:
        Projector(projector).save(bridge)
        speech = Speech.open(encoder_path, Path(bridge), EMBEDDING)
        assert speech is not None
        encoder = AudioEncoder(speech, audio, EMBEDDING, device, dtype)
    parts = [AudioPart(noise(num_samples), "audio") for _ in range(max(BATCHES))]

    def encode(batch: int) -> None:
        for encoded in encoder.encode([[speech.clip(part, "bridge", audio)] for part in parts[:batch]]):
            if isinstance(encoded, RequestError):
                raise encoded

    try:
        times = [median_seconds(partial(encode, batch), repeats) for batch in BATCHES]
    finally:
        encoder.close()
    rows = []
    for batch, seconds in zip(BATCHES, times, strict=True):
        work = encoder_work(config, num_samples, batch)
        limit = limits.milliseconds(work, options.machine, "bf16") if options.setting == "bf16" else math.nan
        rate = {"TFLOP/s": work.operations / seconds / 1e12}
        rows.append(make_row(options, f"speech-{batch}", 1e3 * seconds, "ms", limit, rate))
    return rows


def encoder_work(config: dict[str, Any], num_samples: int, batch: int) -> limits.Work:
    """The encoder on clips of `num_samples`, without the projector; `config` is its config.json."""
    operations, weights, channels, frames = 0, 0, 1, num_samples
    for size, kernel, stride in zip(config["conv_dim"], config["conv_kernel"], config["conv_stride"], strict=True):
        frames = (frames - kernel) // stride + 1
        weights += size * kernel * channels
        operations += 2 * frames * size * kernel * channels
        channels = size
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    positions = hidden * hidden // config["num_conv_pos_embedding_groups"] * config["num_conv_pos_embeddings"]
    rest = channels * hidden + positions + layers * (4 * hidden * hidden + 2 * hidden * config["intermediate_size"])
    operations += 2 * frames * rest + 4 * frames * frames * hidden * layers
    return limits.Work(2 * (weights + rest), bf16=batch * operations)


def noise(num_samples: int) -> bytes:
    """A WAV file."""
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng().uniform(-0.5, 0.5, num_samples), RATE, "PCM_16", format="WAV")
    return file.getvalue()


def write_base(directory: Path) -> None:
    """Write an encoder of wav2vec2-base's shape (the defaults of transformers) with random weights."""
    import transformers

    untyped: Any = transformers
    untyped.Wav2Vec2Model(untyped.Wav2Vec2Config()).save_pretrained(directory)
    untyped.Wav2Vec2FeatureExtractor().save_pretrained(directory)


def main() -> None:
    parser = make_parser(__doc__, ("bf16", "fp32"))
    parser.add_argument("--encoder", type=Path, help="its directory (default: wav2vec2-base's shape, random weights)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        if options.encoder is None:
            write_base(Path(directory))
        report(options, "speech", measure(options.encoder or Path(directory), options))


if __name__ == "__main__":
    main()
