"""How long the speech encoder takes for clips of ten seconds.

    python -m benchmarks.speech [--setting bf16|fp32] [--encoder DIR]

From the bytes of WAV files (16 kHz, noise) to embeddings of the 9B shape on the device; nothing is cached. The encoder
is that of a directory, by default one of wav2vec2-base's shape with random weights; the bridge is random. speech-N: N
clips together, in one pass. Medians.
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

from autoglm.audio.encoder import SpeechEncoder
from autoglm.audio.projector import Projector, ProjectorConfig
from autoglm.audio.speech import Speech
from autoglm.config import AudioSection, load_config
from autoglm.device import choose_device
from autoglm.errors import RequestError
from autoglm.media.audio_file import AudioPart
from benchmarks import limits
from benchmarks.report import Row, make_parser, make_row, report
from benchmarks.vision import seconds

SAMPLES, RATE = 160_000, 16_000
AT_ONCE = (1, 16)
REPEATS = 20
EMBEDDING, BRIDGE, FRAMES_PER_TOKEN = 4096, 2048, 5


def measure(encoder: Path, options: argparse.Namespace, samples: int = SAMPLES, repeats: int = REPEATS) -> list[Row]:
    """speech-N of an encoder's directory, for clips of so many samples."""
    shape = json.loads((encoder / "config.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as bridge:
        Projector(ProjectorConfig(FRAMES_PER_TOKEN, shape["hidden_size"], BRIDGE, EMBEDDING)).save(bridge)
        speech = Speech.open(encoder, Path(bridge), EMBEDDING)
        assert speech is not None
        device, _ = choose_device(load_config().model)
        dtype = torch.bfloat16 if options.setting == "bf16" else torch.float32
        config = AudioSection(feature_cache_mb=0)
        server = SpeechEncoder(speech, config, EMBEDDING, device, dtype)
    parts = [AudioPart(noise(samples), "audio") for _ in range(max(AT_ONCE))]

    def encode(count: int) -> None:
        for heard in server.encode([[speech.clip(part, "bridge", config)] for part in parts[:count]]):
            if isinstance(heard, RequestError):
                raise heard

    try:
        times = [seconds(partial(encode, count), repeats) for count in AT_ONCE]
    finally:
        server.close()
    rows = []
    for count, time in zip(AT_ONCE, times, strict=True):
        work = hear(shape, samples, count)
        least = limits.milliseconds(work, options.machine, "bf16") if options.setting == "bf16" else math.nan
        rate = {"TFLOP/s": work.operations / time / 1e12}
        rows.append(make_row(options, f"speech-{count}", 1e3 * time, "ms", least, rate))
    return rows


def hear(shape: dict[str, Any], samples: int, clips: int) -> limits.Work:
    """The encoder over clips of so many samples; `shape` is its config.json. The bridge is not counted."""
    operations, weights, channels, frames = 0, 0, 1, samples
    for size, kernel, stride in zip(shape["conv_dim"], shape["conv_kernel"], shape["conv_stride"], strict=True):
        frames = (frames - kernel) // stride + 1
        weights += size * kernel * channels
        operations += 2 * frames * size * kernel * channels
        channels = size
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    positions = hidden * hidden // shape["num_conv_pos_embedding_groups"] * shape["num_conv_pos_embeddings"]
    rest = channels * hidden + positions + layers * (4 * hidden * hidden + 2 * hidden * shape["intermediate_size"])
    operations += 2 * frames * rest + 4 * frames * frames * hidden * layers
    return limits.Work(2 * (weights + rest), bf16=clips * operations)


def noise(samples: int) -> bytes:
    """A WAV file."""
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng().uniform(-0.5, 0.5, samples), RATE, "PCM_16", format="WAV")
    return file.getvalue()


def write_base(directory: Path) -> None:
    """An encoder of wav2vec2-base's shape, which transformers' defaults are, with random weights."""
    import transformers

    untyped: Any = transformers
    untyped.Wav2Vec2Model(untyped.Wav2Vec2Config()).save_pretrained(directory)
    untyped.Wav2Vec2FeatureExtractor().save_pretrained(directory)


def main() -> None:
    parser = make_parser(__doc__, ("bf16", "fp32"))
    parser.add_argument("--encoder", type=Path, help="a directory (default: wav2vec2-base's shape, random weights)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        if options.encoder is None:
            write_base(Path(directory))
        report(options, "speech", measure(options.encoder or Path(directory), options))


if __name__ == "__main__":
    main()
