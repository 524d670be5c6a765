"""Start-up time, and memory of the weights.

    python -m benchmarks.start --checkpoint DIR [--setting int8|bf16]

Each start is a new process, timed from its creation to the first token of a prompt of 16 tokens. cold-start-s begins
with empty caches: it reads and quantises the checkpoint, writes the weight cache (int8 only) and compiles the kernels.
warm-start-s uses these caches, on the disk of TMPDIR and still in the system's page cache; median. Only the language
model is loaded; a server loads the ViT in another process at the same time.

weights-gib: memory of the weights on the device: the language model's (scales and embedding table included), and the
ViT's in bf16.
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
WARM_STARTS = 3


def start(options: argparse.Namespace, caches: Path) -> dict[str, Any]:
    """The output of one process: seconds by stage, and bytes of the language model's weights."""
    environment = {"AUTOGLM_CACHE": str(caches / "weights"), "TRITON_CACHE_DIR": str(caches / "kernels")}
    command = [sys.executable, "-m", "benchmarks.first_token", "--checkpoint", str(options.checkpoint.resolve())]
    command += ["--setting", options.setting, "--started", repr(time.time())]
    environment = os.environ | environment
    ran = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    output: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return output


def measure(options: argparse.Namespace, warm_starts: int = WARM_STARTS) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="autoglm-start-") as folder:
        cold, *warm = (start(options, Path(folder)) for _ in range(1 + warm_starts))
    median = sorted(warm, key=total)[warm_starts // 2]
    rows = [
        make_row(options, name, total(output), "s", also={f"s {stage}": s for stage, s in output["stages"].items()})
        for name, output in (("cold-start-s", cold), ("warm-start-s", median))
    ]
    checkpoint = Checkpoint.open(options.checkpoint)
    vit = VisionTransformer.load(checkpoint, *choose_device(load_config().model))
    gib = (median["weights"] + resident_bytes(vit)) / limits.GIB
    limit = limits.resident_gib(checkpoint.text, checkpoint.vision, options.setting)
    return [*rows, make_row(options, "weights-gib", gib, "GiB", limit)]


def total(output: dict[str, Any]) -> float:
    seconds: float = sum(output["stages"].values())
    return seconds


def main() -> None:
    options = read_options(__doc__)
    report(options, "start", measure(options))


if __name__ == "__main__":
    main()
