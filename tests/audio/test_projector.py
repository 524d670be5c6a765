"""The projector: what it computes of frames, and which directories it refuses."""

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
def test_frames_are_stacked_and_the_tail_is_padded(tmp_path: Path, norm: bool) -> None:
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


@pytest.mark.parametrize("change, says", [
    ({"activation": "tanh"}, "activation is 'tanh', allowed are gelu and relu"),
    ({"frames_per_token": 0}, "frames_per_token is 0, expected an integer of at least 1"),
    ({"input_size": None}, "input_size is None, expected an integer"),
    ({"stride": 2}, "stride is unknown, allowed are frames_per_token"),
    ({"output_size": 7}, r"model.safetensors is not what its config.json says"),
])  # fmt: skip
def test_directories_that_are_refused(tmp_path: Path, change: dict[str, object], says: str) -> None:
    Projector(CONFIG).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=says):
        Projector.load(tmp_path, CPU, torch.float32)
