"""The screens that users send."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

SAMPLES = Path(__file__).resolve().parents[1] / "demo" / "samples"


class Sample(NamedTuple):
    """A task and the PNG file that it is about."""

    task: str
    image: bytes


def read_samples(directory: Path) -> list[Sample]:
    """The samples that `samples.json` in `directory` lists: objects with the keys "image" (file name) and "task"."""
    listed = json.loads((directory / "samples.json").read_text("utf-8"))
    return [Sample(entry["task"], (directory / entry["image"]).read_bytes()) for entry in listed]
