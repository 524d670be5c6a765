"""The ensemble on a real server: streaming, options, batching, caching, cancellation."""

import json
import time
from base64 import b64encode
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
import tritonclient.grpc as grpc
from tokenizers import Tokenizer

from autoglm.checkpoint import Checkpoint
from autoglm.config import EngineConfig, load_config
from autoglm.llm.engine import Engine
from autoglm.llm.sequence import Output
from autoglm.llm.sequence import Request as EngineRequest
from autoglm.preprocess.chat import ChatRenderer
from autoglm.preprocess.messages import read_messages
from autoglm.preprocess.sampling_params import SamplingParams
from autoglm.serving.metrics import UPDATE_INTERVAL_S
from autoglm.vision.encoder import VisionEncoder
from autoglm_launcher.server import TritonServer
from tests.e2e.conftest import ROOT
from tests.e2e.ensemble_client import Call, ask, metric
from tests.images import encode, picture

CPU = torch.device("cpu")
LONG = {"max_tokens": 1500, "ignore_eos": True}


def image_chat(text: str, images: int = 1) -> str:
    parts: list[dict[str, str]] = [{"type": "image"}] * images
    return json.dumps([{"role": "user", "content": [*parts, {"type": "text", "text": text}]}])


def stream_http(server: TritonServer, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of one /generate_stream request, as curl receives them."""
    request = Request(
        f"{server.http_url}/v2/models/ensemble/generate_stream",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urlopen(request, timeout=60) as response:
        lines = response.read().decode().splitlines()
    return [json.loads(line[len("data: ") :]) for line in lines if line.startswith("data: ")]


def test_served_tokens_equal_the_librarys(server: TritonServer, demo_checkpoint: Path) -> None:
    """Two images and several turns: the server streams what its components compute in this process."""
    config = load_config(ROOT / "autoglm-config.yaml")
    checkpoint = Checkpoint.open(demo_checkpoint)
    files = [encode(picture(200, 300, 1)), encode(picture(300, 150, 2), "JPEG")]
    messages = json.dumps(
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "打开设置"}]},
            {"role": "assistant", "content": '<think>ok</think><answer>do(action="Back")'},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "go on"}]},
        ]
    )
    served = ask(server, {"MESSAGES": [messages], "IMAGES": files}, max_tokens=64, ignore_eos=True)

    tokenizer = Tokenizer.from_file(str(demo_checkpoint / "tokenizer.json"))
    renderer = ChatRenderer(checkpoint, tokenizer, config.limits, max_context=config.engine.max_context)
    prompt = renderer.render(read_messages(messages.encode(), files, config.limits, roles=renderer.roles))
    encoder = VisionEncoder(checkpoint, config.vision, config.limits, CPU, torch.float32)
    (features,) = encoder.encode([prompt.images])
    assert isinstance(features, torch.Tensor)
    pieces: list[Output] = []
    params = SamplingParams.from_parameters({"max_tokens": 64, "ignore_eos": True}, {})
    engine = Engine(checkpoint, config.engine, CPU, torch.float32)
    engine.start()
    engine.submit(
        EngineRequest(
            request_id="0",
            token_ids=prompt.token_ids,
            sampling_params=params,
            sink=pieces.append,
            image_grids=[image.grid for image in prompt.images],
            image_hashes=[image.media_hash.encode() for image in prompt.images],
            image_embeddings=features,
        )
    )
    deadline = time.monotonic() + 60
    while not (pieces and pieces[-1].is_last) and time.monotonic() < deadline:
        time.sleep(0.01)
    engine.close()
    encoder.close()
    assert served.token_ids == [id_ for piece in pieces for id_ in piece.token_ids]
    assert served.text == "".join(piece.text for piece in pieces)
    assert served.usage["prompt_tokens"] == len(prompt.token_ids)
    assert served.usage["image_tokens"] == prompt.num_image_tokens
    assert served.usage["completion_tokens"] == 64


def test_each_token_is_streamed_separately(server: TritonServer) -> None:
    call = Call(server, {"PROMPT": ["hello"]}, {"max_tokens": 200, "ignore_eos": True})
    pieces, final = 0, False
    while not final:
        piece, final = call.next()
        pieces += piece is not None
    call.close()
    assert pieces > 20


def test_one_response_without_streaming(server: TritonServer) -> None:
    streamed = ask(server, {"PROMPT": ["hello"]}, max_tokens=20, ignore_eos=True)
    whole = ask(server, {"PROMPT": ["hello"]}, max_tokens=20, ignore_eos=True, stream=False)
    assert len(whole.texts) == 1
    assert whole.text == streamed.text
    assert whole.token_ids == streamed.token_ids


def test_http_equals_grpc(server: TritonServer) -> None:
    """Images inside the chat give the same answer as the IMAGES input."""
    file = encode(picture(seed=5))
    options = {"max_tokens": 12, "ignore_eos": True}
    direct = ask(server, {"MESSAGES": [image_chat("hi")], "IMAGES": [file]}, **options)
    url = f"data:image/png;base64,{b64encode(file).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "hi"}]
    events = stream_http(server, {"MESSAGES": json.dumps([{"role": "user", "content": content}]), **options})
    assert "".join(event["TEXT"] for event in events) == direct.text
    assert events[-1]["FINISH_REASON"] == "length"
    assert json.loads(events[-1]["USAGE"])["completion_tokens"] == 12
    from_images = stream_http(server, {"MESSAGES": image_chat("hi"), "IMAGES": [url], **options})
    assert "".join(event["TEXT"] for event in from_images) == direct.text


def test_sampling_options(server: TritonServer) -> None:
    def tokens(**options: Any) -> list[int]:
        return ask(server, {"PROMPT": ["hello"]}, max_tokens=40, ignore_eos=True, **options).token_ids

    greedy = tokens()
    assert tokens() == greedy
    assert tokens(temperature=5.0, top_k=1) == greedy
    sampled = tokens(temperature=2.0, seed=7)
    assert sampled == tokens(temperature=2.0, seed=7)
    assert sampled != tokens(temperature=2.0, seed=8)
    assert tokens(frequency_penalty=2.0, presence_penalty=2.0) != greedy
    stopped = ask(server, {"PROMPT": ["hello"]}, max_tokens=40, ignore_eos=True, stop_token_ids=f"[{greedy[3]}]")
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == greedy[: greedy.index(greedy[3]) + 1]


def test_the_stop_string_is_removed(server: TritonServer) -> None:
    whole = ask(server, {"PROMPT": ["hello"]}, max_tokens=60, ignore_eos=True).text
    stop = whole[10:14]
    for given in (stop, json.dumps(["never comes", stop])):
        cut = ask(server, {"PROMPT": ["hello"]}, max_tokens=60, ignore_eos=True, stop=given)
        assert cut.text == whole[: whole.index(stop)]
        assert cut.finish_reason == "stop"


def test_concurrent_answers_equal_sequential_ones(server: TritonServer) -> None:
    def inputs(i: int) -> dict[str, list[Any]]:
        images = [encode(picture(100 + 20 * (i % 5), 200, i * 10 + k)) for k in range(i % 3)]
        return {"MESSAGES": [image_chat(f"task {i}", len(images))], "IMAGES": images}

    options = {"max_tokens": 24, "ignore_eos": True}
    alone = [ask(server, inputs(i), **options).token_ids for i in range(12)]
    calls = [Call(server, inputs(i), options) for i in range(12)]
    assert [call.result().token_ids for call in calls] == alone


def test_a_shared_prefix_is_computed_once(server: TritonServer) -> None:
    file, other = encode(picture(seed=71)), encode(picture(seed=72))
    before = settled(server, "autoglm_prefix_cache_hit_tokens_total")
    options = {"max_tokens": 2, "ignore_eos": True}
    first = ask(server, {"MESSAGES": [image_chat("first question")], "IMAGES": [file]}, **options)
    same = ask(server, {"MESSAGES": [image_chat("second question")], "IMAGES": [file]}, **options)
    another = ask(server, {"MESSAGES": [image_chat("second question")], "IMAGES": [other]}, **options)
    assert first.usage["image_tokens"] == another.usage["image_tokens"] > 16
    assert first.usage["cached_tokens"] < 16
    assert same.usage["cached_tokens"] >= first.usage["image_tokens"] - 16
    assert another.usage["cached_tokens"] < 16
    wait_until(lambda: metric(server, "autoglm_prefix_cache_hit_tokens_total") - before >= same.usage["cached_tokens"])


def test_a_stop_request_ends_an_ensemble_stream(server: TritonServer) -> None:
    call = Call(server, {"PROMPT": ["hello"]}, LONG, request_id="stop-me")
    call.next()
    assert stop(server, "stop-me") == "cancelled"
    reply = call.result()
    assert reply.finish_reason == "cancelled"
    assert 0 < reply.usage["completion_tokens"] < 1500
    assert_idle(server)


def test_stop_requests_reach_queued_requests(server: TritonServer) -> None:
    """With more requests than slots, the waiting ones end at once as well."""
    before = settled(server, "autoglm_requests_total")
    many = EngineConfig().max_batch_size + 8
    calls = [Call(server, {"PROMPT": [f"hello {i}"]}, LONG, request_id="many") for i in range(many)]
    wait_until(lambda: metric(server, "autoglm_requests_total") - before == many)
    assert metric(server, "autoglm_requests_waiting") > 0
    stop(server, "many")
    assert {call.result().finish_reason for call in calls} == {"cancelled"}
    assert_idle(server)


def stop(server: TritonServer, request_id: str) -> str:
    empty = grpc.InferInput("PROMPT_IDS", [0], "INT32")
    empty.set_data_from_numpy(np.zeros(0, np.int32))
    return Call(server, [empty], {"STOP": True}, request_id, "autoglm_llm").result().finish_reason


def test_closing_a_stream_cancels_a_direct_request(server: TritonServer) -> None:
    """The language model, called without the ensemble, detects a closed stream."""
    ids = grpc.InferInput("PROMPT_IDS", [3], "INT32")
    ids.set_data_from_numpy(np.array([1, 2, 3], np.int32))
    call = Call(server, [ids], LONG, model="autoglm_llm")
    call.next()
    call.close(cancel=True)
    assert_idle(server)


def test_timeout(server: TritonServer) -> None:
    reply = Call(server, {"PROMPT": ["hello"]}, LONG, timeout=300_000).result()
    assert reply.finish_reason == "timeout"
    assert 0 < reply.usage["completion_tokens"] < 1500


def test_batching_in_the_encoder(server: TritonServer) -> None:
    """Images of concurrent requests are encoded in fewer calls than there are requests."""

    def counts() -> tuple[int, int]:
        with urlopen(f"{server.http_url}/v2/models/vit_encoder/stats", timeout=10) as page:
            (stats,) = json.load(page)["model_stats"]
        return stats["inference_count"], stats["execution_count"]

    files = [encode(picture(1080, 1920, i)) for i in range(16)]
    before = counts()
    calls = [Call(server, {"PROMPT": ["hi"], "IMAGES": [file]}, {"max_tokens": 1}) for file in files]
    for call in calls:
        call.result()
    inferences, executions = (after - b for after, b in zip(counts(), before, strict=True))
    assert inferences == 16
    assert executions < 16


def settled(server: TritonServer, name: str) -> float:
    """The value of a metric, once all earlier requests have been counted."""
    time.sleep(1.5 * UPDATE_INTERVAL_S)
    return metric(server, name)


def assert_idle(server: TritonServer) -> None:
    """Nothing is running or waiting, and no block is in use."""
    for name in ("autoglm_requests_running", "autoglm_requests_waiting", "autoglm_kv_blocks_held"):
        wait_until(lambda name=name: metric(server, name) == 0)  # type: ignore[misc]


def wait_until(condition: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.fixture(autouse=True, scope="module")
def integrity(server: TritonServer) -> Any:
    """After these tests the engine, which checks its block pool whenever it is idle, has found no error."""
    yield
    assert_idle(server)
    assert "RuntimeError" not in server.log_text()
