"""A server's speech encoder and projector, and the two modes of audio in prompts.

- `transcript`: the clip is replaced by its text, decoded by the encoder's CTC head. One placeholder token represents
  the clip until the text is known. Works with any language model.
- `bridge`: the projector turns the clip's frames into embeddings, which replace as many placeholder tokens; their
  positions are those of text. Needs a projector trained for the language model.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from autoglm.audio.checkpoint import SpeechCheckpoint
from autoglm.audio.projector import WEIGHTS, ProjectorConfig
from autoglm.checkpoint import CheckpointError
from autoglm.config import AudioMode, AudioSection, ConfigError
from autoglm.errors import RequestError, Verbatim, invalid
from autoglm.media.audio_file import AudioFile, AudioPart, media_hash, read_audio
from autoglm.weights.cache import CacheKey


@dataclass(frozen=True)
class Speech:
    """The configurations of an encoder and its optional projector.

    bridge: the projector's directory.
    digest: identifies both with their weights.
    """

    encoder: SpeechCheckpoint
    projector: ProjectorConfig | None
    bridge: Path | None
    digest: str

    @classmethod
    def open(cls, encoder: Path | None, bridge: Path | None, hidden_size: int) -> "Speech | None":
        """Read the JSON files of both directories; None without an encoder.

        Args:
            hidden_size: of the language model.

        Raises:
            ConfigError: there is a projector but no encoder.
            CheckpointError: a directory is invalid, or the sizes of the models do not match.
        """
        if encoder is None:
            if bridge is not None:
                raise ConfigError("AUTOGLM_BRIDGE needs AUTOGLM_SPEECH, the directory of the projector's encoder")
            return None
        checkpoint = SpeechCheckpoint.open(encoder)
        projector = None if bridge is None else ProjectorConfig.open(bridge)
        if projector is not None:
            sizes, expected = (projector.input_size, projector.output_size), (checkpoint.hidden_size, hidden_size)
            if sizes != expected:
                raise CheckpointError(
                    f"{bridge}/config.json: input_size and output_size must be {expected}, the hidden sizes of the "
                    f"encoder and the language model (got {sizes})"
                )
        settings = {"model": "speech", "bridge": bridge and CacheKey.of(bridge, (bridge / WEIGHTS,), {}).digest}
        settings |= {path.name: _digest(path) for path in sorted(checkpoint.path.glob("*.json"))}
        digest = CacheKey.of(checkpoint.path, tuple(checkpoint.files), settings).digest
        return cls(checkpoint, projector, bridge, digest)

    def clip(self, part: AudioPart, mode: AudioMode, limits: AudioSection) -> AudioFile:
        """The encoder's input for a clip of a request. Its header is checked; its samples are not decoded.

        Raises:
            RequestError: the file is not accepted, or this server does not support the mode.
        """
        self.check(mode, part.name)
        info = read_audio(part.data, limits, part.name)
        rate = self.encoder.sampling_rate
        frames = self.encoder.frames(info.resampled(rate))
        if frames < 1:
            got = Verbatim(f"{info.frames} samples at {info.rate} Hz")
            raise invalid(part.name, got, f"at least {self.encoder.least_samples / rate:.3f} s long")
        num_tokens = self.projector.tokens(frames) if mode == "bridge" and self.projector else 0
        return AudioFile(part.data, num_tokens, media_hash(part.data, self.digest), part.name)

    def check(self, mode: AudioMode, name: str) -> None:
        """Raise RequestError if this server does not support a mode."""
        if mode == "bridge" and self.projector is None:
            raise RequestError(
                f"{name} cannot be used in audio_mode bridge: this server has no projector (--bridge DIR)"
            )
        if mode == "transcript" and not self.encoder.has_head:
            raise RequestError(
                f"{name} cannot be used in audio_mode transcript: this server's speech encoder has no CTC head"
            )


def no_speech() -> RequestError:
    """The error for audio on a server without a speech encoder."""
    return RequestError("AUDIO must not contain clips: this server has no speech encoder (--speech DIR)")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
