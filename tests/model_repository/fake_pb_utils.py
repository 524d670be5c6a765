"""A fake `triton_python_backend_utils`, to test adapters without a server.

It follows the real module where adapters could go wrong: BYTES arrive as bytes, BF16 tensors have no numpy form, only
contiguous tensors pass through DLPack, nothing can be sent after the final flag. `load_adapter` imports a model.py with
this module in place of the real one.
"""

import importlib.util
import json
import re
import sys
import threading
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

REPOSITORY = Path(__file__).parents[2] / "model_repository"
TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1

_NUMPY = {
    "TYPE_BOOL": np.bool_, "TYPE_UINT8": np.uint8, "TYPE_UINT16": np.uint16, "TYPE_UINT32": np.uint32,
    "TYPE_UINT64": np.uint64, "TYPE_INT8": np.int8, "TYPE_INT16": np.int16, "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64, "TYPE_FP16": np.float16, "TYPE_FP32": np.float32, "TYPE_FP64": np.float64,
    "TYPE_STRING": np.object_,
}  # fmt: skip


def load_adapter(model: str) -> Any:
    """A fresh import of model_repository/<model>/1/model.py; its `TritonPythonModel` is not initialised."""
    sys.modules["triton_python_backend_utils"] = sys.modules[__name__]
    spec = importlib.util.spec_from_file_location(f"adapter_{model}", REPOSITORY / model / "1" / "model.py")
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bytes_tensor(name: str, elements: Sequence[bytes | str], shape: Sequence[int] | None = None) -> "Tensor":
    """A BYTES tensor, of one dimension unless a shape is given."""
    array = np.empty(len(elements), np.object_)
    array[:] = list(elements)
    return Tensor(name, array.reshape(shape if shape is not None else -1))


class TritonModelException(Exception):
    pass


class Tensor:
    def __init__(self, name: str, array: Any) -> None:
        if not isinstance(array, np.ndarray) or array.dtype.kind == "U":
            raise TritonModelException(f"tensor {name} must be a numpy array of numbers, bytes or objects")
        if array.dtype.kind in "SO":
            encoded = np.empty(array.shape, np.object_)
            encoded.reshape(-1)[:] = [e.encode() if isinstance(e, str) else bytes(e) for e in array.reshape(-1)]
            array = encoded
        self._name = name
        self._data: Any = array

    @classmethod
    def from_dlpack(cls, name: str, tensor: Any) -> "Tensor":
        data = from_dlpack(tensor)
        if not data.is_contiguous():
            raise TritonModelException("DLPack tensor is not contiguous.")
        created = cls.__new__(cls)
        created._name, created._data = name, data
        return created

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        if isinstance(self._data, np.ndarray):
            return self._data
        if self._data.dtype == torch.bfloat16:
            raise TritonModelException("Tensor dtype is BF16 and cannot be converted to NumPy")
        return self._data.cpu().numpy()

    def _tensor(self) -> torch.Tensor:
        return torch.from_numpy(self._data) if isinstance(self._data, np.ndarray) else self._data

    def to_dlpack(self) -> Any:
        return self._tensor().__dlpack__()

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self._tensor().__dlpack__(**kwargs)

    def __dlpack_device__(self) -> Any:
        return self._tensor().__dlpack_device__()

    def is_cpu(self) -> bool:
        return isinstance(self._data, np.ndarray) or self._data.device.type == "cpu"

    def shape(self) -> list[int]:
        return list(self._data.shape)


class TritonError:
    class Code(IntEnum):
        UNKNOWN = 0
        INTERNAL = 1
        NOT_FOUND = 2
        INVALID_ARG = 3
        UNAVAILABLE = 4
        UNSUPPORTED = 5
        ALREADY_EXISTS = 6
        CANCELLED = 7

    UNKNOWN, INTERNAL, NOT_FOUND = Code.UNKNOWN, Code.INTERNAL, Code.NOT_FOUND
    INVALID_ARG, UNAVAILABLE, UNSUPPORTED = Code.INVALID_ARG, Code.UNAVAILABLE, Code.UNSUPPORTED
    ALREADY_EXISTS, CANCELLED = Code.ALREADY_EXISTS, Code.CANCELLED

    def __init__(self, message: str, code: "TritonError.Code" = Code.INTERNAL) -> None:
        self._message = message
        self._code = code

    def message(self) -> str:
        return self._message

    def code(self) -> "TritonError.Code":
        return self._code


class InferenceResponse:
    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
        self._tensors = list(output_tensors)
        self._error = error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def __getitem__(self, name: str) -> Tensor:
        """An output by its name; only for tests."""
        return next(tensor for tensor in self._tensors if tensor.name() == name)


class ResponseSender:
    """Records the responses. `finished` is set by the final flag, so that tests can wait for the end of a stream."""

    def __init__(self, request: "InferenceRequest") -> None:
        self._request = request
        self.responses: list[InferenceResponse] = []
        self.finished = threading.Event()

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        if self.finished.is_set():
            raise TritonModelException("Unable to send response. Response sender has been closed.")
        if response is None and flags != TRITONSERVER_RESPONSE_COMPLETE_FINAL:
            raise TritonModelException("Inference Response object must be provided unless the final flag is set")
        if response is not None:
            self.responses.append(response)
        if flags == TRITONSERVER_RESPONSE_COMPLETE_FINAL:
            self.finished.set()

    def is_cancelled(self) -> bool:
        return self._request.is_cancelled()


class InferenceRequest:
    """A request as an adapter receives it. Tests may set `cancelled` and read `sender` at any time."""

    def __init__(
        self,
        inputs: Sequence[Tensor] = (),
        parameters: dict[str, Any] | None = None,
        request_id: str = "",
        timeout: int = 0,
        cancelled: bool = False,
    ) -> None:
        self._inputs = list(inputs)
        self._parameters = json.dumps(parameters or {})
        self._request_id = request_id
        self._timeout = timeout
        self.cancelled = cancelled
        self.sender = ResponseSender(self)

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def request_id(self) -> str:
        return self._request_id

    def parameters(self) -> str:
        return self._parameters

    def timeout(self) -> int:
        return self._timeout

    def is_cancelled(self) -> bool:
        return self.cancelled

    def get_response_sender(self) -> ResponseSender:
        return self.sender


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)


def get_input_config_by_name(model_config: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((entry for entry in model_config.get("input", []) if entry["name"] == name), None)


def get_output_config_by_name(model_config: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((entry for entry in model_config.get("output", []) if entry["name"] == name), None)


def triton_string_to_numpy(triton_type: str) -> Any:
    return _NUMPY[triton_type]


class Logger:
    """Records (level, message) pairs."""

    records: list[tuple[str, str]] = []  # noqa: RUF012

    @classmethod
    def log_info(cls, message: str) -> None:
        cls.records.append(("info", message))

    @classmethod
    def log_warn(cls, message: str) -> None:
        cls.records.append(("warn", message))

    @classmethod
    def log_error(cls, message: str) -> None:
        cls.records.append(("error", message))

    @classmethod
    def log_verbose(cls, message: str) -> None:
        cls.records.append(("verbose", message))


class Metric:
    """One labelled series. `threads` are the names of the threads that used it: the real one is not thread safe."""

    def __init__(self, kind: int, labels: dict[str, str]) -> None:
        self.kind = kind
        self.labels = labels
        self.observations: list[float] = []
        self.threads: set[str] = set()
        self._value = 0.0

    def increment(self, value: float) -> None:
        self.threads.add(threading.current_thread().name)
        if self.kind == MetricFamily.HISTOGRAM or (self.kind == MetricFamily.COUNTER and value < 0):
            raise TritonModelException("a counter cannot decrease, and a histogram has no increment")
        self._value += value

    def set(self, value: float) -> None:
        self.threads.add(threading.current_thread().name)
        if self.kind != MetricFamily.GAUGE:
            raise TritonModelException("only a gauge can be set")
        self._value = value

    def observe(self, value: float) -> None:
        self.threads.add(threading.current_thread().name)
        if self.kind != MetricFamily.HISTOGRAM:
            raise TritonModelException("only a histogram has observations")
        self.observations.append(value)

    def value(self) -> float:
        return self._value


class MetricFamily:
    COUNTER, GAUGE, HISTOGRAM = 0, 1, 2
    families: dict[str, "MetricFamily"] = {}  # noqa: RUF012
    kind: int

    def __init__(self, name: str, description: str, kind: int) -> None:
        if not re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", name):
            raise TritonModelException(f"Invalid metric name {name}")
        existing = self.families.setdefault(name, self)
        if existing is not self and existing.kind != kind:
            raise TritonModelException(f"metric family {name} exists with another kind")
        self.name, self.description, self.kind = name, description, kind
        self.metrics: list[Metric] = existing.metrics if existing is not self else []

    def Metric(self, labels: dict[str, str], buckets: Sequence[float] | None = None) -> Metric:
        if (buckets is not None) != (self.kind == self.HISTOGRAM):
            raise TritonModelException("buckets must be given for a histogram, and only for one")
        metric = Metric(self.kind, dict(labels))
        self.metrics.append(metric)
        return metric
