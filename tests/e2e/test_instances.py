"""Several instances of the language model in one server."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tritonclient.utils import InferenceServerException

from autoglm_launcher.server import TritonServer
from tests.e2e.conftest import ROOT
from tests.e2e.ensemble_client import Call, metrics
from tests.e2e.test_ensemble import stop, wait_until

ENDLESS = {"max_tokens": 8_000, "ignore_eos": True}
INSTANCES = "instance_group [ { count: %d kind: KIND_MODEL } ]"


@pytest.fixture(scope="module")
def pair(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = tmp_path_factory.mktemp("server") / "models"
    shutil.copytree(ROOT / "model_repository", repository)
    config = repository / "autoglm_llm" / "config.pbtxt"
    text = config.read_text(encoding="utf-8")
    assert INSTANCES % 1 in text
    config.write_text(text.replace(INSTANCES % 1, INSTANCES % 2), encoding="utf-8")
    with TritonServer(
        repository=repository,
        checkpoint=demo_checkpoint,
        config=ROOT / "autoglm-config.yaml",
        log_path=repository.parent / "server.log",
        environment={"AUTOGLM_OVERRIDES": "engine: {kv_cache_mb: 1024}"},
    ) as running:
        yield running


def running(server: TritonServer) -> list[float]:
    return metrics(server, "autoglm_requests_running")


def test_a_stop_request_reaches_the_right_instance(pair: TritonServer) -> None:
    """Triton schedules it on either instance."""
    calls = {str(i): Call(pair, {"PROMPT": ["hello"]}, ENDLESS, request_id=str(i)) for i in range(6)}
    for call in calls.values():
        call.next()
    wait_until(lambda: sum(running(pair)) == 6)
    assert min(running(pair)) > 0
    for name, call in calls.items():
        assert stop(pair, name) == "cancelled"
        assert call.result().finish_reason == "cancelled"
    wait_until(lambda: running(pair) == [0, 0])
    with pytest.raises(InferenceServerException, match="id must be the id of a running request"):
        stop(pair, "3")


def test_one_stop_request_ends_all_requests_with_its_id(pair: TritonServer) -> None:
    calls = [Call(pair, {"PROMPT": [f"hello {i}"]}, ENDLESS, request_id="many") for i in range(8)]
    for call in calls:
        call.next()
    wait_until(lambda: min(running(pair)) > 0)
    assert stop(pair, "many") == "cancelled"
    assert {call.result().finish_reason for call in calls} == {"cancelled"}
    wait_until(lambda: running(pair) == [0, 0])
