"""What piles up for one request goes out as one response, complete."""

import json
import threading
from typing import Any

from autoglm.llm.sequence import Output, TokenLogprob
from autoglm.preprocess.tokenizer import Vocabulary
from autoglm.serving.response_sender import Responder
from tests.conftest import Pair
from tests.model_repository import fake_pb_utils
from tests.model_repository.fake_pb_utils import InferenceRequest


def test_pieces_of_one_request_are_joined(plain: Pair) -> None:
    responder = Responder(fake_pb_utils, Vocabulary(plain.checkpoint.path))
    busy, sending, go_on = InferenceRequest(), threading.Event(), threading.Event()
    send: Any = busy.sender.send

    def slowly(*args: Any, **options: Any) -> None:
        sending.set()
        go_on.wait(10)
        send(*args, **options)

    busy.sender.send = slowly  # type: ignore[method-assign]
    responder.open(busy.sender, lambda: None, lambda: None)(Output("x", finish_reason="stop"))
    assert sending.wait(10)
    request = InferenceRequest()
    sink = responder.open(request.sender, lambda: None, lambda: None)
    sink(Output("a", [5, 6], [TokenLogprob(5, -0.5, []), TokenLogprob(6, -1.5, [(7, -0.1)])], ["heard"]))
    sink(Output("b", [7], [TokenLogprob(7, -2.5, [])], finish_reason="stop"))
    go_on.set()
    assert request.sender.finished.wait(10)
    responder.close()
    (response,) = request.sender.responses
    assert response["TEXT"].as_numpy().tolist() == [b"ab"]
    assert response["TOKEN_IDS"].as_numpy().tolist() == [5, 6, 7]
    assert response["TRANSCRIPTS"].as_numpy().tolist() == [b"heard"]
    assert response["FINISH_REASON"].as_numpy().tolist() == [b"stop"]
    items = json.loads(response["LOGPROBS"].as_numpy()[0])
    assert [item["logprob"] for item in items] == [-0.5, -1.5, -2.5]
    assert [len(item["top_logprobs"]) for item in items] == [0, 1, 0]
    assert busy.sender.responses[0]["LOGPROBS"].as_numpy().tolist() == [b""]
