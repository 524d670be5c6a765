"""Reads a checkpoint's tensors from safetensors, one at a time, and copies them into modules."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from safetensors import safe_open
from torch import nn

from autoglm.checkpoint import Checkpoint, CheckpointError
from autoglm.quantization.bitsandbytes import COMPANIONS, read_int8
from autoglm.quantization.int8 import copy_weight
from autoglm.quantization.linear import (
    CheckpointTensors,
    Int8Linear,
    Linear,
    Tensor,
    VocabParallelEmbedding,
    WeightShard,
)


def read_weights(
    checkpoint: Checkpoint, prefixes: tuple[str, ...], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yield (full name, tensor) for every tensor under one of `prefixes`, in its own dtype, on `device`.

    Tensors quantised by bitsandbytes are yielded as `Int8Weight`.
    """
    for shard in checkpoint.shards:
        with safe_open(shard, framework="pt", device=str(device)) as file:
            names = set(file.keys())
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name.startswith(prefixes) and not name.endswith(COMPANIONS):
                    tensor = file.get_tensor(name)
                    is_float = tensor.dtype != torch.int8
                    yield name, tensor if is_float else read_int8(tensor, name, names, file.get_tensor)


def checkpoint_tensors(module: nn.Module) -> CheckpointTensors:
    """The checkpoint's tensors in a module: their names relative to the module, and the memory they are copied to.

    A shared parameter (tied embeddings) is yielded once, under its first name.
    """
    seen: set[int] = set()
    for path, part in module.named_modules():
        parent, _, name = path.rpartition(".")
        if isinstance(part, (Linear, Int8Linear, VocabParallelEmbedding)):
            if isinstance(part, Int8Linear) or id(part.weight) not in seen:
                for tensor_name, tensor in part.checkpoint_tensors(name):
                    yield f"{parent}.{tensor_name}".removeprefix("."), tensor
            if isinstance(part, VocabParallelEmbedding):
                seen.add(id(part.weight))
            continue
        for tensor_name, parameter in part.named_parameters(recurse=False):
            seen.add(id(parameter))
            yield f"{path}.{tensor_name}".removeprefix("."), parameter.data


def load_parameters(module: nn.Module, weights: Iterable[tuple[str, Tensor]], rename: Mapping[str, str]) -> None:
    """Copy checkpoint tensors into `module`, converting each to the dtype of its parameter, including INT8.

    Args:
        rename: checkpoint name prefix -> module name prefix.

    Raises:
        CheckpointError: a tensor is missing, unknown, repeated or has another shape.
    """
    targets = dict(checkpoint_tensors(module))
    for full_name, tensor in weights:
        name = next(new + full_name[len(old) :] for old, new in rename.items() if full_name.startswith(old))
        target = targets.pop(name, None)
        if target is None:
            raise CheckpointError(f"unexpected tensor {full_name}")
        if target.shape != tensor.shape:
            expected, shape = list(target.shape), list(tensor.shape)
            raise CheckpointError(f"tensor {full_name} must have shape {expected} (got {shape})")
        if isinstance(target, WeightShard):
            target.load(tensor)
        else:
            copy_weight(target, tensor)
    if targets:
        raise CheckpointError(f"{len(targets)} tensors are missing, the first is {next(iter(targets))}")
