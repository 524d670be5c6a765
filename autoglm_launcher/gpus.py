"""The NVIDIA GPUs of this machine."""

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoglm_launcher.console import LauncherError


@dataclass(frozen=True)
class Gpu:
    index: int
    name: str


def list_gpus() -> list[Gpu]:
    """The GPUs that nvidia-smi lists; none without a driver."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index,name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.split(",", 1) for line in listed.stdout.splitlines() if listed.returncode == 0]
    return [Gpu(int(row[0]), row[1].strip()) for row in rows if len(row) == 2 and row[0].strip().isdigit()]


def check_gpus(indices: Sequence[int]) -> None:
    """Raise LauncherError unless the machine has all these GPUs."""
    found = list_gpus()
    missing = [index for index in indices if index not in {gpu.index for gpu in found}]
    if missing:
        available = ", ".join(f"{gpu.index} ({gpu.name})" for gpu in found) or "no NVIDIA GPU (nvidia-smi lists none)"
        raise LauncherError(f"--gpus {','.join(map(str, indices))}: no GPU {missing[0]}, this machine has {available}")


def visible_gpu_count(environment: Mapping[str, str]) -> int:
    """The number of GPUs that a process with this environment sees."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    count = len(list_gpus())
    if visible is None:
        return count
    return min(count, len([part for part in visible.split(",") if part.strip() not in ("", "-1")]))
