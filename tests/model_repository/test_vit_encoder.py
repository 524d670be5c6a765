"""The vision adapter with a fake pb_utils: batches, requests without images, errors, metrics of the cache."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.dlpack import from_dlpack

from autoglm.media.encoder import FEATURE_DTYPE
from autoglm.media.feature_cache import FeatureCache
from autoglm.media.image_file import media_hash
from autoglm.serving.metrics import UPDATE_INTERVAL_S
from autoglm.vision.encoder import VisionEncoder
from autoglm.vision.image_processor import grid_of, patches, smart_resize
from autoglm.vision.vit import VisionTransformer
from tests.conftest import Pair
from tests.images import encode, picture
from tests.model_repository.fake_pb_utils import InferenceRequest, MetricFamily, Tensor, bytes_tensor, load_adapter

SIZES = [(60, 90), (200, 100), (57, 57)]


@pytest.fixture(scope="module")
def model(plain: Pair) -> Iterator[Any]:
    MetricFamily.families.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOGLM_CHECKPOINT", str(plain.checkpoint.path))
        patch.delenv("AUTOGLM_CONFIG", raising=False)
        adapter = load_adapter("vit_encoder").TritonPythonModel()
        adapter.initialize({"model_instance_device_id": "0"})
        yield adapter
        adapter.finalize()


def make_request(plain: Pair, files: list[bytes], sizes: list[tuple[int, int]], **options: Any) -> InferenceRequest:
    limits = plain.checkpoint.image_limits
    grids = [grid_of(smart_resize(height, width, limits), limits) for width, height in sizes]
    return InferenceRequest(
        [
            bytes_tensor("IMAGE_FILES", files, (1, len(files))),
            Tensor("IMAGE_GRIDS", np.array(grids, np.int32).reshape(1, len(files), 3)),
            bytes_tensor("IMAGE_HASHES", list(map(media_hash, files, grids)), (1, len(files))),
            bytes_tensor("IMAGE_NAMES", [f"IMAGES[{i}]" for i in range(len(files))], (1, len(files))),
        ],
        **options,
    )


def answer(model: Any, requests: list[InferenceRequest]) -> list[Any]:
    """The responses, each sent once, in the order of the requests."""
    assert model.execute(requests) is None
    assert all(request.sender.finished.is_set() for request in requests)
    return [response for request in requests for (response,) in [request.sender.responses]]


def embeddings(response: Any) -> torch.Tensor:
    assert not response.has_error()
    return from_dlpack(response["IMAGE_EMBEDDINGS"].to_dlpack())


def test_batch(model: Any, plain: Pair) -> None:
    """Requests with two, no and one images in one call: each gets its rows of the ViT's output, in bfloat16."""
    images = [picture(*size, seed=i) for i, size in enumerate(SIZES)]
    files = [encode(image) for image in images]
    requests = [
        make_request(plain, files[:2], SIZES[:2]),
        make_request(plain, [], []),
        make_request(plain, files[2:], SIZES[2:]),
    ]
    responses = answer(model, requests)
    limits = plain.checkpoint.image_limits
    vit = VisionTransformer.load(plain.checkpoint, torch.device("cpu"), torch.float32)
    expected = []
    for image in images:
        size = smart_resize(image.height, image.width, limits)
        expected.append(vit(torch.from_numpy(patches(image, size, limits)), [grid_of(size, limits)]))
    assert embeddings(responses[1]).shape == (1, 0, plain.checkpoint.text.hidden_size)
    for response, rows in ((responses[0], torch.cat(expected[:2])), (responses[2], expected[2])):
        got = embeddings(response)
        assert got.dtype == FEATURE_DTYPE
        assert got.shape == (1, *rows.shape)
        assert (got[0].float() - rows).abs().max() <= 0.01 * rows.abs().max()
        assert response["VISION_MS"].as_numpy().shape == (1, 1)


def test_the_passes_of_a_request_do_not_affect_its_embeddings(
    model: Any, plain: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass per image gives exactly the embeddings of one request per image, and those of one pass but for rounding,
    which depends on the shapes of the matrix products."""
    files = [encode(picture(*size)) for size in SIZES]
    monkeypatch.setattr(model.encoder, "cache", FeatureCache(torch.device("cpu"), 0))
    whole = embeddings(answer(model, [make_request(plain, files, SIZES)])[0])
    monkeypatch.setattr(model.encoder, "max_patches", 1)
    split = embeddings(answer(model, [make_request(plain, files, SIZES)])[0])
    requests = [make_request(plain, [file], [size]) for file, size in zip(files, SIZES, strict=True)]
    alone = [embeddings(response) for request in requests for response in answer(model, [request])]
    assert torch.equal(split, torch.cat(alone, dim=1))
    torch.testing.assert_close(split, whole, rtol=2**-7, atol=1e-5)  # one bfloat16 step


def test_an_error_in_the_middle_leaves_no_request_without_a_response(
    model: Any, plain: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def embed_one(requests: list[Any]) -> Iterator[tuple[int, torch.Tensor]]:
        yield 1, torch.zeros(1, 4)
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(model.encoder, "encode_each", embed_one)
    first, second, third = answer(model, [make_request(plain, [], []) for _ in range(3)])
    assert embeddings(second).shape == (1, 1, 4)
    assert all("internal error (OutOfMemoryError)" in response.error().message() for response in (first, third))


def test_errors_do_not_affect_other_requests(model: Any, plain: Pair) -> None:
    good = encode(picture(*SIZES[0]))
    requests = [
        make_request(plain, [good], SIZES[:1]),
        make_request(plain, [good, good[:200]], [SIZES[0], SIZES[0]]),
        make_request(plain, [good], SIZES[:1], cancelled=True),
        make_request(plain, [good], SIZES[:1]),
    ]
    requests[3].inputs()[1] = Tensor("IMAGE_GRIDS", np.ones((1, 2, 3), np.int32))
    responses = answer(model, requests)
    assert embeddings(responses[0]).shape[1] > 0
    assert responses[1].error().message().startswith("INVALID_ARGUMENT: IMAGES[1]")
    assert responses[2].error().message().startswith("CANCELLED")
    assert "IMAGE_GRIDS" in responses[3].error().message()


def test_a_failed_pass_is_reported(model: Any, plain: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(VisionEncoder, "vit", property(fail))
    response = answer(model, [make_request(plain, [encode(picture(*SIZES[0], seed=99))], SIZES[:1])])[0]
    message = "INTERNAL: IMAGES[0] could not be encoded: the vision encoder failed (RuntimeError)"
    assert response.error().message() == message


def test_metrics_of_the_cache(model: Any, plain: Pair) -> None:
    """The same image twice in one request and once more in the next: encoded once."""
    before = dict(vars(model.encoder.cache.stats))
    file = encode(picture(*SIZES[0], seed=100))
    twice = embeddings(answer(model, [make_request(plain, [file, file], [SIZES[0]] * 2)])[0])
    once = embeddings(answer(model, [make_request(plain, [file], SIZES[:1])])[0])
    assert torch.equal(twice, torch.cat((once, once), dim=1))
    stats = model.encoder.cache.stats
    assert (stats.hits - before["hits"], stats.misses - before["misses"]) == (2, 1)
    time.sleep(2 * UPDATE_INTERVAL_S)
    metrics = {name: family.metrics[0] for name, family in MetricFamily.families.items()}
    assert metrics["autoglm_vision_cache_hits_total"].value() == stats.hits
    assert metrics["autoglm_vision_cache_misses_total"].value() == stats.misses
    assert metrics["autoglm_vision_cache_entries"].value() == stats.entries > 0
    assert metrics["autoglm_vision_cache_bytes"].value() == stats.bytes >= once.nbytes
    assert {metric.labels["device"] for metric in metrics.values()} == {"cpu"}
    assert set().union(*(metric.threads for metric in metrics.values())) <= {"metrics"}
