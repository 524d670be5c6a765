"""The language model on several ranks, each a process with gloo, against the model on one."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from autoglm.checkpoint import Checkpoint
from autoglm.config import LayerQuantization, LayerSpecific, QuantizationConfig
from autoglm.distributed.communicator import Communicator, ProcessGroup, SingleRank
from autoglm.llm.loader import LoadConfig, load_language_model
from autoglm.llm.prefill import prefill

CHECKPOINT = Path(__file__).parents[2] / "demo" / "checkpoint"
GROUPED = LayerQuantization(group_size=128)
ASYMMETRIC = LayerQuantization(symmetric=False)
FORMATS = [
    None,
    QuantizationConfig(enabled=True),
    QuantizationConfig(enabled=True, layer_specific=LayerSpecific(attention=GROUPED, ffn=GROUPED)),
    QuantizationConfig(enabled=True, layer_specific=LayerSpecific(attention=ASYMMETRIC, ffn=ASYMMETRIC)),
]


def logits(communicator: Communicator) -> list[torch.Tensor]:
    """Of a prompt, in each format."""
    checkpoint, found = Checkpoint.open(CHECKPOINT), []
    for settings in FORMATS:
        model = load_language_model(
            checkpoint, torch.device("cpu"), torch.float32, LoadConfig(settings), communicator=communicator
        )
        length = 1 if settings else 24  # int8 activations of several rows have each rank's own scales
        with torch.inference_mode():
            ids = torch.arange(length) * 7 % checkpoint.text.vocab_size
            positions = torch.arange(length, dtype=torch.int32).expand(3, -1)
            hidden, _ = prefill(model, model.embed(ids), positions)
            found.append(model.logits(hidden))
    return found


def run_rank(rank: int, size: int, store: Path, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=size)
    group = dist.group.WORLD
    assert group is not None
    pipe.send([each.numpy().copy() for each in logits(ProcessGroup(group))])
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 4, 8])
def test_logits_equal_those_of_one_rank(tmp_path: Path, size: int) -> None:
    """The demo's checkpoint has 8 heads and 2 key-value heads; shards of 8 ranks begin within groups."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(size)]
    processes = [
        context.Process(target=run_rank, args=(rank, size, tmp_path / "store", pipe))
        for rank, (_, pipe) in enumerate(pipes)
    ]
    for process, (_, pipe) in zip(processes, pipes, strict=True):
        process.start()
        pipe.close()  # in this process: `recv` then raises when the rank has died
    ranks = [[torch.from_numpy(each) for each in pipe.recv()] for pipe, _ in pipes]
    for process in processes:
        process.join()
    for own, first, expected in zip(zip(*ranks, strict=True), ranks[0], logits(SingleRank()), strict=True):
        assert all(torch.equal(each, first) for each in own)
        assert torch.allclose(first, expected, atol=1e-4)
