"""The speech encoder: audio files of many requests in, their embeddings or transcripts out."""

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
from autoglm.errors import RequestError, Verbatim, invalid
from autoglm.media.audio_file import AudioFile, decode_audio, media_hash
from autoglm.media.encoder import FEATURE_DTYPE, MediaEncoder
from autoglm.media.feature_cache import FeatureCache

log = logging.getLogger(__name__)

MIB = 2**20


class EncodedClips(NamedTuple):
    """The encoded clips of one request.

    embeddings: those of its bridged clips one after another, bfloat16 [tokens, hidden_size] on the device, in their own
        memory.
    transcripts: of each clip; "" for bridged ones.
    """

    embeddings: torch.Tensor
    transcripts: list[str]


class _Clip(NamedTuple):
    """A clip's cache key, fp32 [samples] on the host, and number of embeddings."""

    key: str
    samples: torch.Tensor
    num_tokens: int


class _Model(NamedTuple):
    encoder: Wav2Vec2
    projector: Projector | None


class AudioEncoder(MediaEncoder[AudioFile, _Clip]):
    """Batched, cached and thread-safe; see `MediaEncoder`. The features of a transcript are its UTF-8 bytes, uint8 [n].

    Args:
        hidden_size: of the language model.
        dtype: of the computation.
    """

    kind = "speech encoder"

    def __init__(
        self, speech: Speech, config: AudioSection, hidden_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
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
        """Encoder and projector, loaded at first use; concurrent callers wait."""
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

    def encode(self, requests: Sequence[Sequence[AudioFile]]) -> list[EncodedClips | RequestError]:
        """Encode the clips of several requests together.

        Returns:
            For each request its encoded clips, or the error of its first unusable clip, which does not affect other
            requests.
        """
        results: list[EncodedClips | RequestError] = []
        features = dict(self._encode(requests))
        for index, clips in enumerate(requests):
            found = features[index]
            if isinstance(found, RequestError):
                results.append(found)
                continue
            pairs = list(zip(clips, found, strict=True))
            bridged = [part for clip, part in pairs if clip.num_tokens]
            transcripts = ["" if clip.num_tokens else bytes(part.tolist()).decode() for clip, part in pairs]
            results.append(EncodedClips(self._join(bridged, self.hidden_size), transcripts))
        self._finish()
        return results

    def _cache_key(self, file: AudioFile) -> str:
        return f"{'bridge' if file.num_tokens else 'transcript'}/{file.media_hash}"

    def _media_hash(self, file: AudioFile) -> str:
        return media_hash(file.data, self.speech.digest)

    def _read(self, file: AudioFile) -> _Clip:
        self.speech.check("bridge" if file.num_tokens else "transcript", "")
        checkpoint, projector = self.speech.encoder, self.speech.projector
        samples = decode_audio(file.data, self.config, checkpoint.sampling_rate, "")
        frames = checkpoint.frames(len(samples))
        if frames < 1 or (file.num_tokens and projector and projector.tokens(frames) != file.num_tokens):
            accepted = f"sent with the number of embeddings of its {frames} frames"
            raise invalid("", Verbatim(f"{file.num_tokens} tokens"), accepted)
        return _Clip(self._cache_key(file), self.model.encoder.prepare(samples), file.num_tokens)

    def _fits(self, group: Sequence[_Clip], another: _Clip) -> bool:
        longest = max(len(clip.samples) for clip in (*group, another))
        seconds = (len(group) + 1) * longest / self.speech.encoder.sampling_rate
        return seconds <= self.config.max_seconds_per_pass

    @torch.inference_mode()
    def _features(self, group: list[_Clip]) -> list[torch.Tensor]:
        encoder, projector = self.model
        frames = encoder.encode([clip.samples for clip in group])
        bridged = [part for clip, part in zip(group, frames, strict=True) if clip.num_tokens]
        transcribed = [part for clip, part in zip(group, frames, strict=True) if not clip.num_tokens]
        embeddings = iter(projector(bridged) if projector is not None and bridged else ())
        transcripts = iter(encoder.transcribe(transcribed) if transcribed else ())
        return [
            next(embeddings).to(FEATURE_DTYPE, copy=True)
            if clip.num_tokens
            else torch.tensor(list(next(transcripts).encode()), dtype=torch.uint8)
            for clip in group
        ]

    def _warm_up(self, lengths: Sequence[int]) -> None:
        """Load the weights; on a GPU also encode clips of these lengths in seconds, in every mode."""
        model = self.model
        if self.device.type != "cuda":
            return
        begin = time.perf_counter()
        token_counts = [0] * self.speech.encoder.has_head + [1] * (model.projector is not None)
        for seconds in lengths:
            samples = torch.zeros(seconds * self.speech.encoder.sampling_rate)
            self._features([_Clip("warm-up", samples, num_tokens) for num_tokens in token_counts])
        self._finish()
        log.info("warmed up the speech encoder in %.1f s", time.perf_counter() - begin)
