"""The preprocess adapter with a fake pb_utils: outputs, invalid input, errors that affect one request only."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from autoglm.config import ConfigError
from autoglm.media.image_file import media_hash
from autoglm.preprocess.messages import PART_TYPES
from tests.conftest import Pair
from tests.images import encode
from tests.model_repository import fake_pb_utils as pb


def image(width: int, height: int, mode: str = "RGB", format: str = "PNG", **options: Any) -> bytes:
    return encode(Image.linear_gradient("L").resize((width, height)).convert(mode), format, **options)


def request(parameters: dict[str, Any] | None = None, /, **inputs: Any) -> pb.InferenceRequest:
    return pb.InferenceRequest([pb.bytes_tensor(name, elements) for name, elements in inputs.items()], parameters)


def user(*parts: Any) -> str:
    return json.dumps([{"role": "user", "content": list(parts)}])


TEXT = {"type": "text", "text": "打开设置"}
PICTURE = {"type": "image"}
SCREEN = image(84, 168)
ONE_PER_PART = "one element for each part of type image in MESSAGES"
FITTING = "at most 8191 tokens, one less than the context of 8192"
GOOD = {"MESSAGES": [user(PICTURE, TEXT)], "IMAGES": [SCREEN]}


@pytest.fixture(scope="module")
def directory(plain: Pair) -> Path:
    return plain.checkpoint.path


@pytest.fixture
def start(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Creates an initialised model with a configuration, YAML text."""

    def create(config: str = "") -> Any:
        file = tmp_path / "config.yaml"
        file.write_text(config, encoding="utf-8")
        monkeypatch.setenv("AUTOGLM_CHECKPOINT", str(directory))
        monkeypatch.setenv("AUTOGLM_CONFIG", str(file))
        monkeypatch.delenv("AUTOGLM_PRESET", raising=False)
        model = pb.load_adapter("preprocess").TritonPythonModel()
        model.initialize({"model_name": "preprocess", "model_config": "{}"})
        return model

    return create


@pytest.fixture
def model(start: Any) -> Any:
    return start()


def answer(model: Any, one: pb.InferenceRequest) -> pb.InferenceResponse:
    (response,) = model.execute([one])
    assert isinstance(response, pb.InferenceResponse)
    return response


def error_of(model: Any, one: pb.InferenceRequest, code: pb.TritonError.Code = pb.TritonError.INVALID_ARG) -> str:
    """The message of the request's error, which must not affect the next request."""
    error = answer(model, one).error()
    assert error is not None and error.code() == code
    assert not answer(model, request(**GOOD)).has_error()
    return error.message()


def test_shapes_and_types_of_the_outputs(model: Any) -> None:
    files = [SCREEN, image(140, 112)]
    response = answer(model, request(MESSAGES=[user(PICTURE, PICTURE, TEXT)], IMAGES=files))
    assert [tensor.name() for tensor in response.output_tensors()] == [
        "PROMPT_IDS", "IMAGE_FILES", "IMAGE_GRIDS", "IMAGE_HASHES", "IMAGE_NAMES",
        "AUDIO_FILES", "AUDIO_TOKENS", "AUDIO_HASHES", "AUDIO_NAMES", "PREPROCESS_MS",
    ]  # fmt: skip
    ids, grids = response["PROMPT_IDS"].as_numpy(), response["IMAGE_GRIDS"].as_numpy()
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert grids.dtype == np.int32 and grids.tolist() == [[[1, 12, 6], [1, 8, 10]]]
    assert (ids == model.renderer.checkpoint.image_token_id).sum() == 18 + 20
    assert response["IMAGE_FILES"].as_numpy().tolist() == [files]
    hashes = [media_hash(file, tuple(grid)).encode() for file, grid in zip(files, grids[0].tolist(), strict=True)]
    assert response["IMAGE_HASHES"].as_numpy().tolist() == [hashes]
    assert response["PREPROCESS_MS"].as_numpy().dtype == np.float32 and response["PREPROCESS_MS"].shape() == [1]


def test_outputs_without_images_are_empty_rows(model: Any) -> None:
    for one in (request(PROMPT=["打开设置"]), request(PROMPT=["x"], IMAGES=[], AUDIO=[])):
        response = answer(model, one)
        assert response["PROMPT_IDS"].as_numpy().size > 4
        assert response["IMAGE_FILES"].shape() == [1, 0] == response["IMAGE_HASHES"].shape()
        assert response["IMAGE_GRIDS"].shape() == [1, 0, 3]
        assert response["AUDIO_FILES"].shape() == [1, 0] == response["AUDIO_TOKENS"].shape()


def test_trailing_zero_bytes_are_kept(model: Any) -> None:
    file = SCREEN + bytes(7)
    assert answer(model, request(PROMPT=["x"], IMAGES=[file]))["IMAGE_FILES"].as_numpy()[0, 0] == file


def test_the_content_format_is_configured(start: Any) -> None:
    model = start("chat:\n  content_format: list\n")
    as_list = answer(model, request(**GOOD))["PROMPT_IDS"].as_numpy()
    as_string = answer(start(), request(**GOOD))["PROMPT_IDS"].as_numpy()
    newline = model.renderer.tokenizer.encode("\n").ids
    end = model.renderer.checkpoint.image_end_token_id
    after = as_string.tolist().index(end) + 1
    assert as_string.tolist()[after : after + 1] == newline
    assert as_list.size == as_string.size - 1


@pytest.mark.parametrize(("inputs", "expected"), [
    ({}, "exactly one of MESSAGES and PROMPT must be given (got neither)"),
    ({"IMAGES": [SCREEN]}, "exactly one of MESSAGES and PROMPT must be given (got neither)"),
    ({"MESSAGES": [user(TEXT)], "PROMPT": ["x"]}, "exactly one of MESSAGES and PROMPT must be given (got both)"),
    ({"MESSAGES": ["hello"]}, "MESSAGES must be a non-empty JSON list of messages (got a syntax error at line 1,"),
    ({"MESSAGES": [b""]}, "MESSAGES must be a non-empty JSON list of messages (got an empty text)"),
    ({"MESSAGES": ["[]"]}, "MESSAGES must be a non-empty JSON list of messages (got an empty JSON list)"),
    ({"MESSAGES": []}, "MESSAGES must be one element (got 0)"),
    ({"MESSAGES": [user(TEXT), user(TEXT)]}, "MESSAGES must be one element (got 2)"),
    ({"PROMPT": [b""]}, "PROMPT must be a non-empty text unless AUDIO is given (got '')"),
    ({"PROMPT": [b"\xff"]}, "PROMPT must be UTF-8 text (got bytes that are not UTF-8"),
    ({"MESSAGES": ['[{"role": "robot", "content": "x"}]']},
     "MESSAGES[0].role must be one of system, user, assistant (got 'robot')"),
    ({"MESSAGES": [user({"type": "video"})]},
     f"MESSAGES[0].content[0].type must be one of {PART_TYPES} (got 'video')"),
    ({"MESSAGES": [user(TEXT)], "IMAGES": [SCREEN]}, f"IMAGES must be {ONE_PER_PART} (got 1 for 0)"),
    ({"MESSAGES": [user(PICTURE, PICTURE, TEXT)], "IMAGES": [SCREEN]}, f"IMAGES must be {ONE_PER_PART} (got 1 for 2)"),
    ({"PROMPT": ["x"], "IMAGES": [SCREEN] * 11}, "IMAGES must be at most 10 per request (got 11)"),
    ({"PROMPT": ["x"], "IMAGES": [SCREEN, SCREEN[:90]]}, "IMAGES[1] is a truncated PNG file"),
    ({"PROMPT": ["x"], "IMAGES": [b"just text"]},
     "IMAGES[0] must be a PNG, JPEG, WebP, GIF or BMP file (got a file that begins with 6a 75 73 74 20 74 65 78 74)"),
    ({"PROMPT": ["x"], "IMAGES": [b""]},
     "IMAGES[0] must be a PNG, JPEG, WebP, GIF or BMP file (got an empty file)"),
    ({"PROMPT": ["x"], "IMAGES": [encode(Image.new("1", (20000, 20000)))]}, "at most 67108864 pixels"),
    ({"PROMPT": ["x"], "IMAGES": ["data:image/png;base64,&"]},
     "IMAGES[0] must be valid base64 (got '&' at position 0)"),
    ({"PROMPT": ["x"], "AUDIO": [b"RIFF"]}, "AUDIO must not contain clips: this server has no speech encoder"),
    ({"PROMPT": ["x" * 200_000]}, f"prompt must be {FITTING} (got a text of 200000 bytes)"),
    ({"PROMPT": ["word " * 12_000]}, f"prompt must be {FITTING} (got 60006 tokens, 0 of them for 0 images)"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_errors_name_the_invalid_input(model: Any, inputs: dict[str, Any], expected: str) -> None:
    message = error_of(model, request(**inputs))
    assert expected in message
    assert len(message) < 300


@pytest.mark.parametrize(("name", "value"), [
    ("max_tokens", -1), ("temperature", float("nan")), ("temperature", "hot"), ("top_p", 0), ("seed", 1.5),
    ("colour", 1), ("stop_token_ids", "[1, "), ("stream", "yes"),
])  # fmt: skip
def test_invalid_parameters_are_rejected_before_encoding(model: Any, name: str, value: Any) -> None:
    message = error_of(model, request({name: value}, **GOOD))
    assert name in message or "NaN" in message
    assert not answer(model, request({"max_tokens": 5, "temperature": 0.5, "stop": '["a"]'}, **GOOD)).has_error()


@pytest.mark.parametrize("file", [
    image(1, 1), image(84, 84, "CMYK", "JPEG"), image(84, 84, "P"), image(84, 84, "LA"), image(84, 84, "RGBA"),
    image(84, 84, "L"), image(84, 84, "RGB", "WEBP"), image(84, 84, "P", "GIF"), image(84, 84, "RGB", "BMP"),
])  # fmt: skip
def test_unusual_images_are_accepted(model: Any, file: bytes) -> None:
    grids = answer(model, request(PROMPT=["x"], IMAGES=[file]))["IMAGE_GRIDS"].as_numpy()
    assert grids.tolist() == [[[1, 6, 6]]]


def test_exif_rotation_applies_to_the_grid(model: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = image(84, 168, "RGB", "JPEG", exif=exif.tobytes())
    assert answer(model, request(PROMPT=["x"], IMAGES=[file]))["IMAGE_GRIDS"].as_numpy().tolist() == [[[1, 6, 12]]]


def test_an_invalid_request_does_not_affect_others(model: Any) -> None:
    requests = [
        request(**GOOD),
        request(PROMPT=["x"], IMAGES=[SCREEN[:50]]),
        request({"max_tokens": -1}, **GOOD),
        request(**GOOD),
    ]
    responses = model.execute(requests)
    assert [response.has_error() for response in responses] == [False, True, True, False]
    alone = answer(model, request(**GOOD))["PROMPT_IDS"].as_numpy()
    for response in (responses[0], responses[3]):
        assert np.array_equal(response["PROMPT_IDS"].as_numpy(), alone)


def test_a_cancelled_request_is_not_processed(model: Any) -> None:
    cancelled = request(PROMPT=["\xff"])
    cancelled.cancelled = True
    assert "cancelled" in error_of(model, cancelled, pb.TritonError.CANCELLED)


def test_internal_errors_are_logged_but_not_returned(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("secret/path")

    with monkeypatch.context() as patch:
        patch.setattr(model.renderer, "render", fail)
        failed, rejected = model.execute([request(**GOOD), request()])
    error = failed.error()
    assert error.code() == pb.TritonError.INTERNAL and "secret" not in error.message()
    assert rejected.error().code() == pb.TritonError.INVALID_ARG
    assert any(level == "error" and "secret/path" in message for level, message in pb.Logger.records)


def grid(model: Any, parameters: dict[str, Any] | None = None, file: bytes = SCREEN) -> list[int]:
    (row,) = answer(model, request(parameters, PROMPT=["x"], IMAGES=[file]))["IMAGE_GRIDS"].as_numpy().tolist()
    (only,) = row
    assert isinstance(only, list)
    return only


def test_pixel_limits_of_a_request(model: Any) -> None:
    """They change the grid, and with it the tokens and the hash; the hash depends on the grid, not on the limits."""
    assert grid(model) == [1, 12, 6]
    assert grid(model, {"max_pixels": 2 * 84 * 84}) == [1, 8, 4]
    assert grid(model, {"min_pixels": 2 * 168 * 336}) == [1, 24, 12]
    hashes, counts = [], []
    for parameters in ({}, {"max_pixels": 2 * 84 * 84}, {"max_pixels": 100_000}):
        response = answer(model, request(parameters, PROMPT=["x"], IMAGES=[SCREEN]))
        hashes.append(response["IMAGE_HASHES"].as_numpy()[0, 0])
        counts.append((response["PROMPT_IDS"].as_numpy() == model.renderer.checkpoint.image_token_id).sum())
    assert hashes[0] == hashes[2] != hashes[1]
    assert counts == [18, 8, 18]


@pytest.mark.parametrize(("parameters", "expected"), [
    ({"max_pixels": 9_633_793}, "max_pixels must be between 1568 and 9633792 (2 x height x width) (got 9633793)"),
    ({"max_pixels": 1567}, "max_pixels must be between 1568 and 9633792 (2 x height x width) (got 1567)"),
    ({"max_pixels": "many"}, "max_pixels must be an integer between 1 and 9223372036854775807 (got 'many')"),
    ({"max_pixels": 1e6}, "max_pixels must be an integer between 1 and 9223372036854775807 (got 1000000.0)"),
    ({"max_pixels": True}, "max_pixels must be an integer between 1 and 9223372036854775807 (got true)"),
    ({"min_pixels": 0}, "min_pixels must be between 1 and 9223372036854775807 (got 0)"),
    ({"min_pixels": -5}, "min_pixels must be between 1 and 9223372036854775807 (got -5)"),
    ({"min_pixels": 30_000, "max_pixels": 20_000}, "min_pixels must be between 1 and 20000 (2 x height x width)"),
    ({"max_pixel": 20_000}, "max_pixel is not a known parameter (accepted: max_tokens, "),
])  # fmt: skip
def test_invalid_pixel_limits_are_rejected(model: Any, parameters: dict[str, Any], expected: str) -> None:
    assert expected in error_of(model, request(parameters, **GOOD))


def test_pixel_limits_of_the_server(start: Any) -> None:
    model = start("limits: {max_pixels: 14112, min_pixels: 5000}")
    assert grid(model) == [1, 8, 4]
    assert grid(model, {"max_pixels": 1568}) == [1, 2, 2]
    assert "max_pixels must be between 1568 and 14112" in error_of(model, request({"max_pixels": 20_000}, **GOOD))
    for text, message in (
        ("max_pixels: 1000", r"limits.max_pixels must be at least 1568 \(got 1000\)"),
        ("min_pixels: 9999999", r"limits.min_pixels must be at most 9633792 \(got 9999999\)"),
        ("max_pixels: 2000", r"limits.min_pixels must be at most 2000 \(got 12544\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            start(f"limits: {{{text}}}")


def test_limits_are_configured(start: Any) -> None:
    model = start("limits:\n  max_images: 1\n  max_image_bytes: 100000\nengine:\n  max_context: 64\n")
    assert "IMAGES must be at most 1 per request (got 2)" in error_of(
        model, request(PROMPT=["x"], IMAGES=[SCREEN, SCREEN])
    )
    assert "at most 100000 bytes" in error_of(model, request(PROMPT=["x"], IMAGES=[SCREEN + bytes(100_000)]))
    assert "at most 63 tokens" in error_of(model, request(PROMPT=["x " * 100]))
