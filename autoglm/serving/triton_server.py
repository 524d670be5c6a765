"""Functions shared by the adapters in model_repository/: reading requests, error responses, logging.

`triton_python_backend_utils` exists only inside the server, so the adapters pass it in as `pb_utils`.
"""

import json
import logging
import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np

from autoglm.errors import ErrorCode, RequestError


def read_parameters(request: Any) -> dict[str, Any]:
    """The parameters of a request by name. Values are not checked: a number may be NaN or infinite."""
    parameters: dict[str, Any] = json.loads(request.parameters() or "{}")
    return parameters


def error_response(pb_utils: Any, error: Exception) -> Any:
    """The response to one request that failed with `error`.

    A RequestError keeps its message and code. For any other error the traceback is logged, and the caller gets its type
    only. The message begins with the code too, because a gRPC stream transmits the text alone.
    """
    if not isinstance(error, RequestError):
        pb_utils.Logger.log_error("".join(traceback.format_exception(error)))
        error = RequestError(f"internal error ({type(error).__name__}); see the server's log", ErrorCode.INTERNAL)
    code = getattr(pb_utils.TritonError, error.code.triton_name)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{error.code.value}: {error.message}", code))


def string_row(elements: Sequence[bytes]) -> Any:
    """A [1, n] array of bytes objects (numpy's bytes type would strip trailing zero bytes)."""
    row = np.empty((1, len(elements)), np.object_)
    row[0, :] = elements
    return row


class _TritonHandler(logging.Handler):
    def __init__(self, pb_utils: Any) -> None:
        super().__init__()
        self._pb_utils = pb_utils

    def emit(self, record: logging.LogRecord) -> None:
        logger = self._pb_utils.Logger
        write = (
            logger.log_error if record.levelno >= logging.ERROR
            else logger.log_warn if record.levelno >= logging.WARNING
            else logger.log_info
        )  # fmt: skip
        write(f"{record.name}: {self.format(record)}")


def log_to_triton(pb_utils: Any) -> None:
    """Send this process's log to Triton's."""
    root = logging.getLogger("autoglm")
    root.setLevel(logging.INFO)
    root.handlers = [_TritonHandler(pb_utils)]
