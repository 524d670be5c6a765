"""The command line of run_autoglm_server.sh."""

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
    """What to serve and where. log: None: standard output. tritonserver: None: the wheel's.

    speech, bridge: directories of the speech encoder and of its projector; None: not loaded.
    overrides: YAML that overrides the configuration; may be empty.
    spoken: use a spoken task for the startup probe.
    gateway_port: None: no gateway. keys: a file with the gateway's API keys; None: no key is required.
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
        """Raise LauncherError for missing files, GPUs and ports, before anything is installed or started."""
        if not (self.checkpoint / "config.json").is_file():
            reason = "has no config.json" if self.checkpoint.is_dir() else "is not a directory"
            raise LauncherError(f"--checkpoint must be a Hugging Face directory ({self.checkpoint} {reason})")
        if not any(self.checkpoint.glob("*.safetensors")):
            raise LauncherError(f"--checkpoint must contain the weights ({self.checkpoint} has no *.safetensors)")
        for name, directory in (("--speech", self.speech), ("--bridge", self.bridge)):
            if directory is not None and not (directory / "config.json").is_file():
                raise LauncherError(f"{name} must be a directory of weights ({directory} has no config.json)")
        if self.bridge is not None and self.speech is None:
            raise LauncherError("--bridge requires --speech: a projector only works with its encoder")
        if not self.config.is_file():
            raise LauncherError(f"--config must be a YAML file ({self.config} is not a file)")
        if self.preset is not None and not self.preset.is_file():
            names = ", ".join(sorted(path.stem for path in (ROOT / "presets").glob("*.yaml")))
            raise LauncherError(f"--preset must be one of {names} ({self.preset} is not a file)")
        if self.gpus is not None:
            check_gpus(self.gpus)
        gateway = {} if self.gateway_port is None else {"gateway": self.gateway_port}
        check_ports(asdict(self.ports) | gateway, self.host)


def parse(argv: Sequence[str]) -> Options:
    """Exits with 2 and a usage line if an argument is invalid."""
    parser = argparse.ArgumentParser(
        prog="./run_autoglm_server.sh",
        description="Serve an AutoGLM checkpoint with the NVIDIA Triton Inference Server. Installs into .venv first.",
        epilog="Environment: AUTOGLM_PYTHON (the Python to use), AUTOGLM_TORCH_INDEX (a pip index for PyTorch), "
        "AUTOGLM_ADMIN_KEY (the key of the server's restricted APIs), AUTOGLM_CACHE (directory of quantised weights), "
        "AUTOGLM_API_KEYS (a file with the gateway's API keys, one per line), AUTOGLM_CHECKPOINT, AUTOGLM_SPEECH, "
        "AUTOGLM_BRIDGE, AUTOGLM_CONFIG, AUTOGLM_OVERRIDES (YAML that overrides the configuration).",
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="DIR", help="Hugging Face directory to serve (default: demo/checkpoint)")
    add("--config", type=Path, metavar="FILE", help="configuration (default: autoglm-config.yaml)")
    speech_help = "Wav2Vec2 directory for speech input (without DIR: the demo's); --once then asks by voice"
    add("--speech", type=Path, metavar="DIR", nargs="?", const=DEMO_SPEECH / "encoder", help=speech_help)
    add("--bridge", type=Path, metavar="DIR", help="projector of the speech encoder, for audio_mode bridge")
    add("--preset", metavar="NAME", help="presets/NAME.yaml overrides the configuration")
    int8 = parser.add_mutually_exclusive_group()
    int8.add_argument("--use-int8", action="store_true", default=None, help="quantise the language model to INT8")
    int8.add_argument("--no-int8", action="store_false", dest="use_int8", help="do not (default: quantise on a GPU)")
    add("--kv-cache-dtype", choices=CACHE_DTYPES, help="dtype of the KV cache (default: auto, the model's)")
    add("--gpus", type=_gpus, metavar="0,1", help="GPUs to use (default: all)")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)")
    add("--http-port", type=_port, default=Ports.http, metavar="N", help="default: %(default)s")
    add("--grpc-port", type=_port, default=Ports.grpc, metavar="N", help="default: %(default)s")
    add("--metrics-port", type=_port, default=Ports.metrics, metavar="N", help="default: %(default)s")
    add("--gateway-port", type=_port, default=8080, metavar="N", help="OpenAI-compatible API (default: %(default)s)")
    add("--no-gateway", action="store_true", help="serve only Triton's own APIs")
    add("--once", action="store_true", help="answer one sample screenshot, print thought and action, and exit")
    add("--log", metavar="FILE", help="server log (default: logs/server-PORT.log); -: standard output")
    add("--tritonserver", type=Path, metavar="PATH", help="use this tritonserver and this Python; install nothing")
    given = parser.parse_args(argv)
    # The shell script changes to the repository; relative paths are relative to the caller's directory.
    base = Path(os.environ.get("AUTOGLM_CALLED_FROM") or Path.cwd())
    preset = ROOT / "presets" / f"{given.preset}.yaml" if given.preset else _from_environment("PRESET")
    log = Path(given.log or ROOT / "logs" / f"server-{given.http_port}.log")
    checkpoint = base / (given.checkpoint or _from_environment("CHECKPOINT") or DEMO_CHECKPOINT)
    keys = _from_environment("API_KEYS")
    speech = given.speech or _from_environment("SPEECH")
    bridge = given.bridge or _from_environment("BRIDGE")
    if checkpoint.resolve() == DEMO_CHECKPOINT and speech in (None, DEMO_SPEECH / "encoder") and bridge is None:
        speech, bridge = speech or _if_exists(DEMO_SPEECH / "encoder"), _if_exists(DEMO_SPEECH / "bridge")
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


def _if_exists(directory: Path) -> Path | None:
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
        raise argparse.ArgumentTypeError(f"must be different GPU numbers such as 0,1 (got {text!r})")
    return tuple(map(int, parts))


def _port(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"must be a port number between 1 and 65535 (got {text!r})")
    return int(text)
