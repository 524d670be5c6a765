"""The kernels run on a GPU if there is one, otherwise under Triton's interpreter on CPU tensors."""

import os
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
elif not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    from tests.kernels import interpreter

    interpreter.patch()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
