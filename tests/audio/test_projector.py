"""The projector: its computation, and invalid directories."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from autoglm.audio.projector import Projector, ProjectorConfig
from autoglm.checkpoint import CheckpointError

CPU = torch.device("cpu")
CONFIG = ProjectorConfig(frames_per_token=3, input_size=4, hidden_size=5, output_size=6, activation="relu")


@pytest.mark.parametrize("norm", [False, True])
def test_frames_are_stacked_and_the_last_group_is_padded(tmp_path: Path, norm: bool) -> None:
    torch.manual_seed(0)
    Projector(CONFIG, norm).save(tmp_path)
    projector = Projector.load(tmp_path, CPU, torch.float32)
    clips = [torch.randn(7, 4), torch.randn(1, 4), torch.randn(6, 4)]
    embeddings = projector(clips)
    assert [len(part) for part in embeddings] == [3, 1, 2] == [CONFIG.tokens(len(clip)) for clip in clips]
    stacked = torch.cat((clips[0].flatten(), torch.zeros(2 * 4))).view(3, 12)
    stacked = stacked if projector.norm is None else projector.norm(stacked)
    expected = projector.linear_2(F.relu(projector.linear_1(stacked)))
    torch.testing.assert_close(embeddings[0], expected)


@pytest.mark.parametrize("change, message", [
    ({"activation": "tanh"}, r"activation must be gelu or relu \(got 'tanh'\)"),
    ({"frames_per_token": 0}, r"frames_per_token must be an integer of at least 1 \(got 0\)"),
    ({"input_size": None}, "input_size must be an integer of at least 1"),
    ({"stride": 2}, r"stride is not a known key \(accepted: frames_per_token"),
    ({"output_size": 7},
     r"does not match its config.json: tensor linear_2.bias must have shape \[7\] \(got \[6\]\)"),
])  # fmt: skip
def test_invalid_directories_are_rejected(tmp_path: Path, change: dict[str, object], message: str) -> None:
    Projector(CONFIG).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        Projector.load(tmp_path, CPU, torch.float32)


@pytest.mark.parametrize("content, message", [(None, "does not exist"), (b"x", "is not a readable safetensors file")])
def test_weights_that_cannot_be_read_are_rejected(tmp_path: Path, content: bytes | None, message: str) -> None:
    Projector(CONFIG).save(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.unlink() if content is None else weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"model.safetensors {message}$"):
        Projector.load(tmp_path, CPU, torch.float32)
