from typing import Any

import pytest

from autoglm_launcher import restart
from autoglm_launcher.console import LauncherError
from autoglm_launcher.restart import MAX_WAIT_S, Restarter


class World:
    """A process that fails on demand, and a clock."""

    name = "the server"

    def __init__(self) -> None:
        self.now = 0.0
        self.reason: str | None = None
        self.start_error: str | None = None
        self.events: list[str] = []
        process: Any = self
        self.restarter = Restarter(process, self.start, lambda: self.reason, clock=lambda: self.now)

    def stop(self, *, now: bool) -> None:
        assert now
        self.events.append(f"stop at {self.now:.0f}")

    def start(self) -> None:
        self.events.append(f"start at {self.now:.0f}")
        if self.start_error:
            raise LauncherError(self.start_error)
        self.reason = None

    def check_for(self, seconds: int) -> list[str]:
        """Check once a second; returns the new events."""
        self.events.clear()
        for _ in range(seconds):
            self.now += 1
            self.restarter.check()
        return self.events.copy()


def test_a_healthy_process_is_left_alone() -> None:
    assert World().check_for(1000) == []


def test_a_failed_process_is_stopped_at_once_and_started_after_the_wait(capsys: pytest.CaptureFixture[str]) -> None:
    world = World()
    world.reason = "the server ended: killed by SIGKILL"
    assert world.check_for(10) == ["stop at 1", "start at 2"]
    out, err = capsys.readouterr()
    assert err == "autoglm: error: the server ended: killed by SIGKILL; restarting in 1 s\n"
    assert out == "autoglm: the server is running again\n"


def test_waits_double_up_to_the_maximum_while_starts_fail(capsys: pytest.CaptureFixture[str]) -> None:
    world = World()
    world.reason, world.start_error = "it died", "the port is taken"
    events = world.check_for(300)
    starts = [int(event.split()[-1]) for event in events if event.startswith("start")]
    waits = [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert starts == [1 + sum(waits[: n + 1]) for n in range(len(waits))]
    assert [event for event in events if event.startswith("stop")] == [f"stop at {at}" for at in (1, *starts)]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("it died; restarting in 1 s")
    assert lines[1].endswith("the port is taken; restarting in 2 s")
    assert lines[-1].endswith(f"the port is taken; restarting in {MAX_WAIT_S:.0f} s")


@pytest.mark.parametrize(("healthy_s", "wait_s"), [(10, 2), (301, 1)])
def test_only_a_process_that_has_run_for_long_starts_over_with_the_first_wait(healthy_s: int, wait_s: int) -> None:
    world = World()
    assert restart.PROVEN_AFTER_S == 300
    world.reason = "it died"
    world.check_for(2)
    world.check_for(healthy_s)
    world.reason = "it died again"
    failed = int(world.now) + 1
    assert world.check_for(10) == [f"stop at {failed}", f"start at {failed + wait_s}"]
