"""Programmatic dependent launch (CUDA programming guide, "Programmatic Dependent Launch").

It lets a kernel start while the previous one still runs. Every kernel of a decode step first allows its successor to
start, then loads data that no kernel writes (weights), then waits, and only then touches data of earlier kernels.
"""

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from autoglm.device import device_info

INTERPRETED = bool(knobs.runtime.interpret)
PDL = not INTERPRETED and torch.cuda.is_available() and device_info(torch.device("cuda")).capability >= (9, 0)


@triton.jit
def pdl_launch(PDL: tl.constexpr):
    """Allow the next kernel of the stream to start. Call it first."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """Wait until the previous kernels have completed and their writes are visible."""
    if PDL:
        gdc_wait()
