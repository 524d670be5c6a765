"""Adapter: image files of a batch of requests to embeddings. See autoglm.vision.encoder."""

import time
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from torch.utils.dlpack import to_dlpack

from autoglm.checkpoint import Checkpoint
from autoglm.config import checkpoint_directory, load_config
from autoglm.device import choose_device
from autoglm.errors import ErrorCode, RequestError, Verbatim, invalid
from autoglm.media.image_file import ImageFile
from autoglm.serving.metrics import VISION_CACHE, MetricsPublisher
from autoglm.serving.triton_server import error_response, log_to_triton
from autoglm.vision.encoder import VisionEncoder
from autoglm.weights.cache import WeightCache

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
INPUTS = ("IMAGE_FILES", "IMAGE_GRIDS", "IMAGE_HASHES", "IMAGE_NAMES")


class TritonPythonModel:
    """One process per instance. Triton's dynamic batcher gathers the requests of a call."""

    def initialize(self, args: dict[str, str]) -> None:
        log_to_triton(pb_utils)
        config = load_config()
        device, dtype = choose_device(config.model, int(args["model_instance_device_id"] or 0))
        checkpoint = Checkpoint.open(checkpoint_directory())
        weights = WeightCache.from_config(config.weight_cache)
        self.encoder = VisionEncoder(checkpoint, config.vision, config.limits, device, dtype, weights)
        self.publisher = MetricsPublisher(pb_utils, self.encoder.cache.stats, VISION_CACHE, {"device": str(device)})

    def execute(self, requests: list[Any]) -> None:
        """Responds to each request as soon as its own images are encoded."""
        started = time.perf_counter()
        waiting: dict[int, tuple[Any, list[ImageFile]]] = {}
        for request in requests:
            sender, images = request.get_response_sender(), _read(request)
            if isinstance(images, RequestError):
                sender.send(error_response(pb_utils, images), FINAL)
            else:
                waiting[len(waiting)] = sender, images
        try:
            for index, result in self.encoder.encode_each([images for _, images in waiting.values()]):
                response = _response(result, started)
                sender, _ = waiting.pop(index)
                sender.send(response, FINAL)
        except Exception as error:  # every request must get exactly one response
            for sender, _ in waiting.values():
                sender.send(error_response(pb_utils, error), FINAL)

    def finalize(self) -> None:
        self.encoder.close()
        self.publisher.close()


def _response(result: torch.Tensor | RequestError, started: float) -> Any:
    if isinstance(result, RequestError):
        return error_response(pb_utils, result)
    milliseconds = np.array([[(time.perf_counter() - started) * 1000]], np.float32)
    return pb_utils.InferenceResponse(
        [
            pb_utils.Tensor.from_dlpack("IMAGE_EMBEDDINGS", to_dlpack(result[None])),
            pb_utils.Tensor("VISION_MS", milliseconds),
        ]
    )


def _read(request: Any) -> list[ImageFile] | RequestError:
    """The images of one request, or the reason to reject it."""
    if request.is_cancelled():
        return RequestError("the request was cancelled before its images were encoded", ErrorCode.CANCELLED)
    inputs = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in INPUTS]
    shapes = [list(array.shape) for array in inputs]
    expected = [[1, inputs[0].shape[1], 3] if name == "IMAGE_GRIDS" else [1, inputs[0].shape[1]] for name in INPUTS]
    if shapes != expected:
        return invalid(", ".join(INPUTS), Verbatim(shapes), f"of the shapes {expected}")
    return [
        ImageFile(data, (int(t), int(h), int(w)), media_hash.decode(), name.decode())
        for data, (t, h, w), media_hash, name in zip(*(array[0] for array in inputs), strict=True)
    ]
