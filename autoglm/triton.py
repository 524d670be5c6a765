"""What the adapters under model_repository/ share: reading Triton requests and answering with errors.

`triton_python_backend_utils` exists only inside the server, so the adapters pass it in as `pb_utils`.
"""

import json
import traceback
from typing import Any

from autoglm.errors import ErrorCode, RequestError, invalid


def read_parameters(request: Any) -> dict[str, Any]:
    """The parameters of a request by name.

    Raises:
        RequestError: they hold a number that is none, such as NaN.
    """
    try:
        parameters = json.loads(request.parameters() or "{}", parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise RequestError(f"parameters: not readable as JSON ({error.msg}); allowed: strings, numbers, booleans") from None
    return dict(parameters)


def error_response(pb_utils: Any, error: Exception) -> Any:
    """The response that answers one request with `error`.

    A RequestError keeps its message and code. Anything else is a fault of the server: the traceback goes to the log,
    and the caller learns the kind of error only.
    """
    if not isinstance(error, RequestError):
        pb_utils.Logger.log_error("".join(traceback.format_exception(error)))
        error = RequestError(f"internal error ({type(error).__name__}); the server's log has the details", ErrorCode.INTERNAL)
    code = getattr(pb_utils.TritonError, error.code.triton_name)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(error.message, code))


def _refuse_constant(text: str) -> Any:
    raise invalid("parameters", text, "finite numbers")
