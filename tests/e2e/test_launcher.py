"""The launcher with the whole ensemble, as ./run_autoglm_server.sh starts it after the installation."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from autoglm_launcher import ROOT, probe
from autoglm_launcher.gateway import fault_of
from autoglm_launcher.ports import free_ports
from autoglm_launcher.probe import Sample
from autoglm_launcher.processes import command_line, descendants, is_running, server_processes
from autoglm_launcher.server import TritonServer
from autoglm_launcher.watchdog import Watchdog

START_S = 120


class Launcher:
    """A running `python -m autoglm_launcher`, whose output is read from a file."""

    def __init__(self, checkpoint: Path, directory: Path, *options: str) -> None:
        http, grpc, metrics, gateway = map(str, free_ports(4))
        self.http_address = f"127.0.0.1:{http}"
        self.gateway_address = f"127.0.0.1:{gateway}"
        self._output = directory / "output.txt"
        command = [sys.executable, "-m", "autoglm_launcher", "--checkpoint", str(checkpoint)]
        command += ["--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics, "--gateway-port", gateway]
        command += ["--log", str(directory / "server.log"), *options]
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, preexec_fn=_listen_to_ctrl_c
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + START_S
        while text not in self.output and time.monotonic() < deadline and self.process.poll() is None:
            time.sleep(0.1)
        assert text in self.output, self.output

    def stub_of(self, model: str) -> int:
        found = [process for process in server_processes(self.process.pid) if process.instance.startswith(model)]
        return found[0].pid

    def gateway(self) -> int:
        (pid,) = [pid for pid in descendants(self.process.pid) if command_line(pid)[1:3] == ["-m", "gateway"]]
        return pid


def _listen_to_ctrl_c() -> None:
    """Shells make background jobs, such as a run of the tests, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def launched(checkpoint: Path, directory: Path, *options: str) -> Iterator[Launcher]:
    launcher = Launcher(checkpoint, directory, *options)
    try:
        yield launcher
    finally:
        launcher.process.kill()
        launcher.process.wait()


def test_once_prints_thought_and_action_and_cleans_up(demo_checkpoint: Path, tmp_path: Path) -> None:
    with launched(demo_checkpoint, tmp_path, "--once") as launcher:
        launcher.wait_for("models loaded")
        started = descendants(launcher.process.pid)
        assert launcher.process.wait(START_S) == 0, launcher.output
        task, thought, action = launcher.output.splitlines()[-3:]
        assert task == f"task:    {Sample.first().task}"
        assert len(thought.removeprefix("thought: ")) > 0
        assert action.startswith(("action:  do(action=", "action:  finish("))
        assert started
        assert not [pid for pid in started if is_running(pid)]
        assert not list(tmp_path.glob("gateway-*.log"))


def test_once_with_speech(demo_checkpoint: Path, tmp_path: Path) -> None:
    with launched(demo_checkpoint, tmp_path, "--once", "--speech") as launcher:
        assert launcher.process.wait(START_S) == 0, launcher.output
        task, transcript, _, action = launcher.output.splitlines()[-4:]
        assert task == f"task:       {Sample.spoken().task}"
        assert transcript == f"transcript: {Sample.spoken().task}"
        assert action.startswith('action:     do(action="Tap", element=[')


def answer_of(gateway: str) -> str:
    """The answer to the openai package, which retries on 503."""
    with OpenAI(base_url=f"http://{gateway}/v1", api_key="-", max_retries=60) as client:
        chat: list[Any] = [{"role": "user", "content": "go back"}]
        whole = client.chat.completions.create(model="autoglm-phone-9b", messages=chat, temperature=0)
    return str(whole.choices[0].message.content)


def test_a_dead_gateway_is_restarted_without_the_server(demo_checkpoint: Path, tmp_path: Path) -> None:
    with launched(demo_checkpoint, tmp_path) as launcher:
        launcher.wait_for("Ctrl-C stops it")
        assert f"OpenAI   http://{launcher.gateway_address}/v1" in launcher.output
        assert fault_of(launcher.gateway_address) is None
        answer = answer_of(launcher.gateway_address)
        assert "do(action=" in answer

        first, server = launcher.gateway(), launcher.stub_of("autoglm_llm")
        os.kill(first, signal.SIGKILL)
        launcher.wait_for("the gateway ended: killed by SIGKILL")
        assert probe.main(["--http", launcher.http_address]) == 0
        launcher.wait_for("the gateway is running again")
        assert answer_of(launcher.gateway_address) == answer
        assert launcher.stub_of("autoglm_llm") == server

        # A restart of the server does not restart the gateway, which returns 503 until the server is back.
        second = launcher.gateway()
        os.kill(server, signal.SIGKILL)
        launcher.wait_for("restarting in 1 s")
        assert fault_of(launcher.gateway_address, "/health") is None
        assert answer_of(launcher.gateway_address) == answer
        assert second == launcher.gateway() != first

        started = descendants(launcher.process.pid)
        begin = time.monotonic()
        launcher.process.send_signal(signal.SIGINT)
        assert launcher.process.wait(30) == 128 + signal.SIGINT
        assert time.monotonic() - begin < 10
        assert not [pid for pid in started if is_running(pid)]
        assert "Traceback" not in (tmp_path / f"gateway-{launcher.gateway_address.split(':')[1]}.log").read_text()


def test_restarts_after_a_dead_stub_and_stops_on_sigterm(
    demo_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with launched(demo_checkpoint, tmp_path, "--no-gateway") as launcher:
        launcher.wait_for("Ctrl-C stops it")
        assert "OpenAI" not in launcher.output
        assert "no answer" in (fault_of(launcher.gateway_address, "/health") or "")
        assert probe.main(["--http", launcher.http_address]) == 0

        os.kill(launcher.stub_of("autoglm_llm"), signal.SIGKILL)
        launcher.wait_for("the server is running again")
        assert "the process of model instance autoglm_llm_0_0 died; restarting in 1 s" in launcher.output
        assert probe.main(["--http", launcher.http_address]) == 0

        started = descendants(launcher.process.pid)
        launcher.process.send_signal(signal.SIGTERM)
        assert launcher.process.wait(30) == 128 + signal.SIGTERM
        assert not [pid for pid in started if is_running(pid)]
        assert probe.main(["--http", launcher.http_address]) == 1


def test_the_watchdog_detects_a_hung_stub(demo_checkpoint: Path, tmp_path: Path) -> None:
    with TritonServer(checkpoint=demo_checkpoint, log_path=tmp_path / "server.log") as server:
        watchdog = Watchdog(server, Sample.first(), interval_s=0.0, timeout_s=5.0, patience=1)
        assert watchdog.check() is None
        (hung,) = [process.pid for process in server.processes() if process.instance.startswith("autoglm_llm")]
        os.kill(hung, signal.SIGSTOP)
        assert "1 failed probe(s) in a row: " in (watchdog.check() or "")
        assert server.is_ready(), "Triton notices nothing"
        server.stop(now=True)
        assert not is_running(hung)
