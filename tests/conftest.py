"""Fixtures of all tests: a small random checkpoint, and the same model in transformers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from autoglm.checkpoint import Checkpoint
from tests.checkpoints import SHAPES, make_checkpoint

torch.set_num_threads(2)


@dataclass(frozen=True)
class Pair:
    """A checkpoint and the same weights in transformers."""

    checkpoint: Checkpoint
    reference: Any


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    directory: Path = tmp_path_factory.mktemp("plain")
    return Pair(reference=make_checkpoint(directory), checkpoint=Checkpoint.open(directory))


@pytest.fixture(scope="session", params=SHAPES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A checkpoint of every shape in turn."""
    directory: Path = tmp_path_factory.mktemp(request.param)
    return Pair(reference=make_checkpoint(directory, SHAPES[request.param]), checkpoint=Checkpoint.open(directory))
