"""docker-compose.yml and Dockerfile are valid and consistent with each other and with the repository."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from autoglm_launcher import ROOT, arguments
from autoglm_launcher.ports import Ports

WORKDIR = "/opt/autoglm"
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    server: dict[str, Any] = services["server"]
    return server


@pytest.fixture(scope="module")
def dockerfile() -> list[tuple[str, str]]:
    """The instructions, in order: name and arguments, continued lines joined."""
    text = (ROOT / "Dockerfile").read_text()
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1].strip()) for line in text.splitlines() if line.strip()]


def only(dockerfile: list[tuple[str, str]], name: str) -> str:
    (value,) = [arguments for instruction, arguments in dockerfile if instruction == name]
    return value


def default_of(text: str) -> str:
    """The value of ${NAME:-default} when NAME is not set."""
    return VARIABLE.sub(lambda match: match[2], text)


def copied(dockerfile: list[tuple[str, str]]) -> set[str]:
    """The paths of the repository that are copied into the image."""
    return {source for name, line in dockerfile if name == "COPY" for source in line.split()[:-1]}


def test_the_compose_file_follows_its_schema() -> None:
    pytest.importorskip("check_jsonschema", reason="check-jsonschema, which includes the schema, is not installed")
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        "docker-compose.yml",
    ]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_image_is_pinned_to_a_release(dockerfile: list[tuple[str, str]]) -> None:
    image = re.fullmatch(r"nvcr\.io/nvidia/tritonserver:(\d\d)\.(\d\d)-py3", only(dockerfile, "FROM"))
    assert image
    # The first release whose readiness detects a dead model process.
    assert (int(image[1]), int(image[2])) >= (26, 4)


def test_publishes_the_ports_the_launcher_uses(service: dict[str, Any], dockerfile: list[tuple[str, str]]) -> None:
    ports = [Ports.http, Ports.grpc, Ports.metrics, arguments.parse([]).gateway_port]
    assert [default_of(port) for port in service["ports"]] == [f"127.0.0.1:{port}:{port}" for port in ports]
    assert only(dockerfile, "EXPOSE").split() == [str(port) for port in ports]


def test_the_entry_point_is_the_launcher(dockerfile: list[tuple[str, str]]) -> None:
    python, flag, module, *options = json.loads(only(dockerfile, "ENTRYPOINT"))
    assert (python, flag, module) == (f"{WORKDIR}/.venv/bin/python", "-m", "autoglm_launcher")
    parsed = arguments.parse(options)
    assert parsed.tritonserver == Path("/opt/tritonserver/bin/tritonserver")
    assert parsed.host == "0.0.0.0"
    assert parsed.log is None
    assert parsed.ports == Ports()
    assert parsed.gateway_port == 8080
    assert only(dockerfile, "WORKDIR") == WORKDIR


def test_the_health_check_sends_a_request(service: dict[str, Any], dockerfile: list[tuple[str, str]]) -> None:
    options, _, command = only(dockerfile, "HEALTHCHECK").partition(" CMD ")
    check = service["healthcheck"]
    assert json.loads(command) == check["test"][1:]
    assert check["test"][:4] == ["CMD", f"{WORKDIR}/.venv/bin/python", "-m", "autoglm_launcher.probe"]
    assert check["test"][4:] == ["--gateway", f"127.0.0.1:{arguments.parse([]).gateway_port}"]
    for name in ("interval", "timeout", "retries", "start_period"):
        assert f"--{name.replace('_', '-')}={check[name]}" in options.split()
    # The probe times out first, with a reason: after 30 s for the server and 15 s for the gateway.
    assert int(check["timeout"].removesuffix("s")) > 30 + 15


def test_everything_that_is_copied_exists_and_reaches_the_build(dockerfile: list[tuple[str, str]]) -> None:
    included = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for source in copied(dockerfile):
        assert (ROOT / source).exists(), source
        assert any(
            source.removeprefix("./") == path or source.startswith(f"./{path}/") or source.startswith(f"{path}/")
            for path in (*included, *(f"./{path}" for path in included))
        ), f"{source} is ignored by .dockerignore"


def test_everything_that_the_server_reads_is_copied(dockerfile: list[tuple[str, str]]) -> None:
    needed = {
        "autoglm",
        "autoglm_launcher",
        "client",
        "gateway",
        "model_repository",
        "presets",
        "autoglm-config.yaml",
        "demo/samples",
        "demo/speech/samples",
        "constraints",
        "pyproject.toml",
        "LICENSE",
    }
    readme = re.search(r'^readme = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    needed |= {readme[1]} if readme else set()
    assert needed <= {source.removeprefix("./") for source in copied(dockerfile)}


def test_the_packages_of_the_started_processes_are_installed(dockerfile: list[tuple[str, str]]) -> None:
    (command,) = [line for name, line in dockerfile if name == "RUN" and "autoglm_launcher.venv" in line]
    assert command.endswith("-m autoglm_launcher.venv --no-server gateway")


def test_paths_of_volumes_and_environment_agree(service: dict[str, Any], dockerfile: list[tuple[str, str]]) -> None:
    volumes = {volume["target"]: volume for volume in service["volumes"]}
    environment = dict(re.findall(r"(\w+)=(\S+)", only(dockerfile, "ENV")))
    keys = volumes["/etc/autoglm/keys"]
    assert service["environment"]["AUTOGLM_API_KEYS"] == f"${{AUTOGLM_API_KEYS:+{keys['target']}}}"
    assert keys["read_only"] is True
    checkpoint = volumes[environment["AUTOGLM_CHECKPOINT"]]
    config = volumes[service["environment"]["AUTOGLM_CONFIG"]]
    cache = volumes[environment["XDG_CACHE_HOME"]]
    assert checkpoint["read_only"] is True
    assert config["read_only"] is True
    assert cache["type"] == "volume"
    assert (ROOT / default_of(config["source"])).is_file()
    assert ROOT / default_of(checkpoint["source"]) == arguments.DEMO_CHECKPOINT
    preset = service["environment"]["AUTOGLM_PRESET"]
    assert preset == f"${{AUTOGLM_PRESET:+{WORKDIR}/presets/${{AUTOGLM_PRESET:-}}.yaml}}"


def test_every_variable_is_read_by_the_product(service: dict[str, Any]) -> None:
    sources = "".join(
        path.read_text() for folder in ("autoglm", "autoglm_launcher") for path in (ROOT / folder).rglob("*.py")
    )
    for name in service["environment"]:
        assert name == "CUDA_VISIBLE_DEVICES" or name.removeprefix("AUTOGLM_") in sources, name


def test_the_container_has_only_the_privileges_it_needs(
    service: dict[str, Any], dockerfile: list[tuple[str, str]]
) -> None:
    assert service["user"] == only(dockerfile, "USER") == "1000:1000"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "network_mode", "ipc", "pid", "cap_add"} & service.keys()
    assert [mount.split(":")[0] for mount in service["tmpfs"]] == ["/tmp"]


def test_the_service_restarts_and_has_shared_memory_and_gpus(service: dict[str, Any]) -> None:
    assert service["restart"] == "unless-stopped"
    assert service["init"] is True
    assert int(service["shm_size"].removesuffix("gb")) >= 1
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


def test_the_stop_grace_period_is_longer_than_the_launchers(service: dict[str, Any]) -> None:
    assert int(service["stop_grace_period"].removesuffix("s")) > 15
