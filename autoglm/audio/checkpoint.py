"""Reading the configuration of a Hugging Face directory of Wav2Vec2, without transformers, which is slow to import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autoglm.checkpoint import CheckpointError, read_json

BASE_KERNELS = (10, 3, 3, 3, 3, 2, 2)
BASE_STRIDES = (5, 2, 2, 2, 2, 2, 2)


@dataclass(frozen=True)
class SpeechCheckpoint:
    """A directory of Wav2Vec2; `open` reads its JSON files. Its tensors are the business of `autoglm.audio.wav2vec2`.

    `kernels` and `strides` are those of the convolutions that make frames of samples; `has_head` tells whether frames
    can be read as letters; `do_normalize`, whether each clip is brought to zero mean and unit variance.
    """

    path: Path
    hidden_size: int
    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    sampling_rate: int
    do_normalize: bool
    has_head: bool

    @classmethod
    def open(cls, directory: str | Path) -> SpeechCheckpoint:
        """Read the configuration of an encoder's directory.

        Raises:
            CheckpointError: a file or key is missing, or the model is of another kind.
        """
        path = Path(directory)
        config = read_json(path / "config.json")
        kind = config.get("model_type")
        if kind != "wav2vec2":
            raise CheckpointError(f"{path}/config.json: model_type is {kind!r}, supported is 'wav2vec2'")
        if config.get("add_adapter"):
            raise CheckpointError(f"{path}/config.json: add_adapter is true, supported are encoders without an adapter")
        kernels = tuple(config.get("conv_kernel", BASE_KERNELS))
        strides = tuple(config.get("conv_stride", BASE_STRIDES))
        if len(kernels) != len(strides):
            raise CheckpointError(f"{path}/config.json: {len(kernels)} conv_kernel for {len(strides)} conv_stride")
        extractor = read_json(path / "preprocessor_config.json")
        return cls(
            path=path,
            hidden_size=int(config.get("hidden_size", 768)),
            kernels=kernels,
            strides=strides,
            sampling_rate=int(extractor.get("sampling_rate", 16000)),
            do_normalize=bool(extractor.get("do_normalize", True)),
            has_head=any(name.endswith("ForCTC") for name in config.get("architectures") or ()),
        )

    @property
    def files(self) -> list[Path]:
        """Those that hold its weights."""
        return sorted((*self.path.glob("*.safetensors"), *self.path.glob("pytorch_model*.bin")))

    @property
    def least_samples(self) -> int:
        """Samples of the shortest clip, which makes one frame."""
        samples = 1
        for kernel, stride in zip(reversed(self.kernels), reversed(self.strides), strict=True):
            samples = (samples - 1) * stride + kernel
        return samples

    def frames(self, samples: int) -> int:
        """Frames that a clip of so many samples makes; 0 if it is too short."""
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            samples = max(0, (samples - kernel) // stride + 1)
        return samples
