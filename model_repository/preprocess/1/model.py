"""Adapter: chat, images and audio to token ids and encoded files. See autoglm.preprocess."""

import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

from autoglm.audio.speech import Mode, Speech, choose_mode
from autoglm.checkpoint import Checkpoint, ImageLimits
from autoglm.config import checkpoint_directory, load_config, speech_directories
from autoglm.errors import ErrorCode, Exact, RequestError, invalid
from autoglm.preprocess.chat import ChatRenderer, Prompt
from autoglm.preprocess.messages import read_messages, read_prompt
from autoglm.preprocess.sampling_params import SamplingParams
from autoglm.serving.triton_server import error_response, read_parameters, string_row
from autoglm.vision import pixel_limits


class TritonPythonModel:
    """Holds the checkpoint's tokenizer and template; one process per instance, one request at a time."""

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
            checkpoint, tokenizer, config.limits, max_context, config.chat.content_format, speech, config.audio
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        """One request's response; its fault never touches another request of the same call."""
        started = time.perf_counter()
        try:
            if request.is_cancelled():
                raise RequestError("cancelled before it was read", ErrorCode.CANCELLED)
            # Checked before the encoders are paid for; the language model reads them again.
            parameters = read_parameters(request)
            image_limits = pixel_limits.request_limits(self.renderer.image_limits, parameters)
            audio_mode = choose_mode(parameters, self.audio)
            SamplingParams.from_parameters(parameters, self.defaults)
            prompt = self._prompt(request, image_limits, audio_mode)
        except Exception as error:
            return error_response(pb_utils, error)
        return pb_utils.InferenceResponse(_outputs(prompt, (time.perf_counter() - started) * 1000))

    def _prompt(self, request: Any, image_limits: ImageLimits, audio_mode: Mode) -> Prompt:
        messages, prompt = _elements(request, "MESSAGES"), _elements(request, "PROMPT")
        if (messages is None) == (prompt is None):
            got = Exact("neither" if messages is None else "both")
            raise invalid("MESSAGES, PROMPT", got, "exactly one of them")
        images, sounds = _elements(request, "IMAGES") or [], _elements(request, "AUDIO") or []
        if messages is not None:
            source, roles = _single(messages, "MESSAGES"), self.renderer.roles
            chat = read_messages(source, images, self.limits, roles, sounds, self.audio)
        else:
            chat = read_prompt(_single(prompt or [], "PROMPT"), images, self.limits, sounds, self.audio)
        return self.renderer.render(chat, image_limits, audio_mode)


def _elements(request: Any, name: str) -> list[bytes] | None:
    """The elements of a BYTES input, None when the request does not have it."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy().reshape(-1).tolist()


def _single(elements: list[bytes], name: str) -> bytes:
    if len(elements) != 1:
        raise invalid(name, Exact(f"{len(elements)} elements"), "one")
    return elements[0]


def _outputs(prompt: Prompt, milliseconds: float) -> list[Any]:
    images, clips = prompt.images, prompt.clips
    grids = np.array([image.grid for image in images], np.int32).reshape(1, len(images), 3)
    return [
        pb_utils.Tensor("PROMPT_IDS", np.array(prompt.token_ids, np.int32)),
        pb_utils.Tensor("IMAGE_FILES", string_row([image.data for image in images])),
        pb_utils.Tensor("IMAGE_GRIDS", grids),
        pb_utils.Tensor("IMAGE_HASHES", string_row([image.hash.encode() for image in images])),
        pb_utils.Tensor("IMAGE_NAMES", string_row([image.name.encode() for image in images])),
        pb_utils.Tensor("AUDIO_FILES", string_row([clip.data for clip in clips])),
        pb_utils.Tensor("AUDIO_TOKENS", np.array([[clip.tokens for clip in clips]], np.int32)),
        pb_utils.Tensor("AUDIO_HASHES", string_row([clip.hash.encode() for clip in clips])),
        pb_utils.Tensor("AUDIO_NAMES", string_row([clip.name.encode() for clip in clips])),
        pb_utils.Tensor("PREPROCESS_MS", np.array([milliseconds], np.float32)),
    ]
