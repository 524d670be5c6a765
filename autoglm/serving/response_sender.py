"""The thread that sends the language model's answers to Triton.

A send costs time per response, not per token, and may block, so the engine's thread only queues outputs. Outputs of one
request that queued up since its last response are sent as one.
"""

import json
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from autoglm.llm.sequence import Output, Sink
from autoglm.preprocess.tokenizer import Vocabulary
from autoglm.serving.logprobs import LogprobFormatter
from autoglm.serving.triton_server import error_response

log = logging.getLogger(__name__)

CANCEL_POLL_S = 0.1  # between checks whether callers have cancelled


@dataclass(frozen=True)
class _Stream:
    sender: Any
    on_cancelled: Callable[[], None]
    on_end: Callable[[], None]


class ResponseSender:
    """Sends outputs through Triton's response senders, and reports cancelled requests."""

    def __init__(self, pb_utils: Any, vocabulary: Vocabulary) -> None:
        self._pb_utils = pb_utils
        self._logprobs = LogprobFormatter(vocabulary)
        self._queue: queue.SimpleQueue[tuple[_Stream, Output] | _Stream | None] = queue.SimpleQueue()
        self._open: set[_Stream] = set()
        self._next_poll = 0.0
        self._thread = threading.Thread(target=self._run, name="response-sender", daemon=True)
        self._thread.start()

    def open(self, sender: Any, on_cancelled: Callable[[], None], on_end: Callable[[], None]) -> Sink:
        """A sink for the outputs of one request.

        Args:
            on_cancelled: called, perhaps repeatedly, when the caller has cancelled; the last output is still required.
            on_end: called after the last output is sent. Both are called in the sender's thread.
        """
        stream = _Stream(sender, on_cancelled, on_end)
        self._queue.put(stream)
        return lambda output: self._queue.put((stream, output))

    def close(self) -> None:
        """Send what is queued and stop the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        closing = False
        while not closing:
            pending: dict[_Stream, Output] = {}
            timeout = CANCEL_POLL_S if self._open else None
            try:
                item = self._queue.get(timeout=timeout)
                while True:
                    if item is None:
                        closing = True
                    elif isinstance(item, _Stream):
                        self._open.add(item)
                    else:
                        stream, output = item
                        pending[stream] = merge(pending[stream], output) if stream in pending else output
                    item = self._queue.get_nowait()
            except queue.Empty:
                pass
            for stream, output in pending.items():
                self._send(stream, output)
            self._poll()

    def _send(self, stream: _Stream, output: Output) -> None:
        if output.error is not None:
            response = error_response(self._pb_utils, output.error)
        else:
            response = self._pb_utils.InferenceResponse(self._tensors(output))
        final = self._pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if output.is_last else 0
        try:
            stream.sender.send(response, flags=final)
        except Exception:
            log.exception("a response could not be sent")
            stream.on_cancelled()
        if output.is_last:
            self._open.discard(stream)
            stream.on_end()

    def _tensors(self, output: Output) -> list[Any]:
        tensor = self._pb_utils.Tensor
        usage = "" if output.usage is None else json.dumps({k: _rounded(v) for k, v in asdict(output.usage).items()})
        return [
            tensor("TEXT", np.array([output.text.encode()], np.object_)),
            tensor("TOKEN_IDS", np.array(output.token_ids, np.int32)),
            tensor("LOGPROBS", np.array([self._logprobs.format(output.logprobs).encode()], np.object_)),
            tensor("TRANSCRIPTS", np.array([text.encode() for text in output.transcripts], np.object_)),
            tensor("FINISH_REASON", np.array([(output.finish_reason or "").encode()], np.object_)),
            tensor("USAGE", np.array([usage.encode()], np.object_)),
        ]

    def _poll(self) -> None:
        now = time.monotonic()
        if now >= self._next_poll:
            self._next_poll = now + CANCEL_POLL_S
            for stream in self._open:
                if stream.sender.is_cancelled():
                    stream.on_cancelled()


def merge(first: Output, second: Output) -> Output:
    """Two outputs of one request as one. An error replaces the output before it."""
    if second.error is not None:
        return second
    return Output(
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
        transcripts=first.transcripts + second.transcripts,
        finish_reason=second.finish_reason,
        usage=second.usage,
    )


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else round(value, 3)
