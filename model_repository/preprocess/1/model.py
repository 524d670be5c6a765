"""Adapter: a request's chat and images to token ids and encoded files. The work is done in autoglm.chat."""

import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

from autoglm.chat import ChatRenderer, Prompt
from autoglm.checkpoint import Checkpoint, ImageLimits
from autoglm.config import checkpoint_directory, load_config
from autoglm.errors import ErrorCode, Exact, RequestError, invalid
from autoglm.messages import read_messages, read_prompt
from autoglm.sampling import SamplingParams
from autoglm.triton import error_response, read_parameters
from autoglm.vision import pixel_limits


class TritonPythonModel:
    """Holds the checkpoint's tokenizer and template; one process per instance, one request at a time."""

    def initialize(self, args: dict[str, str]) -> None:
        config = load_config()
        checkpoint = Checkpoint.open(checkpoint_directory())
        tokenizer = Tokenizer.from_file(str(checkpoint.path / "tokenizer.json"))
        max_context = min(config.engine.max_context, checkpoint.text.max_position_embeddings)
        self.limits = config.limits
        self.defaults = checkpoint.generation_defaults
        self.renderer = ChatRenderer(checkpoint, tokenizer, config.limits, max_context, config.chat.content_format)

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        """One request's response; its fault never touches another request of the same call."""
        started = time.perf_counter()
        try:
            if request.is_cancelled():
                raise RequestError("cancelled before it was read", ErrorCode.CANCELLED)
            # Checked before the vision encoder is paid for; the language model reads them again.
            parameters = read_parameters(request)
            image_limits = pixel_limits.request_limits(self.renderer.image_limits, parameters)
            SamplingParams.from_parameters(pixel_limits.without(parameters), self.defaults)
            prompt = self._prompt(request, image_limits)
        except Exception as error:
            return error_response(pb_utils, error)
        return pb_utils.InferenceResponse(_outputs(prompt, (time.perf_counter() - started) * 1000))

    def _prompt(self, request: Any, image_limits: ImageLimits) -> Prompt:
        if _elements(request, "AUDIO"):
            raise RequestError("AUDIO: speech input is not available yet; allowed: text in MESSAGES or PROMPT")
        messages, prompt = _elements(request, "MESSAGES"), _elements(request, "PROMPT")
        if (messages is None) == (prompt is None):
            got = Exact("neither" if messages is None else "both")
            raise invalid("MESSAGES, PROMPT", got, "exactly one of them")
        images = _elements(request, "IMAGES") or []
        if messages is not None:
            chat = read_messages(_single(messages, "MESSAGES"), images, self.limits, self.renderer.roles)
        else:
            chat = read_prompt(_single(prompt or [], "PROMPT"), images, self.limits)
        return self.renderer.render(chat, image_limits)


def _elements(request: Any, name: str) -> list[bytes] | None:
    """The elements of a BYTES input, None when the request does not have it."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy().reshape(-1).tolist()


def _single(elements: list[bytes], name: str) -> bytes:
    if len(elements) != 1:
        raise invalid(name, Exact(f"{len(elements)} elements"), "one")
    return elements[0]


def _outputs(prompt: Prompt, milliseconds: float) -> list[Any]:
    images = prompt.images
    grids = np.array([image.grid for image in images], np.int32).reshape(1, len(images), 3)
    return [
        pb_utils.Tensor("PROMPT_IDS", np.array(prompt.token_ids, np.int32)),
        pb_utils.Tensor("IMAGE_FILES", _row([image.data for image in images])),
        pb_utils.Tensor("IMAGE_GRIDS", grids),
        pb_utils.Tensor("IMAGE_HASHES", _row([image.hash.encode() for image in images])),
        pb_utils.Tensor("IMAGE_NAMES", _row([image.name.encode() for image in images])),
        pb_utils.Tensor("PREPROCESS_MS", np.array([milliseconds], np.float32)),
    ]


def _row(elements: list[bytes]) -> Any:
    """[1, n] array of bytes objects (numpy's own bytes type would cut trailing zero bytes)."""
    row = np.empty((1, len(elements)), np.object_)
    row[0, :] = elements
    return row
