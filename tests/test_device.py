"""The choice of device and dtype, and the side stream. Tests without a GPU."""

import pytest
import torch

from autoglm.config import ConfigError, ModelConfig
from autoglm.device import choose_device, device_info, run_on_side_stream

CPU = torch.device("cpu")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_auto_is_float32_on_the_cpu() -> None:
    assert choose_device(ModelConfig()) == (CPU, torch.float32)
    assert choose_device(ModelConfig(dtype="bfloat16"), index=3) == (CPU, torch.bfloat16)


def test_the_cpu_can_be_configured() -> None:
    assert choose_device(ModelConfig(device="cpu", dtype="float16")) == (CPU, torch.float16)


@pytest.mark.usefixtures("no_gpu")
def test_a_missing_gpu_is_an_error_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match=r"^model\.device .*GPU 1 "):
        choose_device(ModelConfig(device="cuda"), index=1)


def test_the_cpu_has_the_facts_that_kernels_need() -> None:
    info = device_info(CPU)
    assert info.num_sms >= 1 and info.capability == (0, 0)


def test_on_the_cpu_the_side_stream_is_a_call() -> None:
    assert run_on_side_stream(CPU, lambda: torch.ones(2).sum().item()) == 2
    with pytest.raises(RuntimeError, match="failed"):
        run_on_side_stream(CPU, fail)


def fail() -> None:
    raise RuntimeError("failed")
