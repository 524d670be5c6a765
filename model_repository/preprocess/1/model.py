"""Adapter: chat, images and audio to token ids and encoded files. See autoglm.preprocess."""

import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

from autoglm.audio.speech import Speech
from autoglm.checkpoint import Checkpoint, ImageLimits
from autoglm.config import AudioMode, checkpoint_directory, load_config, speech_directories
from autoglm.errors import ErrorCode, RequestError, Verbatim, invalid
from autoglm.preprocess.chat import ChatRenderer, RenderedPrompt
from autoglm.preprocess.messages import read_messages, read_user_prompt
from autoglm.preprocess.sampling_params import MediaOptions, SamplingParams
from autoglm.serving.triton_server import error_response, read_parameters, string_row
from autoglm.vision.pixel_limits import request_limits


class TritonPythonModel:
    """One process per instance, one request at a time."""

    def initialize(self, args: dict[str, str]) -> None:
        config = load_config()
        checkpoint = Checkpoint.open(checkpoint_directory())
        tokenizer = Tokenizer.from_file(str(checkpoint.path / "tokenizer.json"))
        max_context = min(config.engine.max_context, checkpoint.text.max_position_embeddings)
        self.limits = config.limits
        self.audio = config.audio
        self.defaults = checkpoint.generation_defaults
        speech = Speech.open(*speech_directories(), checkpoint.text.hidden_size)
        self.renderer = ChatRenderer(
            checkpoint,
            tokenizer,
            config.limits,
            max_context=max_context,
            content_format=config.chat.content_format,
            speech=speech,
            audio=config.audio,
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        """The response to one request; its failure does not affect other requests of the call."""
        started = time.perf_counter()
        try:
            if request.is_cancelled():
                raise RequestError("the request was cancelled before it was processed", ErrorCode.CANCELLED)
            # Validated before the encoders run; the language model parses them again.
            parameters = read_parameters(request)
            SamplingParams.from_parameters(parameters, self.defaults)
            media = MediaOptions.from_parameters(parameters)
            limits = request_limits(self.renderer.image_limits, media.max_pixels, media.min_pixels)
            prompt = self._prompt(request, limits, media.audio_mode or self.audio.mode)
        except Exception as error:
            return error_response(pb_utils, error)
        return pb_utils.InferenceResponse(_outputs(prompt, (time.perf_counter() - started) * 1000))

    def _prompt(self, request: Any, image_limits: ImageLimits, audio_mode: AudioMode) -> RenderedPrompt:
        messages, prompt = _elements(request, "MESSAGES"), _elements(request, "PROMPT")
        if (messages is None) == (prompt is None):
            got = "neither" if messages is None else "both"
            raise RequestError(f"exactly one of MESSAGES and PROMPT must be given (got {got})")
        images, clips = _elements(request, "IMAGES") or [], _elements(request, "AUDIO") or []
        if messages is not None:
            chat = read_messages(
                _single(messages, "MESSAGES"),
                images,
                self.limits,
                roles=self.renderer.roles,
                clips=clips,
                audio_limits=self.audio,
            )
        else:
            source = _single(prompt or [], "PROMPT")
            chat = read_user_prompt(source, images, self.limits, clips=clips, audio_limits=self.audio)
        return self.renderer.render(chat, image_limits, audio_mode)


def _elements(request: Any, name: str) -> list[bytes] | None:
    """The elements of a BYTES input; None if the request does not have it."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy().reshape(-1).tolist()


def _single(elements: list[bytes], name: str) -> bytes:
    if len(elements) != 1:
        raise invalid(name, Verbatim(f"{len(elements)}"), "one element")
    return elements[0]


def _outputs(prompt: RenderedPrompt, milliseconds: float) -> list[Any]:
    images, clips = prompt.images, prompt.clips
    grids = np.array([image.grid for image in images], np.int32).reshape(1, len(images), 3)
    return [
        pb_utils.Tensor("PROMPT_IDS", np.array(prompt.token_ids, np.int32)),
        pb_utils.Tensor("IMAGE_FILES", string_row([image.data for image in images])),
        pb_utils.Tensor("IMAGE_GRIDS", grids),
        pb_utils.Tensor("IMAGE_HASHES", string_row([image.media_hash.encode() for image in images])),
        pb_utils.Tensor("IMAGE_NAMES", string_row([image.name.encode() for image in images])),
        pb_utils.Tensor("AUDIO_FILES", string_row([clip.data for clip in clips])),
        pb_utils.Tensor("AUDIO_TOKENS", np.array([[clip.num_tokens for clip in clips]], np.int32)),
        pb_utils.Tensor("AUDIO_HASHES", string_row([clip.media_hash.encode() for clip in clips])),
        pb_utils.Tensor("AUDIO_NAMES", string_row([clip.name.encode() for clip in clips])),
        pb_utils.Tensor("PREPROCESS_MS", np.array([milliseconds], np.float32)),
    ]
