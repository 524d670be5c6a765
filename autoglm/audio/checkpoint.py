"""Reads the configuration of a Wav2Vec2 checkpoint, without transformers, which is slow to import."""

from dataclasses import dataclass
from pathlib import Path

from autoglm.checkpoint import CheckpointError, read_json
from autoglm.errors import shorten

BASE_KERNELS = (10, 3, 3, 3, 3, 2, 2)
BASE_STRIDES = (5, 2, 2, 2, 2, 2, 2)


@dataclass(frozen=True, kw_only=True)
class SpeechCheckpoint:
    """The configuration of a Wav2Vec2 directory. `autoglm.audio.wav2vec2` reads its tensors.

    kernels, strides: of the convolutions that turn samples into frames.
    do_normalize: clips are normalised to zero mean and unit variance.
    has_head: there is a CTC head for transcripts.
    """

    path: Path
    hidden_size: int
    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    sampling_rate: int
    do_normalize: bool
    has_head: bool

    @classmethod
    def open(cls, directory: str | Path) -> "SpeechCheckpoint":
        """Read the configuration of an encoder's directory.

        Raises:
            CheckpointError: a file or key is missing, or the model has another architecture.
        """
        path = Path(directory)
        config = read_json(path / "config.json")
        if (kind := config.get("model_type")) != "wav2vec2":
            raise CheckpointError(f"{path}/config.json: model_type must be wav2vec2 (got {shorten(kind)})")
        if config.get("add_adapter"):
            raise CheckpointError(f"{path}/config.json: add_adapter must be false (got true)")
        kernels = tuple(config.get("conv_kernel", BASE_KERNELS))
        strides = tuple(config.get("conv_stride", BASE_STRIDES))
        if len(kernels) != len(strides):
            raise CheckpointError(
                f"{path}/config.json: conv_stride must be as long as conv_kernel, {len(kernels)} (got {len(strides)})"
            )
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
        """The weight files."""
        return sorted((*self.path.glob("*.safetensors"), *self.path.glob("pytorch_model*.bin")))

    @property
    def least_samples(self) -> int:
        """Samples of the shortest clip, which has one frame."""
        samples = 1
        for kernel, stride in zip(reversed(self.kernels), reversed(self.strides), strict=True):
            samples = (samples - 1) * stride + kernel
        return samples

    def frames(self, samples: int) -> int:
        """Number of frames of a clip; 0 if it is too short."""
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            samples = max(0, (samples - kernel) // stride + 1)
        return samples
