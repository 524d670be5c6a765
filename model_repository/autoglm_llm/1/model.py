"""Adapter: prompts in, streamed answers out. See autoglm.llm.engine and autoglm.serving.response_sender."""

import itertools
import threading
from collections import defaultdict
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

from autoglm.checkpoint import Checkpoint
from autoglm.config import Config, checkpoint_directory, load_config
from autoglm.device import beside, choose_device
from autoglm.errors import ErrorCode, RequestError, invalid
from autoglm.llm.engine import Engine
from autoglm.llm.loader import Calibrate
from autoglm.llm.sequence import Clip, Output, Request
from autoglm.preprocess.sampling_params import SamplingParams
from autoglm.serving.instance_ipc import Siblings
from autoglm.serving.metrics import ENGINE, Publisher
from autoglm.serving.response_sender import Responder
from autoglm.serving.triton_server import error_response, log_to_triton, read_parameters

STOP = "STOP"


class TritonPythonModel:
    """`execute` only reads a request and queues it; the engine's thread computes, the responder's thread answers."""

    def initialize(self, args: dict[str, str]) -> None:
        log_to_triton(pb_utils)
        config = load_config()
        device, dtype = choose_device(config.model)
        self.checkpoint = Checkpoint.open(checkpoint_directory())
        self.engine = Engine.from_config(self.checkpoint, config, device, dtype, _calibrate(config))
        self.responder = Responder(pb_utils, self.engine.vocabulary)
        instance = args["model_instance_name"]
        self.publisher = Publisher(pb_utils, self.engine.stats, ENGINE, {"instance": instance})
        # Callers choose their ids, and may choose one twice: the engine knows requests by numbers of our own.
        self._numbers = itertools.count()
        self._running: defaultdict[str, set[str]] = defaultdict(set)
        self._lock = threading.Lock()
        self.engine.start()
        self.siblings = Siblings(args["model_name"], instance, self._stop)

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._take(request, sender)
            except Exception as error:
                sender.send(error_response(pb_utils, error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self) -> None:
        self.siblings.close()
        self.engine.close()
        self.responder.close()
        self.publisher.close()

    def _take(self, request: Any, sender: Any) -> None:
        if request.is_cancelled():
            raise RequestError("cancelled before the language model was reached", ErrorCode.CANCELLED)
        parameters = read_parameters(request)
        caller = request.request_id()
        number = str(next(self._numbers))
        if parameters.pop(STOP, False) is True:
            # Elsewhere too: callers may use an id twice.
            if not caller or not self._stop(caller) + self.siblings.ask(caller):
                raise invalid("id", caller, "the id of a request that runs here")
            self.responder.open(sender, lambda: None, lambda: None)(Output(finish_reason="cancelled"))
            return
        if not parameters.get("timeout") and request.timeout():
            parameters["timeout"] = request.timeout()
        sampling = SamplingParams.from_parameters(parameters, self.checkpoint.generation_defaults)
        with self._lock:
            self._running[caller].add(number)
        sink = self.responder.open(sender, lambda: self.engine.cancel(number), lambda: self._forget(caller, number))
        try:
            self.engine.submit(self._request(request, number, sampling, sink))
        except Exception as error:
            fault = error if isinstance(error, RequestError) else RequestError(str(error), ErrorCode.INTERNAL)
            sink(Output(error=fault))

    def _request(self, request: Any, number: str, sampling: SamplingParams, sink: Any) -> Request:
        tensors = {tensor.name(): tensor for tensor in request.inputs()}
        grids = tensors["IMAGE_GRIDS"].as_numpy().reshape(-1, 3).tolist() if "IMAGE_GRIDS" in tensors else []
        digests = _row(tensors, "IMAGE_HASHES")
        if len(grids) != len(digests):
            raise invalid("IMAGE_HASHES", len(digests), f"one for each of the {len(grids)} grids")
        counts, names, texts = (_row(tensors, f"AUDIO_{what}") for what in ("TOKENS", "HASHES", "TEXTS"))
        if not len(counts) == len(names) == len(texts) or min(counts, default=0) < 0:
            raise invalid("AUDIO_TOKENS", counts, f"a number for each of {len(names)} hashes and {len(texts)} texts")
        clips = [Clip(name, n, text.decode()) for name, n, text in zip(names, counts, texts, strict=True)]
        return Request(
            number,
            tensors["PROMPT_IDS"].as_numpy().tolist(),
            sampling,
            sink,
            [(t, h, w) for t, h, w in grids],
            digests,
            self._embeddings(tensors, "IMAGE_EMBEDDINGS") if grids else None,
            _milliseconds(tensors.get("PREPROCESS_MS")),
            _milliseconds(tensors.get("VISION_MS")),
            clips,
            self._embeddings(tensors, "AUDIO_EMBEDDINGS") if any(counts) else None,
            _milliseconds(tensors.get("AUDIO_MS")),
        )

    def _embeddings(self, tensors: dict[str, Any], name: str) -> torch.Tensor | None:
        """A copy of our own, [tokens, hidden_size], complete: the input's memory belongs to the request."""
        if name not in tensors:
            return None
        device = self.engine.runner.device
        return beside(device, lambda: torch.from_dlpack(tensors[name].to_dlpack())[0].to(device, copy=True))

    def _stop(self, caller: str) -> bool:
        """End the requests that run here and that their caller gave this id, if there are any: a closed stream does not
        reach an ensemble."""
        with self._lock:
            numbers = list(self._running.get(caller, ()))
        for number in numbers:
            self.engine.cancel(number)
        return bool(numbers)

    def _forget(self, caller: str, number: str) -> None:
        with self._lock:
            self._running[caller].discard(number)
            if not self._running[caller]:
                del self._running[caller]


def _calibrate(config: Config) -> Calibrate | None:
    """The function that runs a calibration; what it needs is imported only where one is configured."""
    if not config.quantization.calibration.dataset:
        return None
    from autoglm.llm.calibration import calibrate

    return calibrate


def _row(tensors: dict[str, Any], name: str) -> list[Any]:
    return tensors[name].as_numpy().reshape(-1).tolist() if name in tensors else []


def _milliseconds(tensor: Any) -> float:
    return 0.0 if tensor is None else float(np.ravel(tensor.as_numpy())[0])
