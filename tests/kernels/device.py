"""Where the kernels under test run."""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
