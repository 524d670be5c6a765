"""The speech encoder as a server needs it: sound files of many requests in, their embeddings or transcripts out."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from autoglm.audio.projector import Projector
from autoglm.audio.speech import Speech
from autoglm.audio.wav2vec2 import Wav2Vec2
from autoglm.config import AudioSection
from autoglm.errors import Exact, RequestError, invalid
from autoglm.media.audio_file import AudioFile, audio_hash, decode_audio
from autoglm.media.encoder import FEATURE_DTYPE, MediaEncoder
from autoglm.media.feature_cache import FeatureCache

log = logging.getLogger(__name__)

MIB = 2**20


class Heard(NamedTuple):
    """What one request said: the embeddings of its bridged clips one after another, bfloat16 [tokens, hidden_size] on
    the device in memory of their own, and the transcript of each clip, "" of bridged ones."""

    embeddings: torch.Tensor
    transcripts: list[str]


class _Clip(NamedTuple):
    """A clip under its key in the cache: fp32 [samples] on the host, and the tokens that it is to become."""

    key: str
    samples: torch.Tensor
    tokens: int


class _Model(NamedTuple):
    encoder: Wav2Vec2
    projector: Projector | None


class SpeechEncoder(MediaEncoder[AudioFile, _Clip]):
    """Sound files to embeddings or text, batched, cached, safe for several threads.

    A transcript is kept as its UTF-8 bytes, uint8 [n] on the host.
    """

    kind = "speech encoder"

    def __init__(
        self, speech: Speech, config: AudioSection, hidden_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """
        Args:
            hidden_size: of the language model.
            dtype: what is computed in.
        """
        super().__init__(device, config.decode_threads)
        self.speech = speech
        self.config = config
        self.hidden_size = hidden_size
        self.dtype = dtype
        self._model: _Model | None = None
        self._loading = threading.Lock()
        if config.loading == "preload":
            self._warm_up(config.warm_up)
        self.cache = FeatureCache(device, config.feature_cache_mb * MIB)

    @property
    def model(self) -> _Model:
        """Encoder and projector. Their weights are read when they are first asked for; who asks meanwhile waits."""
        with self._loading:
            if self._model is None:
                begin = time.perf_counter()
                speech = self.speech
                self._model = _Model(
                    Wav2Vec2.load(speech.encoder, self.device, self.dtype),
                    None if speech.bridge is None else Projector.load(speech.bridge, self.device, self.dtype),
                )
                log.info("speech encoder loaded from %s in %.1f s", speech.encoder.path, time.perf_counter() - begin)
            return self._model

    def encode(self, requests: Sequence[Sequence[AudioFile]]) -> list[Heard | RequestError]:
        """Encode the clips of several requests together.

        Returns:
            For each request what it said; or the error of its first clip that cannot be used, which other requests do
            not notice.
        """
        results: list[Heard | RequestError] = []
        features = dict(self._encode(requests))
        for index, clips in enumerate(requests):
            found = features[index]
            if isinstance(found, RequestError):
                results.append(found)
                continue
            bridged = [part for clip, part in zip(clips, found, strict=True) if clip.tokens]
            texts = [
                "" if clip.tokens else bytes(part.tolist()).decode() for clip, part in zip(clips, found, strict=True)
            ]
            results.append(Heard(self._join(bridged, self.hidden_size), texts))
        self._finish()
        return results

    def _key(self, file: AudioFile) -> str:
        return f"{'bridge' if file.tokens else 'transcript'}/{file.hash}"

    def _identity(self, file: AudioFile) -> str:
        return audio_hash(file.data, self.speech.identity)

    def _read(self, file: AudioFile) -> _Clip:
        self.speech.check("bridge" if file.tokens else "transcript")
        checkpoint, projector = self.speech.encoder, self.speech.projector
        samples = decode_audio(file.data, self.config, checkpoint.sampling_rate, "")
        frames = checkpoint.frames(len(samples))
        if frames < 1 or (file.tokens and projector and projector.tokens(frames) != file.tokens):
            raise invalid("", Exact(f"{file.tokens} tokens"), f"what the clip's {frames} frames are projected to")
        return _Clip(self._key(file), self.model.encoder.prepare(samples), file.tokens)

    def _fits(self, group: Sequence[_Clip], another: _Clip) -> bool:
        longest = max(len(clip.samples) for clip in (*group, another))
        seconds = (len(group) + 1) * longest / self.speech.encoder.sampling_rate
        return seconds <= self.config.max_seconds_per_pass

    @torch.inference_mode()
    def _features(self, group: list[_Clip]) -> list[torch.Tensor]:
        encoder, projector = self.model
        frames = encoder.encode([clip.samples for clip in group])
        bridged = [part for clip, part in zip(group, frames, strict=True) if clip.tokens]
        written = [part for clip, part in zip(group, frames, strict=True) if not clip.tokens]
        embeddings = iter(projector(bridged) if projector is not None and bridged else ())
        texts = iter(encoder.transcribe(written) if written else ())
        return [
            next(embeddings).to(FEATURE_DTYPE, copy=True)
            if clip.tokens
            else torch.tensor(list(next(texts).encode()), dtype=torch.uint8)
            for clip in group
        ]

    def _warm_up(self, lengths: Sequence[int]) -> None:
        """Read the weights; on a GPU also encode clips of so many seconds, so that no request pays for what happens
        once."""
        model = self.model
        if self.device.type != "cuda":
            return
        begin = time.perf_counter()
        modes = [0] * self.speech.encoder.has_head + [1] * (model.projector is not None)
        for seconds in lengths:
            samples = torch.zeros(seconds * self.speech.encoder.sampling_rate)
            self._features([_Clip("warm-up", samples, mode) for mode in modes])
        self._finish()
        log.info("the speech encoder is warm after %.1f s", time.perf_counter() - begin)
