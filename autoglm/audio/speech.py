"""How a server hears: which encoder and projector it has, and what a clip is in a prompt.

- `transcript`: the clip's text, as the encoder's CTC head reads it, takes the place of the audio part as if it were
  typed. One placeholder token stands for the clip until the text is known. Works with any language model.
- `bridge`: the projector turns the clip's frames into embeddings, which replace as many placeholder tokens; positions
  count them as text. Needs a projector that was trained for the language model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from autoglm.audio.checkpoint import SpeechCheckpoint
from autoglm.audio.projector import WEIGHTS, ProjectorConfig
from autoglm.checkpoint import CheckpointError
from autoglm.config import AudioSection, ConfigError
from autoglm.errors import Exact, RequestError, invalid
from autoglm.media.audio_file import AudioFile, AudioPart, audio_hash, read_audio
from autoglm.weights.cache import CacheKey

Mode = Literal["transcript", "bridge"]


@dataclass(frozen=True)
class Speech:
    """The configurations of an encoder and of its projector, if there is one. `identity` names them and their weights
    in hashes, `bridge` is the projector's directory."""

    encoder: SpeechCheckpoint
    projector: ProjectorConfig | None
    bridge: Path | None
    identity: str

    @classmethod
    def open(cls, encoder: Path | None, bridge: Path | None, hidden_size: int) -> Speech | None:
        """Read the directories' JSON files; None without an encoder.

        Args:
            hidden_size: of the language model.

        Raises:
            ConfigError: a projector without an encoder.
            CheckpointError: a directory cannot be used, or they do not fit each other or the language model.
        """
        if encoder is None:
            if bridge is not None:
                raise ConfigError("AUTOGLM_BRIDGE is set without AUTOGLM_SPEECH: a projector needs its encoder")
            return None
        checkpoint = SpeechCheckpoint.open(encoder)
        projector = None if bridge is None else ProjectorConfig.open(bridge)
        if projector is not None:
            sizes = projector.input_size, projector.output_size
            if sizes != (checkpoint.hidden_size, hidden_size):
                raise CheckpointError(
                    f"{bridge}/config.json: input_size and output_size are {sizes}, but the encoder gives "
                    f"{checkpoint.hidden_size} and the language model takes {hidden_size}"
                )
        settings = {"model": "speech", "bridge": bridge and CacheKey.of(bridge, (bridge / WEIGHTS,), {}).digest}
        settings |= {path.name: _digest(path) for path in sorted(checkpoint.path.glob("*.json"))}
        identity = CacheKey.of(checkpoint.path, tuple(checkpoint.files), settings).digest
        return cls(checkpoint, projector, bridge, identity)

    def clip(self, part: AudioPart, mode: Mode, limits: AudioSection) -> AudioFile:
        """A request's sound file as it goes to the encoder. Its header is checked, its sound is not decoded.

        Raises:
            RequestError: the file is refused, or this server does not have that mode.
        """
        self.check(mode)
        info = read_audio(part.data, limits, part.name)
        rate = self.encoder.sampling_rate
        frames = self.encoder.frames(info.resampled(rate))
        if frames < 1:
            got = Exact(f"{info.frames} samples at {info.rate} a second")
            raise invalid(part.name, got, f"at least {self.encoder.least_samples / rate:.3f} s")
        tokens = self.projector.tokens(frames) if mode == "bridge" and self.projector else 0
        return AudioFile(part.data, tokens, audio_hash(part.data, self.identity), part.name)

    def check(self, mode: Mode) -> None:
        """Raise RequestError where this server lacks what a mode needs."""
        if mode == "bridge" and self.projector is None:
            raise RequestError(
                "AUDIO: audio_mode bridge needs a projector, and this server has none; "
                "allowed: audio_mode transcript, or a server with --bridge DIR (AUTOGLM_BRIDGE)"
            )
        if mode == "transcript" and not self.encoder.has_head:
            raise RequestError(
                "AUDIO: audio_mode transcript needs an encoder with a CTC head, and this server's has none; "
                "allowed: audio_mode bridge, or a server with another --speech DIR (AUTOGLM_SPEECH)"
            )


def no_speech() -> RequestError:
    """The answer to sound where there is no encoder."""
    return RequestError(
        "AUDIO: this server has no speech encoder; allowed: no audio, or a server with --speech DIR (AUTOGLM_SPEECH)"
    )


def choose_mode(parameters: Mapping[str, Any], config: AudioSection) -> Mode:
    """The mode that a request's parameter `audio_mode` asks for, else the server's.

    Raises:
        RequestError: another value.
    """
    mode = parameters.get("audio_mode")
    if mode is None:
        return config.mode
    if mode not in get_args(Mode):
        raise invalid("audio_mode", mode, " or ".join(get_args(Mode)))
    return mode  # type: ignore[no-any-return]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
