"""The bridge: projects frames of the speech encoder to embeddings of the language model.

As in SLAM-LLM and Ultravox, k consecutive frames are stacked and mapped to one embedding by two linear layers.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from autoglm.checkpoint import CheckpointError, read_json
from autoglm.errors import shorten
from autoglm.weights.reader import load_parameters

WEIGHTS = "model.safetensors"
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """The projector's config.json. `input_size` is the encoder's hidden size, `output_size` the language model's."""

    frames_per_token: int
    input_size: int
    hidden_size: int
    output_size: int
    activation: Literal["gelu", "relu"] = "gelu"

    @classmethod
    def open(cls, directory: str | Path) -> "ProjectorConfig":
        """Read the config.json of a projector's directory.

        Raises:
            CheckpointError: it is missing, or has an unknown key or a wrong value.
        """
        path = Path(directory) / "config.json"
        content = read_json(path)
        known = [field.name for field in fields(cls)]
        if unknown := sorted(content.keys() - set(known)):
            raise CheckpointError(f"{path}: {unknown[0]} is not a known key (accepted: {', '.join(known)})")
        for name in known[:-1]:
            if type(content.get(name)) is not int or content[name] < 1:
                got = shorten(content.get(name))
                raise CheckpointError(f"{path}: {name} must be an integer of at least 1 (got {got})")
        if content.get("activation", "gelu") not in ACTIVATIONS:
            raise CheckpointError(f"{path}: activation must be gelu or relu (got {shorten(content['activation'])})")
        return cls(**content)

    def tokens(self, frames: int) -> int:
        """Number of embeddings of a clip; the last may cover fewer frames than the others."""
        return -(-frames // self.frames_per_token)


class Projector(nn.Module):
    """Optional norm, linear, activation, linear."""

    def __init__(self, config: ProjectorConfig, norm: bool = False) -> None:
        super().__init__()
        self.config = config
        stacked = config.frames_per_token * config.input_size
        self.norm = nn.LayerNorm(stacked) if norm else None
        self.linear_1 = nn.Linear(stacked, config.hidden_size)
        self.activation = ACTIVATIONS[config.activation]()
        self.linear_2 = nn.Linear(config.hidden_size, config.output_size)

    @classmethod
    def load(cls, directory: str | Path, device: torch.device, dtype: torch.dtype) -> "Projector":
        """Load a projector in evaluation mode.

        Raises:
            CheckpointError: a file cannot be read, or the tensors do not match config.json.
        """
        path = Path(directory) / WEIGHTS
        config = ProjectorConfig.open(directory)
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            reason = "is not a readable safetensors file" if path.exists() else "does not exist"
            raise CheckpointError(f"{path} {reason}") from error
        projector = cls(config, norm="norm.weight" in tensors)
        try:
            load_parameters(projector, tensors.items(), {"": ""})
        except CheckpointError as error:
            raise CheckpointError(f"{path} does not match its config.json: {error}") from None
        return projector.eval().requires_grad_(False).to(device, dtype)

    def save(self, directory: str | Path) -> None:
        """Write the files that `load` reads."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, path / WEIGHTS)

    def forward(self, clips: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Project the frames of each clip.

        Args:
            clips: frames [n, input_size] each.

        Returns:
            [tokens(n), output_size] each, views of one tensor.
        """
        k = self.config.frames_per_token
        padded = [F.pad(clip, (0, 0, 0, -len(clip) % k)) for clip in clips]
        hidden = torch.cat([clip.reshape(-1, k * self.config.input_size) for clip in padded])
        if self.norm is not None:
            hidden = self.norm(hidden)
        hidden = self.linear_2(self.activation(self.linear_1(hidden)))
        return list(hidden.split([self.config.tokens(len(clip)) for clip in clips]))
