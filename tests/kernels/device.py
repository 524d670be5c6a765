"""The device that the kernels under test run on."""

from dataclasses import replace
from types import ModuleType

import pytest
import torch

from autoglm.device import device_info

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_num_sms(monkeypatch: pytest.MonkeyPatch, module: ModuleType, num_sms: int) -> None:
    """Let the kernels of a module be launched as on a device with this number of SMs."""
    monkeypatch.setattr(module, "device_info", lambda device: replace(device_info(device), num_sms=num_sms))
