"""The screenshots that the users send."""

import json
from pathlib import Path
from typing import NamedTuple

SAMPLES = Path(__file__).resolve().parents[1] / "demo" / "samples"


class Sample(NamedTuple):
    """A task and its screenshot, a PNG file."""

    task: str
    image: bytes


def read_samples(directory: Path) -> list[Sample]:
    """Read the samples of `samples.json`, a list of objects with the keys "image" (file name) and "task"."""
    listed = json.loads((directory / "samples.json").read_text("utf-8"))
    return [Sample(entry["task"], (directory / entry["image"]).read_bytes()) for entry in listed]
