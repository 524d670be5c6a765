"""Shards of linear layers, filled from whole checkpoint tensors."""

import pytest
import torch
from torch import nn

from autoglm.distributed.shard import Shard
from autoglm.quantization.int8 import Int8Weight, quantize
from autoglm.quantization.linear import ColumnParallelLinear, Int8Linear, Linear, RowParallelLinear
from autoglm.weights.reader import load_parameters

INPUTS = 3 * 128  # shards of 2, 4 and 8 ranks begin within a group
FORMATS = [None, (True, False), (True, True), (False, False), (False, True)]  # (symmetric, grouped)
formats = pytest.mark.parametrize("form", FORMATS, ids=str)
sizes = pytest.mark.parametrize("size", [1, 2, 4, 8])


def filled(layer: Linear, tensors: dict[str, torch.Tensor], form: tuple[bool, bool] | None) -> Linear | Int8Linear:
    parent = nn.Module()
    parent.layer = layer if form is None else layer.to_int8(symmetric=form[0], grouped=form[1])
    load_parameters(parent, tensors.items(), {"": ""})
    return parent.layer


def whole(tensor: torch.Tensor, form: tuple[bool, bool] | None) -> torch.Tensor:
    return tensor if form is None else quantize(tensor, *form).dequantize()


def dense(layer: Linear | Int8Linear) -> torch.Tensor:
    weight = layer.weight
    return weight.dequantize() if isinstance(weight, Int8Weight) else weight.detach()


@formats
@sizes
def test_the_products_of_row_shards_add_up(size: int, form: tuple[bool, bool] | None) -> None:
    weight = torch.randn(24, INPUTS)
    expected = whole(weight, form)
    columns = []
    for rank in range(size):
        layer = filled(RowParallelLinear(INPUTS, 24, Shard(rank, size)), {"layer.weight": weight}, form)
        columns.append(dense(layer))
    assert torch.equal(torch.cat(columns, 1), expected)
    x = torch.randn(5, INPUTS)
    products = [part @ own.T for part, own in zip(torch.split(x, INPUTS // size, 1), columns, strict=True)]
    assert torch.allclose(sum(products, torch.zeros(5, 24)), x @ expected.T, atol=1e-4)


@formats
@sizes
def test_column_shards_are_the_rows_of_each_block(size: int, form: tuple[bool, bool] | None) -> None:
    q, k, gate_up = torch.randn(64, INPUTS), torch.randn(8, INPUTS), torch.randn(2 * 16, INPUTS)
    biases = {"q.bias": torch.randn(64), "k.bias": torch.randn(8), "gate_up.bias": torch.randn(32)}
    gate, up = gate_up.chunk(2)
    for rank in range(size):
        parts = {"q": (64,), "k": (8,), "gate_up": (16, 16)}
        layer = ColumnParallelLinear(INPUTS, parts, Shard(rank, size), bias=True, unit=4)
        tensors = {"q.weight": q, "k.weight": k, "gate_up.weight": gate_up, **biases}
        found = filled(layer, tensors, form)
        own = Shard(rank, size)
        # k has two units of 4 rows: four ranks share each where there are eight.
        picks = [(q, own.of(16)), (k, own.of(2)), (gate, own.of(4)), (up, own.of(4))]
        expected = [whole(tensor, form)[4 * part.start : 4 * part.stop] for tensor, part in picks]
        assert torch.equal(dense(found), torch.cat(expected))
        shifted = [biases["q.bias"], biases["k.bias"], *biases["gate_up.bias"].chunk(2)]
        kept = [bias[4 * part.start : 4 * part.stop] for bias, (_, part) in zip(shifted, picks, strict=True)]
        assert found.bias is not None
        assert torch.equal(found.bias.detach(), torch.cat(kept))


@pytest.mark.parametrize("grouped", [False, True])
def test_a_shard_of_an_int8_checkpoint_keeps_its_values(grouped: bool) -> None:
    source = quantize(torch.randn(16, INPUTS))
    for rank in range(4):
        parent = nn.Module()
        layer = RowParallelLinear(INPUTS, 16, Shard(rank, 4))
        parent.layer = layer.to_int8(symmetric=True, grouped=grouped)
        load_parameters(parent, [("layer.weight", source)], {"": ""})
        own = slice(rank * INPUTS // 4, (rank + 1) * INPUTS // 4)
        expected = quantize(source.dequantize(), grouped=True).dequantize() if grouped else source.dequantize()
        assert torch.equal(dense(parent.layer), expected[:, own])


@pytest.mark.parametrize(("count", "size"), [(2, 4), (2, 8), (7, 2), (13696, 8), (151552, 8), (5, 5)])
def test_units_are_split_evenly_or_shared(count: int, size: int) -> None:
    parts = [Shard(rank, size).of(count) for rank in range(size)]
    lengths = [part.stop - part.start for part in parts]
    assert sorted({unit for part in parts for unit in range(part.start, part.stop)}) == list(range(count))
    if count >= size:
        assert sum(lengths) == count
        assert max(lengths) - min(lengths) <= 1
    else:
        assert set(lengths) == {1}
        assert [part.start for part in parts] == sorted(part.start for part in parts)
