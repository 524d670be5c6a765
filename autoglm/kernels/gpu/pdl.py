"""What the Triton kernels share: how they are launched one behind another.

Programmatic dependent launch (CUDA programming guide, "Programmatic Dependent Launch") lets a kernel start while the
one before it still runs. Every kernel of a decode step first lets its successor start, then loads what no kernel
writes (weights), then waits, and only then touches what the kernels before it read or write.
"""

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = bool(knobs.runtime.interpret)
PDL = not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


@triton.jit
def pdl_launch(PDL: tl.constexpr):
    """Let the next kernel of the stream start. It is harmless, and best, to call this first."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """Wait until the kernels before are done and what they wrote can be seen."""
    if PDL:
        gdc_wait()
