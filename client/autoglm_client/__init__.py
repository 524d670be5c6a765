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
from autoglm_client.parser import Answer, parse
from autoglm_client.result import Piece, Result, Usage

__all__ = [
    "Action",
    "ActionError",
    "Alternative",
    "Answer",
    "AsyncClient",
    "AsyncStream",
    "AutoGLMError",
    "Back",
    "CallAPI",
    "Cancelled",
    "Client",
    "DoubleTap",
    "Finish",
    "Home",
    "Interact",
    "InvalidRequest",
    "Launch",
    "LongPress",
    "Note",
    "Piece",
    "Point",
    "RequestTimeout",
    "Result",
    "ServerError",
    "ServerUnavailable",
    "Stream",
    "Swipe",
    "TakeOver",
    "Tap",
    "TokenLogprob",
    "Type",
    "TypeName",
    "Usage",
    "Wait",
    "parse",
]
