"""CUDA graphs of the ViT: which passes are replayed, and that their results are those of eager passes."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from autoglm.config import LimitsConfig, VisionSection
from autoglm.media.image_file import ImageFile, media_hash
from autoglm.vision.encoder import VisionEncoder
from autoglm.vision.graphs import GraphedTransformer, _Graph
from autoglm.vision.image_processor import grid_of, smart_resize
from autoglm.vision.vit import Grid, VisionTransformer
from tests.conftest import Pair
from tests.images import encode, picture
from tests.prompts import random_pixels

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SMALL, LARGE = (1, 4, 6), (1, 8, 10)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@dataclass
class Recorded:
    """Replaces a CUDA graph."""

    replay: Callable[[], None]


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[Grid]:
    """The grids of the replayed passes; captures without a GPU."""
    grids: list[Grid] = []

    def capture(self: GraphedTransformer, grid: Grid, pool: Any) -> _Graph:
        patches, layout = self._patches[: math.prod(grid)], self.model.layout([grid])
        features = self.model.embed(patches, layout)

        def replay() -> None:
            grids.append(grid)
            time.sleep(0.002)  # gives other threads a chance to overwrite the input
            features.copy_(self.model.embed(patches, layout))

        return _Graph(Recorded(replay), layout, features)  # type: ignore[arg-type]

    monkeypatch.setattr(GraphedTransformer, "_capture", capture)
    for name in ("empty_cache", "memory_reserved", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    return grids


@pytest.fixture
def model(plain: Pair) -> VisionTransformer:
    return VisionTransformer.load(plain.checkpoint, CPU, torch.float32)


@torch.inference_mode()
def eager(model: VisionTransformer, grids: Sequence[Grid], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches, in the model's dtype on its device, and their features."""
    weight = model.patch_embed.proj.weight
    patches = random_pixels(list(grids), seed).to(weight)
    return patches, model(patches, grids)


def test_passes_over_one_image_of_a_captured_size_are_replayed(model: VisionTransformer, replayed: list[Grid]) -> None:
    graphed = GraphedTransformer(model)
    graphed.capture([SMALL, LARGE, SMALL])
    passes = [[LARGE], [SMALL], [SMALL, SMALL], [(1, 6, 4)], [SMALL], [LARGE]]
    wanted = [eager(model, grids, seed) for seed, grids in enumerate(passes)]
    found = [graphed(patches, grids) for (patches, _), grids in zip(wanted, passes, strict=True)]
    assert all(torch.equal(mine, features) for mine, (_, features) in zip(found, wanted, strict=True))
    assert replayed == [LARGE, SMALL, SMALL, LARGE]


def test_threads_take_turns(model: VisionTransformer, replayed: list[Grid]) -> None:
    graphed = GraphedTransformer(model)
    graphed.capture([SMALL, LARGE])
    passes = [[(SMALL, LARGE)[seed % 2]] for seed in range(12)]
    wanted = [eager(model, grids, seed) for seed, grids in enumerate(passes)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(graphed, [patches for patches, _ in wanted], passes))
    for mine, (_, features) in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, features)  # not equal: the CPU's threads split the work differently
    assert len(replayed) == 12


def test_without_memory_for_a_graph_the_pass_runs_eagerly(
    model: VisionTransformer, replayed: list[Grid], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    capture = GraphedTransformer._capture

    def fail(self: GraphedTransformer, grid: Grid, pool: Any) -> _Graph:
        if grid == SMALL:
            raise torch.OutOfMemoryError("no memory")
        return capture(self, grid, pool)

    monkeypatch.setattr(GraphedTransformer, "_capture", fail)
    graphed = GraphedTransformer(model)
    with caplog.at_level(logging.WARNING):
        graphed.capture([SMALL, LARGE])  # the largest first
    assert "[(1, 4, 6)] run without CUDA graphs: no memory" in caplog.text
    for grid in (SMALL, LARGE):
        patches, wanted = eager(model, [grid], 1)
        assert torch.equal(graphed(patches, [grid]), wanted)
    assert replayed == [LARGE]


@pytest.mark.parametrize("loading", ["lazy", "preload"])
def test_the_sizes_of_the_warm_up_are_captured_when_the_weights_are_loaded(
    plain: Pair, loading: str, replayed: list[Grid], monkeypatch: pytest.MonkeyPatch
) -> None:
    captured: list[list[Grid]] = []
    loaded = VisionTransformer.load(plain.checkpoint, CPU, torch.float32)
    monkeypatch.setattr("autoglm.vision.encoder.load", lambda *_: loaded)
    monkeypatch.setattr(GraphedTransformer, "capture", lambda self, grids: captured.append(list(grids)))
    monkeypatch.setattr(VisionEncoder, "encode", lambda *_: [torch.empty(0)])
    config = VisionSection(loading=loading, warm_up=((60, 90), (100, 40)), feature_cache_mb=0)  # type: ignore[arg-type]
    encoder = VisionEncoder(plain.checkpoint, config, LimitsConfig(), torch.device("cuda"), torch.float32)
    assert len(captured) == (loading == "preload")
    assert encoder.vit.model is encoder.vit.model is loaded
    assert captured == [[(1, 8, 6), (1, 4, 10)]]
    encoder.close()


@needs_gpu
@pytest.mark.parametrize("int8", [False, True])
def test_replayed_passes_equal_eager_ones(plain: Pair, int8: bool) -> None:
    """One size uses cuDNN's attention, the other our kernel; other passes run between them, in several threads."""
    large, small = (1, 64, 66), (1, 12, 10)
    model = VisionTransformer.load(plain.checkpoint, GPU, torch.bfloat16, int8)
    graphed = GraphedTransformer(model)
    graphed.capture([small, large])
    assert graphed._graphs.keys() == {large, small}
    passes = [[large], [small], [large, small, (1, 2, 2)], [(1, 6, 4)] * 4, [small], [large], [small, large]] * 3
    wanted = [eager(model, grids, seed) for seed, grids in enumerate(passes)]
    for _ in range(2):
        with ThreadPoolExecutor(3) as threads:
            found = list(threads.map(graphed, [patches for patches, _ in wanted], passes))
        for mine, (_, features), grids in zip(found, wanted, passes, strict=True):
            assert torch.equal(mine, features), grids


@needs_gpu
def test_features_with_graphs_equal_those_without(plain: Pair) -> None:
    size, limits = (900, 1200), plain.checkpoint.image_limits
    grid = grid_of(smart_resize(size[1], size[0], limits), limits)
    data = encode(picture(*size, seed=1))
    file = ImageFile(data, grid, media_hash(data, grid), "image")
    found = []
    for warm_up in ((size, (300, 200)), ()):
        config = VisionSection(warm_up=warm_up, feature_cache_mb=0)
        encoder = VisionEncoder(plain.checkpoint, config, LimitsConfig(), GPU, torch.bfloat16)
        assert len(encoder.vit._graphs) == len(warm_up)
        for _ in range(3):  # cuDNN is used from the second pass on
            (features,) = encoder.encode([[file]])
        assert isinstance(features, torch.Tensor)
        found.append(features)
        encoder.close()
    assert torch.equal(*found)
