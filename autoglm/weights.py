"""A checkpoint's tensors: read from safetensors, one at a time, into modules."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from safetensors import safe_open
from torch import nn

from autoglm.checkpoint import Checkpoint, CheckpointError
from autoglm.quantization.bitsandbytes import COMPANIONS, read_int8
from autoglm.quantization.int8 import Int8Weight, quantize_into
from autoglm.quantization.linear import Int8Linear

Tensor = torch.Tensor | Int8Weight


def read_weights(
    checkpoint: Checkpoint, prefixes: tuple[str, ...], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yield (full name, tensor) of every tensor under one of `prefixes`, each in its own dtype, on `device`.

    What bitsandbytes has quantised comes as an `Int8Weight`.
    """
    for shard in checkpoint.shards:
        with safe_open(shard, framework="pt", device=str(device)) as file:
            names = set(file.keys())
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name.startswith(prefixes) and not name.endswith(COMPANIONS):
                    tensor = file.get_tensor(name)
                    whole = tensor.dtype != torch.int8
                    yield name, tensor if whole else read_int8(tensor, name, names, file.get_tensor)


def load_parameters(
    module: nn.Module,
    weights: Iterable[tuple[str, Tensor]],
    rename: Mapping[str, str],
    fused: Mapping[str, tuple[str, slice]] | None = None,
) -> None:
    """Copy checkpoint tensors into `module`, casting each to its parameter's dtype, INT8 included.

    Args:
        module: its parameters must all be covered, rows of fused ones included.
        rename: checkpoint name prefix -> module name prefix.
        fused: end of a checkpoint tensor's module name -> (what stands there instead, the tensor's rows in it).

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    targets: dict[str, Tensor] = {name: parameter.data for name, parameter in module.named_parameters()}
    targets |= {f"{name}.weight": part.weight for name, part in module.named_modules() if isinstance(part, Int8Linear)}
    rows_left = {name: target.shape[0] for name, target in targets.items()}
    for full_name, tensor in weights:
        name = next(new + full_name[len(old) :] for old, new in rename.items() if full_name.startswith(old))
        rows = slice(None)
        owner, _, kind = name.rpartition(".")
        for part, (whole, part_rows) in (fused or {}).items():
            if f".{owner}".endswith(f".{part}"):
                name, rows = f"{owner.removesuffix(part)}{whole}.{kind}", part_rows
        if name not in targets:
            raise CheckpointError(f"unexpected tensor {full_name}")
        whole_target = targets[name]
        target = whole_target.rows(rows) if isinstance(whole_target, Int8Weight) else whole_target[rows]
        if target.shape != tensor.shape:
            raise CheckpointError(f"tensor {full_name} has shape {list(tensor.shape)}, expected {list(target.shape)}")
        _copy(target, tensor)
        rows_left[name] -= target.shape[0]
    missing = [name for name, left in rows_left.items() if left != 0]
    if missing:
        raise CheckpointError(f"{len(missing)} tensors are missing or doubled, the first is {missing[0]}")


def _copy(target: Tensor, source: Tensor) -> None:
    """Between float and INT8 in every direction; from INT8 to INT8 of the same kind nothing is rounded."""
    if isinstance(target, torch.Tensor):
        target.copy_(source if isinstance(source, torch.Tensor) else source.dequantize(target.dtype))
    elif isinstance(source, torch.Tensor):
        quantize_into(target, source)
    elif target.groups == 1 and target.offsets is None:
        target.values.copy_(source.values)
        target.scales.copy_(source.scales)
    else:
        quantize_into(target, source.dequantize())
