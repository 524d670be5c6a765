"""Copies between host and device, on the CPU; `test_cuda_graphs` checks that they do not synchronize."""

import numpy as np
import torch

from autoglm.llm.transfer import ALIGNMENT, DeviceResult, aligned, send, stage

CPU = torch.device("cpu")


def test_sizes_are_rounded_up_to_the_alignment() -> None:
    assert [aligned(count) for count in (0, 1, 4, 5, 8)] == [0, 4, 4, 8, 8]


def test_arrays_are_sent_with_their_shapes_and_aligned() -> None:
    arrays = [np.array([[1, 2, 3], [4, 5, 6]], np.int32), np.zeros(0, np.int32), np.array([7], np.int32)]
    sent = send([*arrays, np.arange(5, dtype=np.int32)[::-1]], CPU)
    assert [each.tolist() for each in sent] == [[[1, 2, 3], [4, 5, 6]], [], [7], [4, 3, 2, 1, 0]]
    assert all(each.dtype == torch.int32 for each in sent)
    assert all((each.data_ptr() - sent[0].data_ptr()) % (4 * ALIGNMENT) == 0 for each in sent)
    arrays[2][0] = 8
    assert sent[2].tolist() == [7]


def test_no_arrays_can_be_sent() -> None:
    assert send([], CPU) == []


def test_staged_arrays_are_copies() -> None:
    array = np.array([[1, 2], [3, 4]], np.int32)
    staged = stage(array, CPU)
    array[:] = 0
    assert staged.tolist() == [[1, 2], [3, 4]]


def test_a_device_result_is_a_copy_in_the_same_dtype() -> None:
    values = torch.tensor([[1.5, 2.5]], dtype=torch.float64)
    result = DeviceResult(values)
    values.zero_()
    assert torch.equal(result.wait(), torch.tensor([[1.5, 2.5]], dtype=torch.float64))
