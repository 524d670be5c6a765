"""The encoder around the ViT: decoding, caching, passes, loading of weights, and isolation of errors."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autoglm.config import LimitsConfig, VisionSection
from autoglm.errors import ErrorCode, RequestError
from autoglm.media.image_file import ImageFile, decode_image, media_hash
from autoglm.vision import encoder as encoder_module
from autoglm.vision import loader as loader_module
from autoglm.vision.encoder import VisionEncoder
from autoglm.vision.image_processor import grid_of, smart_resize
from autoglm.vision.vit import VisionTransformer
from autoglm.weights.cache import WeightCache
from tests.conftest import Pair
from tests.images import encode, picture

CPU = torch.device("cpu")
SIZE = (60, 90)


class Counting:
    """Replaces a function and records its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *arguments: Any) -> Any:
        self.calls.append(arguments)
        return self.function(*arguments)


@pytest.fixture
def make_encoder(plain: Pair) -> Iterator[Callable[..., VisionEncoder]]:
    made: list[VisionEncoder] = []

    def make(**options: Any) -> VisionEncoder:
        made.append(VisionEncoder(plain.checkpoint, VisionSection(**options), LimitsConfig(), CPU, torch.float32))
        return made[-1]

    yield make
    for encoder in made:
        encoder.close()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counting:
    counting = Counting(decode_image)
    monkeypatch.setattr(encoder_module, "decode_image", counting)
    return counting


@pytest.fixture
def image(plain: Pair) -> Callable[..., ImageFile]:
    limits = plain.checkpoint.image_limits

    def make(seed: int = 0, index: int = 0, data: bytes | None = None, size: tuple[int, int] = SIZE) -> ImageFile:
        data = encode(picture(*size, seed=seed)) if data is None else data
        grid = grid_of(smart_resize(size[1], size[0], limits), limits)
        return ImageFile(data, grid, media_hash(data, grid), f"IMAGES[{index}]")

    return make


def features(result: torch.Tensor | RequestError) -> torch.Tensor:
    assert isinstance(result, torch.Tensor), result
    return result


def error_message(result: torch.Tensor | RequestError) -> str:
    assert isinstance(result, RequestError)
    return result.message


def test_a_cached_image_is_not_decoded(make_encoder: Any, image: Any, decoded: Counting) -> None:
    encoder = make_encoder()
    first = features(encoder.encode([[image(1)]])[0])
    again = features(encoder.encode([[image(1, index=3)]])[0])
    assert torch.equal(first, again)
    assert len(decoded.calls) == 1
    again.zero_()  # results are copies
    assert torch.equal(features(encoder.encode([[image(1)]])[0]), first)


def test_the_same_image_in_one_batch_is_encoded_once(make_encoder: Any, image: Any, decoded: Counting) -> None:
    encoder = make_encoder(feature_cache_mb=0)
    results = [features(result) for result in encoder.encode([[image(1), image(2)], [image(1)], [image(2), image(1)]])]
    assert len(decoded.calls) == 2
    rows = len(results[1])
    assert torch.equal(results[0], torch.cat((results[1], results[2][: len(results[0]) - rows])))
    assert torch.equal(results[2][-rows:], results[1])


def test_the_same_image_in_concurrent_batches_is_encoded_once(
    make_encoder: Any, image: Any, decoded: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make_encoder(feature_cache_mb=0)
    waiting, go = threading.Event(), threading.Event()
    original = encoder._features

    def slow(group: Any) -> Any:
        waiting.set()
        assert go.wait(10)
        return original(group)

    monkeypatch.setattr(encoder, "_features", slow)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(encoder.encode, [[image(1)]])
        assert waiting.wait(10)
        second = threads.submit(encoder.encode, [[image(1)]])
        while encoder.cache.stats.hits == 0:
            pass
        go.set()
        assert torch.equal(features(first.result(10)[0]), features(second.result(10)[0]))
    assert len(decoded.calls) == 1


def test_concurrent_batches_do_not_affect_each_other(make_encoder: Any, image: Any) -> None:
    """A few images many times, without a cache."""
    encoder = make_encoder(feature_cache_mb=0)
    wanted = [features(encoder.encode([[image(seed)]])[0]) for seed in range(3)]
    with ThreadPoolExecutor(4) as threads:
        seeds = [i % 3 for i in range(60)]
        for seed, results in zip(seeds, threads.map(lambda seed: encoder.encode([[image(seed)]]), seeds), strict=True):
            assert torch.equal(features(results[0]), wanted[seed])


def test_another_grid_is_another_image(make_encoder: Any, image: Any, decoded: Counting) -> None:
    encoder = make_encoder()
    whole = image(1)
    grid = (1, whole.grid[1] // 2, whole.grid[2])
    half = replace(whole, grid=grid, media_hash=media_hash(whole.data, grid))
    results = encoder.encode([[whole], [half]])
    assert len(features(results[0])) == 2 * len(features(results[1]))
    assert len(decoded.calls) == 2


def test_a_shared_error_names_the_image_of_each_request_and_is_not_cached(make_encoder: Any, image: Any) -> None:
    encoder = make_encoder()
    broken = encode(picture(*SIZE))[:300]
    results = encoder.encode([[image(1), image(data=broken, index=1)], [image(data=broken)], [image(1)]])
    assert error_message(results[0]) == "IMAGES[1] is a truncated PNG file"
    assert error_message(results[1]) == "IMAGES[0] is a truncated PNG file"
    features(results[2])
    assert encoder.cache.stats.entries == 1


@pytest.mark.parametrize("data", [None, encode(picture(*SIZE))[:300]], ids=["good", "broken"])
def test_a_request_is_freed_without_the_garbage_collector(make_encoder: Any, image: Any, data: bytes | None) -> None:
    """Neither files nor the frames of errors are in reference cycles."""
    encoder = make_encoder()
    gc.disable()
    try:
        file = image(7, data=data)
        gone = weakref.ref(file)
        results = encoder.encode([[file], [file]])
        assert isinstance(results[0], torch.Tensor if data is None else RequestError)
        del file, results
        encoder.encode([[image(8)]] * 4)  # a thread drops its last task when it takes another
        assert gone() is None
    finally:
        gc.enable()


def test_a_wrong_hash_does_not_poison_the_cache(make_encoder: Any, image: Any) -> None:
    encoder = make_encoder()
    (result,) = encoder.encode([[replace(image(1), media_hash=image(2).media_hash)]])
    assert error_message(result).startswith("IMAGES[0] must be sent with the hash that preprocess computes for it")
    correct = features(encoder.encode([[image(2)]])[0])
    assert torch.equal(correct, features(make_encoder().encode([[image(2)]])[0]))


@pytest.mark.parametrize("grid", [(1, 7, 6), (1, 8, 0), (2, 8, 6), (1, -8, -6), (1, 2, 10**6)])
def test_an_impossible_grid_is_rejected(make_encoder: Any, image: Any, grid: tuple[int, int, int]) -> None:
    file = image(1)
    wrong = replace(file, grid=grid, media_hash=media_hash(file.data, grid))
    rejected, accepted = make_encoder().encode([[wrong], [file]])
    assert error_message(rejected).startswith("IMAGES[0] must be sent with a grid of 1 x multiples of 2, at most ")
    assert error_message(rejected).endswith("patches (got {} x {} x {})".format(*grid))
    features(accepted)


def test_a_failed_pass_does_not_affect_others(make_encoder: Any, image: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make_encoder(max_patches_per_pass=1)
    original = encoder._features
    bad = image(1, index=1)

    def fail(group: Any) -> Any:
        if group[0].key.endswith(bad.media_hash):
            raise RuntimeError("out of memory")
        return original(group)

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "_features", fail)
        results = encoder.encode([[image(0), bad], [image(2)]])
    assert error_message(results[0]) == "IMAGES[1] could not be encoded: the vision encoder failed (RuntimeError)"
    assert isinstance(results[0], RequestError) and results[0].code is ErrorCode.INTERNAL
    features(results[1])
    features(encoder.encode([[bad]])[0])


def test_decoding_runs_ahead_by_a_bounded_number_of_images(make_encoder: Any, image: Any, decoded: Counting) -> None:
    encoder = make_encoder(decode_threads=2, max_patches_per_pass=1)
    taken = []
    for group in encoder._passes(encoder._decoded([image(seed) for seed in range(20)])):
        taken.append(group)
        assert len(decoded.calls) <= len(taken) + 1 + 1 + 2 * 2
    assert len(taken) == len(decoded.calls) == 20


@pytest.mark.parametrize("loading", ["lazy", "preload"])
def test_when_weights_are_read(make_encoder: Any, image: Any, loading: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Counting(loader_module.load)
    monkeypatch.setattr("autoglm.vision.encoder.load", load)
    encoder = make_encoder(loading=loading)
    encoder.encode([[], []])
    assert len(load.calls) == (loading == "preload")
    with ThreadPoolExecutor(4) as threads:
        for results in threads.map(lambda seed: encoder.encode([[image(seed)]]), range(4)):
            features(results[0])
    assert len(load.calls) == 1


def test_loading_is_retried_after_a_failure(make_encoder: Any, image: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make_encoder(loading="lazy")

    def fail(*_: object) -> None:
        raise OSError("disk")

    with monkeypatch.context() as patch:
        patch.setattr("autoglm.vision.encoder.load", fail)
        message = "IMAGES[0] could not be encoded: the vision encoder failed (OSError)"
        assert error_message(encoder.encode([[image(1)]])[0]) == message
    features(encoder.encode([[image(1)]])[0])


def test_int8_weights_come_from_the_cache_the_second_time(
    plain: Pair, image: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> VisionEncoder:
        weights = WeightCache(tmp_path, 10**9)
        return VisionEncoder(plain.checkpoint, VisionSection(int8=True), LimitsConfig(), CPU, torch.float32, weights)

    encoders = [make()]
    with monkeypatch.context() as patch:
        patch.setattr(VisionTransformer, "fill", lambda *_: pytest.fail("read from the checkpoint"))
        encoders.append(make())
    encoders.append(VisionEncoder(plain.checkpoint, VisionSection(int8=True), LimitsConfig(), CPU, torch.float32))
    exact = VisionEncoder(plain.checkpoint, VisionSection(), LimitsConfig(), CPU, torch.float32)
    first, *others = (features(encoder.encode([[image(1)]])[0]) for encoder in (*encoders, exact))
    assert torch.equal(first, others[0]) and torch.equal(first, others[1])
    assert not torch.equal(first, others[2])
    for encoder in (*encoders, exact):
        encoder.close()


def test_resizing_on_the_device_gives_the_same_features(
    make_encoder: Any, image: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, device = make_encoder(), make_encoder()
    monkeypatch.setattr(device, "_device_resizes", True)
    photo = encode(picture(*SIZE), "JPEG")
    for images in ([image(1)], [image(2, size=(300, 200)), image(3, size=(57, 57))], [image(data=photo)]):
        assert torch.equal(features(device.encode([images])[0]), features(host.encode([images])[0]))


def test_requests_are_yielded_as_soon_as_they_are_done(
    make_encoder: Any, image: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make_encoder(max_patches_per_pass=1)
    encoder.encode([[image(1)]])
    passes = Counting(encoder._features)
    monkeypatch.setattr(encoder, "_features", passes)
    requests = [[image(2)], [image(3), image(1)], [], [image(1)], [image(data=b"no image")]]
    seen = {index: len(passes.calls) for index, _ in encoder.encode_each(requests)}
    assert list(seen)[:2] == [2, 3] and len(seen) == 5
    assert [seen[index] for index in range(4)] == [1, 2, 0, 0]
    assert seen[4] <= 1  # rejected by a decoding thread at some time before the second pass


def test_the_warm_up_encodes_each_size(make_encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make_encoder()
    sizes = [(60, 90), (100, 40)]
    monkeypatch.setattr(encoder, "device", torch.device("cuda"))
    monkeypatch.setattr(encoder, "encode", Counting(lambda _: [torch.empty(0)]))
    encoder._warm_up(sizes)
    grids = [images[0].grid for ((images,),) in encoder.encode.calls]
    assert grids == [(1, 8, 6), (1, 4, 10)]
    monkeypatch.setattr(encoder, "encode", lambda _: [RequestError("image: no")])
    with pytest.raises(RuntimeError, match="60x90 failed: image: no"):
        encoder._warm_up(sizes)
