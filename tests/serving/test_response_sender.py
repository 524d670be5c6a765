"""Outputs of one request that queued up are sent as one response."""

import json
import threading
from typing import Any

from autoglm.llm.sequence import Output, TokenLogprob
from autoglm.preprocess.tokenizer import Vocabulary
from autoglm.serving.response_sender import ResponseSender
from tests.conftest import Pair
from tests.model_repository import fake_pb_utils
from tests.model_repository.fake_pb_utils import InferenceRequest


def test_queued_outputs_are_merged(plain: Pair) -> None:
    sender = ResponseSender(fake_pb_utils, Vocabulary(plain.checkpoint.path))
    busy, sending, resume = InferenceRequest(), threading.Event(), threading.Event()
    send: Any = busy.sender.send

    def slow_send(*args: Any, **options: Any) -> None:
        sending.set()
        resume.wait(10)
        send(*args, **options)

    busy.sender.send = slow_send  # type: ignore[method-assign]
    sender.open(busy.sender, lambda: None, lambda: None)(Output(text="x", finish_reason="stop"))
    assert sending.wait(10)
    request = InferenceRequest()
    sink = sender.open(request.sender, lambda: None, lambda: None)
    logprobs = [TokenLogprob(5, -0.5, []), TokenLogprob(6, -1.5, [(7, -0.1)])]
    sink(Output(text="a", token_ids=[5, 6], logprobs=logprobs, transcripts=["transcript"]))
    sink(Output(text="b", token_ids=[7], logprobs=[TokenLogprob(7, -2.5, [])], finish_reason="stop"))
    resume.set()
    assert request.sender.finished.wait(10)
    sender.close()
    (response,) = request.sender.responses
    assert response["TEXT"].as_numpy().tolist() == [b"ab"]
    assert response["TOKEN_IDS"].as_numpy().tolist() == [5, 6, 7]
    assert response["TRANSCRIPTS"].as_numpy().tolist() == [b"transcript"]
    assert response["FINISH_REASON"].as_numpy().tolist() == [b"stop"]
    items = json.loads(response["LOGPROBS"].as_numpy()[0])
    assert [item["logprob"] for item in items] == [-0.5, -1.5, -2.5]
    assert [len(item["top_logprobs"]) for item in items] == [0, 1, 0]
    assert busy.sender.responses[0]["LOGPROBS"].as_numpy().tolist() == [b""]
