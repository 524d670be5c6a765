"""A checkpoint's tensors: read from safetensors, one at a time, into modules."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from safetensors import safe_open
from torch import nn

from autoglm.checkpoint import Checkpoint, CheckpointError


def read_weights(
    checkpoint: Checkpoint, prefixes: tuple[str, ...], device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (full name, tensor) of every tensor under one of `prefixes`, each in its own dtype, on `device`."""
    for shard in checkpoint.shards:
        with safe_open(shard, framework="pt", device=str(device)) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name.startswith(prefixes):
                    yield name, file.get_tensor(name)


def load_parameters(
    module: nn.Module,
    weights: Iterable[tuple[str, torch.Tensor]],
    rename: Mapping[str, str],
    fused: Mapping[str, tuple[str, slice]] | None = None,
) -> None:
    """Copy checkpoint tensors into `module`, casting each to its parameter's dtype.

    Args:
        module: its parameters must all be covered, rows of fused ones included.
        rename: checkpoint name prefix -> module name prefix.
        fused: last module name of a checkpoint tensor -> (module name it is a part of, its rows there).

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    parameters = dict(module.named_parameters())
    rows_left = {name: parameter.shape[0] for name, parameter in parameters.items()}
    for full_name, tensor in weights:
        name = next(new + full_name[len(old) :] for old, new in rename.items() if full_name.startswith(old))
        rows = slice(None)
        owner, _, kind = name.rpartition(".")
        parent, _, leaf = owner.rpartition(".")
        if fused and leaf in fused:
            whole, rows = fused[leaf]
            name = f"{parent}.{whole}.{kind}"
        if name not in parameters:
            raise CheckpointError(f"unexpected tensor {full_name}")
        target = parameters[name].data[rows]
        if target.shape != tensor.shape:
            raise CheckpointError(f"tensor {full_name} has shape {list(tensor.shape)}, expected {list(target.shape)}")
        target.copy_(tensor)
        rows_left[name] -= target.shape[0]
    missing = [name for name, left in rows_left.items() if left != 0]
    if missing:
        raise CheckpointError(f"{len(missing)} tensors are missing or doubled, the first is {missing[0]}")
