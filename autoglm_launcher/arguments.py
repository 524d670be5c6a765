"""The command line of run_autoglm_server.sh."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from autoglm_launcher import ROOT
from autoglm_launcher.console import LauncherError
from autoglm_launcher.gpus import check_gpus
from autoglm_launcher.ports import Ports, check_ports

DEMO_CHECKPOINT = ROOT / "demo" / "checkpoint"
DEMO_SPEECH = ROOT / "demo" / "speech"
CACHE_DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp32": "float32", "fp8": "float8", "int8": "int8"}


@dataclass(frozen=True)
class Options:
    """What to serve and where. log: None means standard output. tritonserver: None means the wheel's.

    speech, bridge: directories of the speech encoder and of its projector; None means without.
    overrides: values that the command line sets over the configuration, in YAML; empty for none.
    spoken: the request that proves that the server answers is a spoken one.
    gateway_port: None means without a gateway. keys: the file of its callers' keys; None means that they need none.
    """

    checkpoint: Path
    config: Path
    preset: Path | None
    speech: Path | None
    bridge: Path | None
    overrides: str
    gpus: tuple[int, ...] | None
    host: str
    ports: Ports
    gateway_port: int | None
    keys: Path | None
    once: bool
    spoken: bool
    log: Path | None
    tritonserver: Path | None

    def check(self) -> None:
        """Raise LauncherError for what is not there, before anything is installed or started."""
        if not (self.checkpoint / "config.json").is_file():
            reason = "has no config.json" if self.checkpoint.is_dir() else "is no directory"
            raise LauncherError(f"checkpoint {self.checkpoint} {reason}: give --checkpoint a Hugging Face directory")
        if not any(self.checkpoint.glob("*.safetensors")):
            raise LauncherError(f"checkpoint {self.checkpoint} has no *.safetensors: its weights are not downloaded")
        for name, directory in (("--speech", self.speech), ("--bridge", self.bridge)):
            if directory is not None and not (directory / "config.json").is_file():
                raise LauncherError(f"{directory} has no config.json: give {name} the directory of its weights")
        if self.bridge is not None and self.speech is None:
            raise LauncherError("--bridge needs --speech: a projector works with its encoder only")
        if not self.config.is_file():
            raise LauncherError(f"configuration {self.config} is no file: give --config a YAML file")
        if self.preset is not None and not self.preset.is_file():
            there = ", ".join(sorted(path.stem for path in (ROOT / "presets").glob("*.yaml")))
            raise LauncherError(f"there is no preset {self.preset.stem} ({self.preset}): there are {there}")
        if self.gpus is not None:
            check_gpus(self.gpus)
        gateway = {} if self.gateway_port is None else {"gateway": self.gateway_port}
        check_ports(asdict(self.ports) | gateway, self.host)


def parse(argv: Sequence[str]) -> Options:
    """Exits with 2 and a usage line when the command line cannot be read."""
    parser = argparse.ArgumentParser(
        prog="./run_autoglm_server.sh",
        description="Serve an AutoGLM checkpoint with the NVIDIA Triton Inference Server. Installs into .venv first.",
        epilog="Environment: AUTOGLM_PYTHON (the Python to use), AUTOGLM_TORCH_INDEX (a pip index for PyTorch), "
        "AUTOGLM_ADMIN_KEY (opens the server's closed APIs), AUTOGLM_CACHE (where quantised weights are kept), "
        "AUTOGLM_API_KEYS (a file of the keys that the gateway asks for, one a line), "
        "AUTOGLM_CHECKPOINT, AUTOGLM_SPEECH, AUTOGLM_BRIDGE, AUTOGLM_CONFIG, AUTOGLM_OVERRIDES (lines of it).",
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="DIR", help="Hugging Face directory to serve (default: demo/checkpoint)")
    add("--config", type=Path, metavar="FILE", help="configuration (default: autoglm-config.yaml)")
    speech_help = "Hugging Face directory of Wav2Vec2, to hear (without DIR: the demo's); --once asks by voice then"
    add("--speech", type=Path, metavar="DIR", nargs="?", const=DEMO_SPEECH / "encoder", help=speech_help)
    add("--bridge", type=Path, metavar="DIR", help="its projector to embeddings, for audio_mode bridge")
    add("--preset", metavar="NAME", help="presets/NAME.yaml replaces lines of the configuration")
    int8 = parser.add_mutually_exclusive_group()
    int8.add_argument("--use-int8", action="store_true", default=None, help="quantise the language model's weights")
    int8.add_argument("--no-int8", action="store_false", dest="use_int8", help="do not (default: on a GPU)")
    add("--kv-cache-dtype", choices=CACHE_DTYPES, help="of keys and values (default: auto, as the model)")
    add("--gpus", type=_gpus, metavar="0,1", help="the GPUs to use (default: all)")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)")
    add("--http-port", type=_port, default=Ports.http, metavar="N", help="default: %(default)s")
    add("--grpc-port", type=_port, default=Ports.grpc, metavar="N", help="default: %(default)s")
    add("--metrics-port", type=_port, default=Ports.metrics, metavar="N", help="default: %(default)s")
    add("--gateway-port", type=_port, default=8080, metavar="N", help="of OpenAI's protocol (default: %(default)s)")
    add("--no-gateway", action="store_true", help="serve Triton's own protocols only")
    add("--once", action="store_true", help="answer one sample screenshot, print thought and action, and stop")
    add("--log", metavar="FILE", help="the server's log (default: logs/server-PORT.log); - is standard output")
    add("--tritonserver", type=Path, metavar="PATH", help="use this tritonserver, and this Python; install nothing")
    given = parser.parse_args(argv)
    # The shell script changes to the repository; what the caller names is relative to where the caller was.
    base = Path(os.environ.get("AUTOGLM_CALLED_FROM") or Path.cwd())
    preset = ROOT / "presets" / f"{given.preset}.yaml" if given.preset else _from_environment("PRESET")
    log = Path(given.log or ROOT / "logs" / f"server-{given.http_port}.log")
    checkpoint = base / (given.checkpoint or _from_environment("CHECKPOINT") or DEMO_CHECKPOINT)
    keys = _from_environment("API_KEYS")
    speech = given.speech or _from_environment("SPEECH")
    bridge = given.bridge or _from_environment("BRIDGE")
    if checkpoint.resolve() == DEMO_CHECKPOINT and speech in (None, DEMO_SPEECH / "encoder") and bridge is None:
        speech, bridge = speech or _if_there(DEMO_SPEECH / "encoder"), _if_there(DEMO_SPEECH / "bridge")
    return Options(
        checkpoint=checkpoint,
        config=base / (given.config or _from_environment("CONFIG") or ROOT / "autoglm-config.yaml"),
        preset=preset and base / preset,
        speech=speech and base / speech,
        bridge=bridge and base / bridge,
        overrides=_overrides(given) or os.environ.get("AUTOGLM_OVERRIDES", ""),
        gpus=given.gpus,
        host=given.host,
        ports=Ports(given.http_port, given.grpc_port, given.metrics_port),
        gateway_port=None if given.no_gateway or given.once else given.gateway_port,
        keys=keys and base / keys,
        once=given.once,
        spoken=given.once and given.speech is not None,
        log=None if given.log == "-" else base / log,
        tritonserver=given.tritonserver and base / given.tritonserver,
    )


def _from_environment(name: str) -> Path | None:
    value = os.environ.get(f"AUTOGLM_{name}")
    return Path(value) if value else None


def _if_there(directory: Path) -> Path | None:
    return directory if directory.is_dir() else None


def _overrides(given: argparse.Namespace) -> str:
    sections: dict[str, dict[str, object]] = {}
    if given.use_int8 is not None:
        sections["quantization"] = {"enabled": given.use_int8}
    if given.kv_cache_dtype:
        sections["engine"] = {"kv_cache_dtype": CACHE_DTYPES[given.kv_cache_dtype]}
    return json.dumps(sections) if sections else ""


def _gpus(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of different GPU numbers such as 0,1")
    return tuple(map(int, parts))


def _port(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port number from 1 to 65535")
    return int(text)
