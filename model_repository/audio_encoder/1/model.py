"""Adapter: audio clips of a batch of requests to embeddings or transcripts. See autoglm.audio.encoder."""

import time
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from torch.utils.dlpack import to_dlpack

from autoglm.audio.encoder import AudioEncoder, EncodedClips
from autoglm.audio.speech import Speech, no_speech
from autoglm.checkpoint import Checkpoint
from autoglm.config import checkpoint_directory, load_config, speech_directories
from autoglm.device import choose_device
from autoglm.errors import ErrorCode, RequestError, Verbatim, invalid
from autoglm.media.audio_file import AudioFile
from autoglm.media.encoder import FEATURE_DTYPE
from autoglm.serving.metrics import AUDIO_CACHE, MetricsPublisher
from autoglm.serving.triton_server import error_response, log_to_triton, string_row

INPUTS = ("AUDIO_FILES", "AUDIO_TOKENS", "AUDIO_HASHES", "AUDIO_NAMES")


class TritonPythonModel:
    """One process per instance. Triton's dynamic batcher gathers the requests of a call. Without a speech encoder it
    accepts only requests without audio."""

    def initialize(self, args: dict[str, str]) -> None:
        log_to_triton(pb_utils)
        config = load_config()
        self.hidden_size = Checkpoint.open(checkpoint_directory()).text.hidden_size
        self.encoder: AudioEncoder | None = None
        self.publisher: MetricsPublisher | None = None
        speech = Speech.open(*speech_directories(), self.hidden_size)
        if speech is not None:
            device, dtype = choose_device(config.model, int(args["model_instance_device_id"] or 0))
            self.encoder = AudioEncoder(speech, config.audio, self.hidden_size, device, dtype)
            self.publisher = MetricsPublisher(pb_utils, self.encoder.cache.stats, AUDIO_CACHE, {"device": str(device)})

    def execute(self, requests: list[Any]) -> list[Any]:
        started = time.perf_counter()
        inputs = [_read(request) for request in requests]
        encoded = iter(self._encode([clips for clips in inputs if not isinstance(clips, RequestError)]))
        results = [clips if isinstance(clips, RequestError) else next(encoded) for clips in inputs]
        milliseconds = np.array([[(time.perf_counter() - started) * 1000]], np.float32)
        return [
            error_response(pb_utils, result)
            if isinstance(result, RequestError)
            else pb_utils.InferenceResponse(
                [
                    pb_utils.Tensor.from_dlpack("AUDIO_EMBEDDINGS", to_dlpack(result.embeddings[None])),
                    pb_utils.Tensor("AUDIO_TEXTS", string_row([text.encode() for text in result.transcripts])),
                    pb_utils.Tensor("AUDIO_MS", milliseconds),
                ]
            )
            for result in results
        ]

    def finalize(self) -> None:
        if self.encoder is not None and self.publisher is not None:
            self.encoder.close()
            self.publisher.close()

    def _encode(self, requests: list[list[AudioFile]]) -> list[EncodedClips | RequestError]:
        if self.encoder is not None:
            return self.encoder.encode(requests)
        empty = torch.empty(0, self.hidden_size, dtype=FEATURE_DTYPE)
        return [no_speech() if clips else EncodedClips(empty, []) for clips in requests]


def _read(request: Any) -> list[AudioFile] | RequestError:
    """The clips of one request, or the reason to reject it."""
    if request.is_cancelled():
        return RequestError("the request was cancelled before its audio was encoded", ErrorCode.CANCELLED)
    inputs = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in INPUTS]
    shapes = [list(array.shape) for array in inputs]
    if shapes != [[1, shapes[0][1]]] * len(INPUTS):
        return invalid(", ".join(INPUTS), Verbatim(shapes), "of the same shape [1, n]")
    return [
        AudioFile(data, int(num_tokens), media_hash.decode(), name.decode())
        for data, num_tokens, media_hash, name in zip(*(array[0] for array in inputs), strict=True)
    ]
