"""Adapter: prompts in, streamed answers out. See autoglm.llm.engine and autoglm.serving.response_sender."""

import logging
from functools import partial
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

from autoglm.checkpoint import Checkpoint
from autoglm.config import Config, checkpoint_directory, load_config
from autoglm.device import choose_device, run_on_side_stream
from autoglm.errors import ErrorCode, RequestError, Verbatim, invalid
from autoglm.llm.engine import Engine
from autoglm.llm.loader import Calibrate
from autoglm.llm.sequence import Clip, Output, Request, Sink
from autoglm.preprocess.sampling_params import SamplingParams
from autoglm.serving.instance_ipc import InstanceIPC
from autoglm.serving.metrics import ENGINE, MetricsPublisher
from autoglm.serving.request_ids import RequestIds
from autoglm.serving.response_sender import ResponseSender
from autoglm.serving.triton_server import error_response, log_to_triton, read_parameters

log = logging.getLogger("autoglm.autoglm_llm")

STOP = "STOP"  # the parameter of a request that cancels the one with the same id


class TritonPythonModel:
    """`execute` parses and queues requests; the engine's thread computes, the response sender's thread answers."""

    def initialize(self, args: dict[str, str]) -> None:
        log_to_triton(pb_utils)
        config = load_config()
        device, dtype = choose_device(config.model)
        self.checkpoint = Checkpoint.open(checkpoint_directory())
        self.engine = Engine.from_config(self.checkpoint, config, device, dtype, _calibrate(config))
        self.sender = ResponseSender(pb_utils, self.engine.vocabulary)
        instance = args["model_instance_name"]
        self.publisher = MetricsPublisher(pb_utils, self.engine.stats, ENGINE, {"instance": instance})
        self.request_ids = RequestIds()
        self.engine.start()
        self.instances = InstanceIPC(args["model_name"], instance, self._stop)

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._submit(request, sender)
            except Exception as error:
                sender.send(error_response(pb_utils, error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self) -> None:
        self.instances.close()
        self.engine.close()
        self.sender.close()
        self.publisher.close()

    def _submit(self, request: Any, sender: Any) -> None:
        if request.is_cancelled():
            raise RequestError("the request was cancelled before it reached the language model", ErrorCode.CANCELLED)
        parameters = read_parameters(request)
        caller_id = request.request_id()
        if parameters.pop(STOP, False) is True:
            # In other instances too: several requests may have this id.
            if not caller_id or not self._stop(caller_id) + self.instances.broadcast(caller_id):
                raise invalid("id", caller_id, "the id of a running request")
            self.sender.open(sender, lambda: None, lambda: None)(Output(finish_reason="cancelled"))
            return
        if not parameters.get("timeout") and request.timeout():
            parameters["timeout"] = request.timeout()
        params = SamplingParams.from_parameters(parameters, self.checkpoint.generation_defaults)
        request_id = self.request_ids.add(caller_id)
        forget = partial(self.request_ids.remove, caller_id, request_id)
        sink = self.sender.open(sender, partial(self.engine.cancel, request_id), forget)
        try:
            self.engine.submit(self._read(request, request_id, params, sink))
        except Exception as error:
            if not isinstance(error, RequestError):
                log.exception("a request could not be read")
                error = RequestError("the request's tensors could not be read", ErrorCode.INTERNAL)
            sink(Output(error=error))

    def _read(self, request: Any, request_id: str, params: SamplingParams, sink: Sink) -> Request:
        tensors = {tensor.name(): tensor for tensor in request.inputs()}
        grids = tensors["IMAGE_GRIDS"].as_numpy().reshape(-1, 3).tolist() if "IMAGE_GRIDS" in tensors else []
        hashes = _row(tensors, "IMAGE_HASHES")
        if len(grids) != len(hashes):
            raise invalid("IMAGE_HASHES", Verbatim(len(hashes)), f"one for each of the {len(grids)} grids")
        counts, clip_hashes, texts = (_row(tensors, f"AUDIO_{name}") for name in ("TOKENS", "HASHES", "TEXTS"))
        if not len(counts) == len(clip_hashes) == len(texts) or min(counts, default=0) < 0:
            accepted = f"a number of tokens for each of {len(clip_hashes)} AUDIO_HASHES and {len(texts)} AUDIO_TEXTS"
            raise invalid("AUDIO_TOKENS", counts, accepted)
        return Request(
            request_id=request_id,
            token_ids=tensors["PROMPT_IDS"].as_numpy().tolist(),
            sampling_params=params,
            sink=sink,
            image_grids=[(t, h, w) for t, h, w in grids],
            image_hashes=hashes,
            image_embeddings=self._embeddings(tensors, "IMAGE_EMBEDDINGS") if grids else None,
            clips=[Clip(h, n, text.decode()) for h, n, text in zip(clip_hashes, counts, texts, strict=True)],
            audio_embeddings=self._embeddings(tensors, "AUDIO_EMBEDDINGS") if any(counts) else None,
            preprocess_ms=_milliseconds(tensors.get("PREPROCESS_MS")),
            vision_ms=_milliseconds(tensors.get("VISION_MS")),
            audio_ms=_milliseconds(tensors.get("AUDIO_MS")),
        )

    def _embeddings(self, tensors: dict[str, Any], name: str) -> torch.Tensor | None:
        """A complete copy, [tokens, hidden_size]: the input's memory is released with the request."""
        if name not in tensors:
            return None
        device, tensor = self.engine.model_runner.device, tensors[name]
        return run_on_side_stream(device, lambda: torch.from_dlpack(tensor.to_dlpack())[0].to(device, copy=True))

    def _stop(self, caller_id: str) -> bool:
        """Cancel the requests of this instance with the caller's id; returns whether there were any. Closing a stream
        does not cancel an ensemble's request."""
        request_ids = self.request_ids.find(caller_id)
        for request_id in request_ids:
            self.engine.cancel(request_id)
        return bool(request_ids)


def _calibrate(config: Config) -> Calibrate | None:
    """The function that runs the calibration; imported only if one is configured."""
    if not config.quantization.calibration.dataset:
        return None
    from autoglm.llm.calibration import calibrate

    return calibrate


def _row(tensors: dict[str, Any], name: str) -> list[Any]:
    return tensors[name].as_numpy().reshape(-1).tolist() if name in tensors else []


def _milliseconds(tensor: Any) -> float:
    return 0.0 if tensor is None else float(np.ravel(tensor.as_numpy())[0])
