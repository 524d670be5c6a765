from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoglm.vision.image_processor import patches
from demo import model as demo_model
from demo import phrases
from demo.losses import attention_mask, patchify
from demo.optimizer import orthogonalize
from demo.records import GRIDS, LABELS, MAX_QUESTIONS, NO_ELEMENT, Arrays, RecordSpec, RecordWriter
from demo.stream import Stream, records
from demo.trainer import Schedule, Trainer

pytestmark = pytest.mark.usefixtures("fonts")


@pytest.fixture(scope="module")
def writer() -> RecordWriter:
    return RecordWriter(demo_model.tokenizer(), demo_model.IMAGE_LIMITS)


@pytest.fixture(scope="module")
def arrays(writer: RecordWriter) -> Arrays:
    arrays = RecordSpec(GRIDS[0]).empty(24)
    for row in range(24):
        writer.write(arrays, row, row, "train", only_taps=False, grid=GRIDS[0])
    return arrays


def test_records_index_the_tokens_of_answers(writer: RecordWriter, arrays: Arrays) -> None:
    for row in range(24):
        ids = arrays["ids"][row]
        tokens = arrays["answer_token"][row]
        indices = arrays["answer_index"][row][tokens >= 0]
        assert (ids[indices + 1] == tokens[tokens >= 0]).all()
        for question in np.flatnonzero(arrays["action"][row] >= 0):
            own = ids[arrays["segment"][row] == question + 1].tolist()
            text = writer.tokenizer.decode(own, skip_special_tokens=False)
            assert text.count("<|assistant|>\n<think>") == 1 and text.endswith("</answer>")
            if arrays["tap_label"][row, question] < 0:
                continue
            x_and_y = arrays["tap_index"][row, question, 1:]
            numbers = [int(writer.tokenizer.decode([int(ids[index + 1])])) for index in x_and_y]
            assert numbers == arrays["tap_center"][row, question].tolist()
            assert f"element=[{numbers[0]},{numbers[1]}]" in text
            assert phrases.ACTIONS[arrays["action"][row, question]] in ("Tap", "Long Press", "Double Tap")


def test_targets_of_taps_are_labels_of_visual_tokens(arrays: Arrays) -> None:
    found = [
        label in arrays["cell_label"][row] for row in range(24) for label in arrays["tap_label"][row] if label >= 0
    ]
    assert sum(found) >= 0.97 * len(found) > 50
    drawn = arrays["cell_label"][(arrays["cell_label"] >= 0) & (arrays["cell_label"] < NO_ELEMENT)]
    assert drawn.max() < len(LABELS)


def test_questions_do_not_attend_to_each_other(arrays: Arrays) -> None:
    segment = torch.from_numpy(arrays["segment"][:4]).long()
    mask = attention_mask(segment)
    for row in range(4):
        for index in range(0, segment.shape[1], 17):
            own = segment[row, index]
            if own >= 0:
                others = segment[row][mask[row, index]]
                assert set(others.tolist()) <= {0, int(own)}
    assert not mask.triu(1).any()


def test_patches_are_those_of_the_image_processor() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (588, 252, 3), np.uint8)
    limits = demo_model.IMAGE_LIMITS
    expected = patches(Image.fromarray(pixels), (588, 252), limits)
    mean, std = torch.tensor(limits.mean), torch.tensor(limits.std)
    ours = patchify(torch.from_numpy(pixels).unsqueeze(0), GRIDS[0], mean, std)
    assert np.abs(ours.numpy() - expected).max() < 1e-5


def test_singular_values_are_about_1_after_orthogonalization() -> None:
    for shape in ((3, 64, 32), (2, 32, 96)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)).float())
        assert float(values.min()) > 0.5 and float(values.max()) < 1.4


def test_the_rate_warms_up_and_cools_down() -> None:
    schedule = Schedule(vision_steps=1000, joint_steps=2000, batch=1)
    assert schedule.rate(0) < 0.01 and schedule.rate(999) == 1.0
    assert schedule.rate(1000) < 0.01 and schedule.rate(2000) == 1.0
    assert schedule.rate(2999) < 0.001


def test_training_resumes_from_its_saved_state(writer: RecordWriter, tmp_path: Path) -> None:
    schedule = Schedule(vision_steps=1, joint_steps=4, batch=1)
    batch = records(writer, 0, "train", 1, 1)
    first = Trainer(schedule, torch.device("cpu"))
    for _ in range(2):  # a step of each phase
        first.step(batch, GRIDS[0])
    first.save(tmp_path)
    assert all(path.stat().st_size < 16 * 2**20 for path in tmp_path.iterdir())
    second = Trainer(schedule, torch.device("cpu"))
    second.load(tmp_path)
    assert second.step_number == 2
    losses = []
    for trainer in (first, second):
        torch.manual_seed(0)
        losses.append([float(trainer.step(batch, GRIDS[0])["loss"]) for _ in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][0] != losses[0][1]


def test_workers_fill_the_pool(writer: RecordWriter) -> None:
    stream = Stream(writer, workers=1, first_seed=5, capacity=64)
    try:
        stream.open(torch.device("cpu"))
        while not stream.ready_for(32):
            pass
        batch = stream.sample(0, 8, torch.Generator().manual_seed(0))
        assert batch["image"].shape == (8, 588, 252, 3)
        assert batch["action"].shape == (8, MAX_QUESTIONS)
        taps = batch["action"][batch["action"] >= 0]
        assert (taps == phrases.ACTIONS.index("Tap")).all()  # the curriculum begins with taps
    finally:
        stream.close()
