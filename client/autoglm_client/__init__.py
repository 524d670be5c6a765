"""Client of the AutoGLM Triton server: a screenshot and a task in, a thought and one phone action out."""

from autoglm_client.actions import (
    Action,
    Back,
    CallAPI,
    DoubleTap,
    Finish,
    Home,
    Interact,
    Launch,
    LongPress,
    Note,
    Point,
    Swipe,
    TakeOver,
    Tap,
    Type,
    TypeName,
    Wait,
)
from autoglm_client.aio import AsyncClient, AsyncStream
from autoglm_client.client import Client, Stream
from autoglm_client.errors import (
    ActionError,
    AutoGLMError,
    Cancelled,
    InvalidRequest,
    RequestTimeout,
    ServerError,
    ServerUnavailable,
)
from autoglm_client.logprobs import Alternative, TokenLogprob
from autoglm_client.parser import ParsedAnswer, parse
from autoglm_client.result import Piece, Result, Usage

__version__ = "0.1.0"

__all__ = [
    "Action", "ActionError", "Alternative", "AsyncClient", "AsyncStream", "AutoGLMError", "Back", "CallAPI",
    "Cancelled", "Client", "DoubleTap", "Finish", "Home", "Interact", "InvalidRequest", "Launch", "LongPress", "Note",
    "ParsedAnswer", "Piece", "Point", "RequestTimeout", "Result", "ServerError", "ServerUnavailable", "Stream", "Swipe",
    "TakeOver", "Tap", "TokenLogprob", "Type", "TypeName", "Usage", "Wait", "parse",
]  # fmt: skip
