"""The language model on several ranks, each a process with gloo, against the model on one."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from autoglm.checkpoint import Checkpoint
from autoglm.config import LayerQuantization, LayerSpecific, QuantizationConfig
from autoglm.distributed.communicator import ProcessGroup
from autoglm.llm.loader import LoadConfig, load_language_model
from autoglm.llm.prefill import prefill

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
GROUPED = LayerQuantization(group_size=128)
FORMATS = {
    "float": None,
    "int8": QuantizationConfig(enabled=True),
    "grouped": QuantizationConfig(enabled=True, layer_specific=LayerSpecific(attention=GROUPED, ffn=GROUPED)),
}


def logits(path: Path, settings: QuantizationConfig | None, communicator: ProcessGroup | None = None) -> torch.Tensor:
    checkpoint = Checkpoint.open(path)
    config = LoadConfig(settings)
    model = load_language_model(checkpoint, CPU, torch.float32, config, communicator=communicator)
    with torch.inference_mode():
        length = 1 if settings else 24  # int8 activations of several rows have each rank's own scales
        ids = torch.arange(length) * 7 % checkpoint.text.vocab_size
        positions = torch.arange(length, dtype=torch.int32).expand(3, -1)
        hidden, _ = prefill(model, model.embed(ids), positions)
        return model.logits(hidden).clone()


def rank_main(rank: int, size: int, store: str, path: Path, settings: QuantizationConfig | None, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    group = dist.group.WORLD
    assert group is not None
    pipe.send(logits(path, settings, ProcessGroup(group)).numpy())
    dist.destroy_process_group()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("size", [2, 4, 8])
def test_logits_equal_those_of_one_rank(tmp_path: Path, size: int, form: str) -> None:
    """The demo's checkpoint has 8 heads and 2 key-value heads; shards of 8 ranks begin within groups."""
    path, settings = ROOT / "demo" / "checkpoint", FORMATS[form]
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(size):
        own, other = context.Pipe()
        arguments = (rank, size, str(tmp_path / "store"), path, settings, other)
        processes.append(context.Process(target=rank_main, args=arguments))
        processes[-1].start()
        pipes.append(own)
    found = [torch.from_numpy(pipe.recv()) for pipe in pipes]
    for process in processes:
        process.join()
    for each in found[1:]:
        assert torch.equal(each, found[0])
    assert torch.allclose(found[0], logits(path, settings), atol=1e-4)
