from pathlib import Path
from typing import Any

import pytest

from autoglm_launcher import watchdog
from autoglm_launcher.probe import ProbeError, Sample
from autoglm_launcher.processes import ServerProcess
from autoglm_launcher.watchdog import Watchdog


class FakeServer:
    http_address = "nowhere:1"

    def __init__(self) -> None:
        self.alive = True
        self.stubs = [ServerProcess(11, "stub", "vit_encoder_0_0"), ServerProcess(12, "stub", "autoglm_llm_0_0")]

    def processes(self) -> list[ServerProcess]:
        return [ServerProcess(10, "server"), *self.stubs]

    def failure(self) -> str | None:
        return None if self.alive else "the server ended: killed by SIGSEGV"


class World:
    """A server, a clock, and the result of probes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server = FakeServer()
        self.now = 0.0
        self.failure: ProbeError | None = None
        self.responses = 0
        self.probes = 0
        monkeypatch.setattr(watchdog, "ask", self._ask)
        monkeypatch.setattr(watchdog, "count_responses", lambda address: self.responses)
        server: Any = self.server
        sample = Sample(Path("screen.png"), "task")
        self.watchdog = Watchdog(server, sample, interval_s=10, timeout_s=5, patience=3, clock=lambda: self.now)

    def _ask(self, *_: Any, **__: Any) -> None:
        self.probes += 1
        if self.failure:
            raise self.failure

    def check_for(self, seconds: int) -> str | None:
        """Check once a second; returns the first reason to restart."""
        for _ in range(seconds):
            self.now += 1
            if reason := self.watchdog.check():
                return reason
        return None


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_a_healthy_server_is_left_alone(world: World) -> None:
    assert world.check_for(100) is None
    assert world.probes == 10


def test_a_server_that_has_ended_must_be_restarted(world: World) -> None:
    world.server.alive = False
    assert world.check_for(1) == "the server ended: killed by SIGSEGV"


def test_a_dead_stub_is_detected_at_once_and_named(world: World) -> None:
    del world.server.stubs[1]
    assert world.check_for(1) == "the process of model instance autoglm_llm_0_0 died"
    assert world.probes == 0


def test_probes_must_fail_several_times_in_a_row(world: World) -> None:
    world.failure = ProbeError("no answer in 5 s")
    reason = world.check_for(100)
    assert reason == "3 failed probe(s) in a row: no answer in 5 s"
    assert world.probes == 3


def test_a_successful_probe_resets_the_failures(world: World) -> None:
    world.failure = ProbeError("no answer in 5 s")
    assert world.check_for(12) is None
    assert world.probes == 2
    world.failure = None
    assert world.check_for(10) is None
    world.failure = ProbeError("no answer in 5 s")
    assert world.check_for(5) is None
    assert world.probes == 5


def test_a_busy_server_is_healthy(world: World) -> None:
    world.failure = ProbeError("HTTP 400: UNAVAILABLE: 256 requests wait already")
    assert world.check_for(100) is None


def test_a_server_that_answers_other_requests_is_healthy(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def tokens(address: str) -> int:
        world.responses += 1
        return world.responses

    monkeypatch.setattr(watchdog, "count_responses", tokens)
    world.failure = ProbeError("no answer in 5 s")
    assert world.check_for(100) is None


def test_a_reset_accepts_the_stubs_of_the_restarted_server(world: World) -> None:
    world.failure = ProbeError("no answer in 5 s")
    assert world.check_for(12) is None
    world.server.stubs = [ServerProcess(21, "stub", "vit_encoder_0_0")]
    world.watchdog.reset()
    assert world.check_for(12) is None, "one failed probe of three"
    world.server.stubs.clear()
    assert world.check_for(1) == "the process of model instance vit_encoder_0_0 died"
