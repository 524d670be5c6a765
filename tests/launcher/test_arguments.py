import os
import socket
import subprocess
from pathlib import Path

import pytest

from autoglm.config import load_config
from autoglm_launcher import ROOT, arguments, gpus
from autoglm_launcher.arguments import Options
from autoglm_launcher.console import LauncherError
from autoglm_launcher.gpus import Gpu
from autoglm_launcher.ports import free_ports as ports_that_are_free


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"")
    return directory


@pytest.fixture
def free_ports() -> list[str]:
    options = ("--http-port", "--grpc-port", "--metrics-port", "--gateway-port")
    return [word for option, port in zip(options, ports_that_are_free(4), strict=True) for word in (option, str(port))]


def parse(checkpoint: Path, *more: str) -> Options:
    return arguments.parse(["--checkpoint", str(checkpoint), *more])


def test_complete_options_are_valid(checkpoint: Path, free_ports: list[str]) -> None:
    parse(checkpoint, *free_ports).check()


@pytest.mark.parametrize("argument", [["--gpus", "a"], ["--gpus", "0,0"], ["--gpus", ""], ["--http-port", "0"]])
def test_invalid_values_print_the_usage(argument: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        arguments.parse(argument)
    assert stopped.value.code == 2
    assert argument[0] in capsys.readouterr().err


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(LauncherError, match=r"--checkpoint must be .*/nowhere is not a directory"):
        parse(tmp_path / "nowhere").check()


def test_a_checkpoint_without_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(LauncherError, match=r"has no \*\.safetensors"):
        parse(checkpoint).check()


def test_speech_defaults_to_the_encoder_of_the_demo_checkpoint(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (parse(checkpoint).speech, parse(checkpoint).bridge) == (None, None)
    given = parse(checkpoint, "--speech", str(checkpoint), "--bridge", str(tmp_path / "nowhere"))
    assert given.speech == checkpoint
    with pytest.raises(LauncherError, match=r"--bridge must be .*nowhere has no config\.json"):
        given.check()
    with pytest.raises(LauncherError, match="--bridge requires --speech"):
        parse(checkpoint, "--bridge", str(checkpoint)).check()
    monkeypatch.setenv("AUTOGLM_SPEECH", str(checkpoint))
    assert parse(checkpoint).speech == checkpoint
    monkeypatch.delenv("AUTOGLM_SPEECH")
    monkeypatch.setattr(arguments, "DEMO_SPEECH", tmp_path)
    (tmp_path / "encoder").mkdir()
    demo = arguments.parse([])
    assert (demo.speech, demo.bridge, demo.spoken) == (tmp_path / "encoder", None, False)
    (tmp_path / "bridge").mkdir()
    demo = arguments.parse(["--once", "--speech"])
    assert (demo.speech, demo.bridge, demo.spoken) == (tmp_path / "encoder", tmp_path / "bridge", True)
    assert arguments.parse(["--speech"]).spoken is False
    other = parse(checkpoint, "--speech", "--once")
    assert (other.speech, other.bridge, other.spoken) == (tmp_path / "encoder", None, True)


def test_a_missing_preset_lists_the_existing_ones(checkpoint: Path) -> None:
    with pytest.raises(
        LauncherError, match=r"--preset must be one of edge, latency, throughput \(.*fast.*is not a file\)"
    ):
        parse(checkpoint, "--preset", "fast").check()


def test_a_missing_gpu(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "list_gpus", lambda: [Gpu(0, "NVIDIA H200")])
    with pytest.raises(LauncherError, match=r"no GPU 1, this machine has 0 \(NVIDIA H200\)"):
        parse(checkpoint, "--gpus", "0,1").check()


def test_options_take_precedence_over_the_environment(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOGLM_CHECKPOINT", str(checkpoint))
    monkeypatch.setenv("AUTOGLM_CONFIG", "/etc/autoglm.yaml")
    assert arguments.parse([]).checkpoint == checkpoint
    assert arguments.parse([]).config == Path("/etc/autoglm.yaml")
    assert arguments.parse(["--config", "/x.yaml"]).config == Path("/x.yaml")


def test_relative_paths_are_relative_to_the_callers_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOGLM_CALLED_FROM", "/home/somebody")
    options = arguments.parse(["--checkpoint", "models/9b", "--config", "/etc/autoglm.yaml", "--log", "server.log"])
    assert options.checkpoint == Path("/home/somebody/models/9b")
    assert options.config == Path("/etc/autoglm.yaml")
    assert options.log == Path("/home/somebody/server.log")


def test_options_that_override_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOGLM_OVERRIDES", "engine: {max_batch_size: 2}")
    assert load_config(overrides=arguments.parse([]).overrides).engine.max_batch_size == 2
    config = load_config(overrides=arguments.parse(["--use-int8", "--kv-cache-dtype", "fp8"]).overrides)
    assert (config.quantization.enabled, config.engine.kv_cache_dtype) == (True, "float8")
    assert load_config(overrides=arguments.parse(["--no-int8"]).overrides).quantization.enabled is False
    with pytest.raises(SystemExit):
        arguments.parse(["--use-int8", "--no-int8"])


def test_ports_must_differ(checkpoint: Path) -> None:
    with pytest.raises(LauncherError, match="http 9000, grpc 9000"):
        parse(checkpoint, "--http-port", "9000", "--grpc-port", "9000").check()


def test_the_gateway_has_a_port_unless_it_is_disabled(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert arguments.parse([]).gateway_port == 8080
    assert arguments.parse(["--gateway-port", "9090"]).gateway_port == 9090
    assert arguments.parse(["--no-gateway"]).gateway_port is None
    assert arguments.parse(["--once"]).gateway_port is None
    with pytest.raises(LauncherError, match="metrics 8002, gateway 8000"):
        parse(checkpoint, "--gateway-port", "8000").check()
    assert arguments.parse([]).keys is None
    monkeypatch.setenv("AUTOGLM_CALLED_FROM", "/home/somebody")
    monkeypatch.setenv("AUTOGLM_API_KEYS", "secret/keys")
    assert arguments.parse([]).keys == Path("/home/somebody/secret/keys")


@pytest.mark.parametrize("name", ["http", "gateway"])
def test_the_command_names_a_taken_port(checkpoint: Path, free_ports: list[str], name: str) -> None:
    """Through the shell script: it ends before it installs anything, with one line and exit code 1."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        free_ports[free_ports.index(f"--{name}-port") + 1] = str(port)
        command = [str(ROOT / "run_autoglm_server.sh"), "--checkpoint", checkpoint.name, *free_ports]
        result = subprocess.run(
            command, capture_output=True, text=True, cwd=checkpoint.parent, env={**os.environ, "LC_ALL": "C"}
        )
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        f"autoglm: error: {name} port {port} cannot be used on 127.0.0.1 (Address already in use): "
        f"stop the process that uses it, or choose another --{name}-port"
    ]
