"""Muon (Jordan et al., 2024), used for the matrices inside the blocks; AdamW updates the other parameters."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn

BETA = 0.95


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices [n, rows, columns] -> nearby ones with singular values about 1, by five Newton-Schulz steps in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: torch.Tensor = x.mT if tall else x
    return result


class Muon:
    """Nesterov momentum with orthogonalized updates, batched over the matrices of one shape and part of the model."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        groups: dict[tuple[str, tuple[int, int]], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in parameters:
            rows = parameter.shape[0]
            groups[name.split(".")[0], (rows, parameter.numel() // rows)].append(parameter)
        self.groups = dict(groups)
        self.decay = decay
        self.momentum = {
            key: torch.zeros((len(members), *key[1]), device=members[0].device) for key, members in self.groups.items()
        }

    @torch.no_grad()
    def step(self, rates: dict[str, float]) -> None:
        """Update the parts of the model in `rates`: part -> spectral norm of the update of a square matrix."""
        for (part, shape), members in self.groups.items():
            if part not in rates:
                continue
            gradients = torch.stack([_gradient(p).view(shape) for p in members]).float()
            momentum = self.momentum[part, shape]
            momentum.lerp_(gradients, 1 - BETA)
            update = orthogonalize(gradients.lerp(momentum, BETA)).to(members[0].dtype)
            rate = rates[part]
            tensors: list[torch.Tensor] = list(members)
            torch._foreach_mul_(tensors, 1 - rate * self.decay)
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            updates = [u.view(p.shape) for u, p in zip(update.unbind(0), members, strict=True)]
            torch._foreach_add_(tensors, updates, alpha=-rate * scale)

    def state(self) -> dict[str, torch.Tensor]:
        return {f"{part}.{rows}x{columns}": value for (part, (rows, columns)), value in self.momentum.items()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        for name, value in self.state().items():
            value.copy_(state[name])


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)


Named = list[tuple[str, nn.Parameter]]


def split_parameters(model: nn.Module) -> tuple[Named, Named]:
    """The parameters for Muon, which are the matrices of the blocks and the merger, and those for AdamW."""
    matrices: Named = []
    rest: Named = []
    for name, parameter in model.named_parameters():
        inner = any(part in name for part in (".blocks.", ".layers.", ".merger.", ".downsample."))
        (matrices if inner and parameter.ndim >= 2 else rest).append((name, parameter))
    return matrices, rest
