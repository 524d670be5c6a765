import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from autoglm.checkpoint import Checkpoint
from autoglm.llm.mrope import prompt_positions
from autoglm.vision.image_processor import grid_of, patches, smart_resize
from demo import model as demo_model
from demo.backends import LibraryBackend
from demo.evaluate import TAP_ACTION

FILES = {
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "generation_config.json", "preprocessor_config.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def samples(samples_directory: Path) -> list[tuple[bytes, dict[str, Any]]]:
    entries = json.loads((samples_directory / "samples.json").read_text(encoding="utf-8"))
    return [((samples_directory / entry["image"]).read_bytes(), entry) for entry in entries]


def test_the_checkpoint_is_complete_and_small(checkpoint_directory: Path) -> None:
    assert {path.name for path in checkpoint_directory.iterdir()} == FILES
    assert sum(path.stat().st_size for path in checkpoint_directory.iterdir()) <= 20_000_000


def test_sample_screens_are_small(samples_directory: Path) -> None:
    assert all(path.stat().st_size < 300_000 for path in samples_directory.iterdir())


def test_export_writes_the_committed_configuration(checkpoint_directory: Path, tmp_path: Path) -> None:
    tokenizer = demo_model.tokenizer()
    model = demo_model.DemoModel(demo_model.text_config(tokenizer), demo_model.vision_config())
    demo_model.export(model, tokenizer, tmp_path)
    for name in FILES - {"model.safetensors"}:
        assert (tmp_path / name).read_bytes() == (checkpoint_directory / name).read_bytes(), name
    checkpoint = Checkpoint.open(checkpoint_directory)
    assert checkpoint.image_limits == demo_model.IMAGE_LIMITS
    assert checkpoint.text == demo_model.text_config(tokenizer)
    assert checkpoint.vision == demo_model.vision_config()


def test_samples_are_answered_correctly(
    checkpoint_directory: Path, samples: list[tuple[bytes, dict[str, Any]]]
) -> None:
    backend = LibraryBackend(checkpoint_directory)
    try:
        answers = backend.answer([(image, str(task["task"])) for image, task in samples])
    finally:
        backend.close()
    for (_, task), answer in zip(samples, answers, strict=True):
        thought, _, action = answer.partition("</think><answer>")
        assert thought.startswith("<think>")
        if "box" not in task:
            assert action == task["action"], task
            continue
        tap = TAP_ACTION.fullmatch(action)
        assert tap, (task, answer)
        left, top, right, bottom = task["box"]
        assert left <= int(tap[2]) < right and top <= int(tap[3]) < bottom, (task, answer)


def test_the_answer_depends_on_the_screen(checkpoint_directory: Path, samples_directory: Path) -> None:
    files = ["launcher.png", "search.png", "cards.png", "settings.png", "form.png", "toolbar.png"]
    backend = LibraryBackend(checkpoint_directory)
    try:
        answers = backend.answer([((samples_directory / name).read_bytes(), "打开京东") for name in files])
    finally:
        backend.close()
    points = [TAP_ACTION.search(answer) for answer in answers]
    assert all(points[:3]) and len({point[0] for point in points[:3] if point}) == 3
    assert all(answer.endswith('do(action="Launch", app="京东")') for answer in answers[3:])


def test_transformers_gives_the_same_answer(
    checkpoint_directory: Path, samples_directory: Path, samples: list[tuple[bytes, dict[str, Any]]]
) -> None:
    transformers = pytest.importorskip("transformers")
    model, info = transformers.Glm4vForConditionalGeneration.from_pretrained(
        checkpoint_directory, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint_directory)
    backend = LibraryBackend(checkpoint_directory)
    image, task = samples[0]
    expected = backend.answer([(image, str(task["task"]))])[0]
    backend.close()

    checkpoint = Checkpoint.open(checkpoint_directory)
    screen = Image.open(samples_directory / "launcher.png").convert("RGB")
    size = smart_resize(screen.height, screen.width, checkpoint.image_limits)
    grid = grid_of(size, checkpoint.image_limits)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"\n{task['task']}"}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    count = grid[1] * grid[2] // 4
    ids = tokenizer(text.replace("<|image|>", "<|image|>" * count), add_special_tokens=False)["input_ids"]
    _, next_position = prompt_positions(ids, [grid], checkpoint.image_token_id, 2)
    assert next_position < len(ids)  # an image takes fewer positions than tokens
    batch = torch.tensor([ids])
    with torch.inference_mode():
        out = model.generate(
            input_ids=batch,
            attention_mask=torch.ones_like(batch),
            mm_token_type_ids=(batch == checkpoint.image_token_id).long(),
            pixel_values=torch.from_numpy(patches(screen, size, checkpoint.image_limits)),
            image_grid_thw=torch.tensor([grid]),
            max_new_tokens=60,
        )
    generated = out[0, len(ids) :].tolist()
    assert generated[-1] == tokenizer.convert_tokens_to_ids("</answer>")
    assert tokenizer.decode(generated[:-1]) == expected
