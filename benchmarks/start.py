"""How long a start takes, and how much memory the weights take.

    python -m benchmarks.start --checkpoint DIR [--setting int8|bf16]

Each start is a fresh process, timed from before it exists to the first token of a prompt of 16 tokens. cold-start-s
finds empty caches: it reads and quantises the checkpoint, writes the weight cache (nothing of that for bf16, which has
none) and compiles the kernels. warm-start-s is the start after that, from the same caches on this machine's disk
(TMPDIR says which), whose files the system still holds in memory; median. The language model only: in the server, the
ViT loads beside it in another process.

weights-gib: memory of the language model's weights (scales and embedding table included) and of the ViT's in bf16,
summed over the tensors that lie on the device.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from autoglm.checkpoint import Checkpoint
from autoglm.config import load_config
from autoglm.device import choose_device
from autoglm.vision.vit import VisionTransformer
from benchmarks import limits
from benchmarks.engines import resident_bytes
from benchmarks.report import Row, make_row, read_options, report

ROOT = Path(__file__).parents[1]
WARM = 3


def start(options: argparse.Namespace, caches: Path) -> dict[str, Any]:
    """What one process says: its stages' seconds by name, and the bytes of the language model's weights."""
    places = {"AUTOGLM_CACHE": str(caches / "weights"), "TRITON_CACHE_DIR": str(caches / "kernels")}
    command = [sys.executable, "-m", "benchmarks.first_token", "--checkpoint", str(options.checkpoint.resolve())]
    command += ["--setting", options.setting, "--began", repr(time.time())]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | places, stdout=subprocess.PIPE, text=True, check=True)
    said: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return said


def measure(options: argparse.Namespace, warm: int = WARM) -> list[Row]:
    """cold-start-s, warm-start-s of so many starts, and weights-gib."""
    with tempfile.TemporaryDirectory(prefix="autoglm-start-") as folder:
        cold, *others = (start(options, Path(folder)) for _ in range(1 + warm))
    usual = sorted(others, key=total)[warm // 2]
    rows = [
        make_row(options, name, total(said), "s", also={f"s {stage}": value for stage, value in said["stages"].items()})
        for name, said in (("cold-start-s", cold), ("warm-start-s", usual))
    ]
    checkpoint = Checkpoint.open(options.checkpoint)
    vit = VisionTransformer.load(checkpoint, *choose_device(load_config().model))
    gib = (usual["weights"] + resident_bytes(vit)) / limits.GIB
    limit = limits.resident_gib(checkpoint.text, checkpoint.vision, options.setting)
    return [*rows, make_row(options, "weights-gib", gib, "GiB", limit)]


def total(said: dict[str, Any]) -> float:
    seconds: float = sum(said["stages"].values())
    return seconds


def main() -> None:
    options = read_options(__doc__)
    report(options, "start", measure(options))


if __name__ == "__main__":
    main()
