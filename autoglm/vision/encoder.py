"""The vision encoder: image files of many requests in, their embeddings out."""

import io
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from autoglm.checkpoint import Checkpoint
from autoglm.config import LimitsConfig, VisionSection
from autoglm.device import run_on_side_stream
from autoglm.errors import RequestError
from autoglm.kernels import get_kernels
from autoglm.media.encoder import FEATURE_DTYPE, MediaEncoder
from autoglm.media.feature_cache import FeatureCache
from autoglm.media.image_file import ImageFile, ImageInfo, decode_image, media_hash, read_image
from autoglm.vision.graphs import GraphedTransformer
from autoglm.vision.image_processor import check_grid, device_patches, grid_of, patches, smart_resize
from autoglm.vision.loader import cache_key, load
from autoglm.vision.pixel_limits import server_limits
from autoglm.vision.png import read_scanlines
from autoglm.weights.cache import WeightCache

log = logging.getLogger(__name__)

MIB = 2**20
# Larger images are resized on the host: uploads use pinned memory, which torch never frees.
MAX_UPLOAD_PIXELS = 2**24
MAX_SIDE = 2**14  # of PNGs unfiltered on the GPU, which takes one step per pixel of a row


class _Decoded(NamedTuple):
    """An image's cache key, grid and patches [N, 1176], on the host or on the device."""

    key: str
    grid: tuple[int, int, int]
    patches: torch.Tensor


class VisionEncoder(MediaEncoder[ImageFile, _Decoded]):
    """Batched, cached and thread-safe; see `MediaEncoder`.

    Args:
        dtype: of the computation.
        weights: the weight cache, for INT8.
    """

    kind = "vision encoder"

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: VisionSection,
        limits: LimitsConfig,
        device: torch.device,
        dtype: torch.dtype,
        weights: WeightCache | None = None,
    ) -> None:
        super().__init__(device, config.decode_threads)
        self.checkpoint = checkpoint
        self.limits = limits
        self.image_limits = server_limits(checkpoint.image_limits, limits)
        self.max_patches = config.max_patches_per_pass
        self.dtype = dtype
        resample = checkpoint.image_limits.resample
        self._device_resizes = device.type != "cpu" and resample == Image.Resampling.BICUBIC
        self._int8 = config.int8
        self._weights = weights
        self._digest = cache_key(checkpoint, dtype, config.int8).digest
        sizes = [smart_resize(height, width, self.image_limits) for width, height in config.warm_up]
        self._captured = [grid_of(size, self.image_limits) for size in sizes] if device.type == "cuda" else []
        self._vit: GraphedTransformer | None = None
        self._loading = threading.Lock()
        if config.loading == "preload":
            self._warm_up(config.warm_up)  # with the cache disabled
        self.cache = FeatureCache(device, config.feature_cache_mb * MIB, config.feature_cache_host_mb * MIB)

    @property
    def vit(self) -> GraphedTransformer:
        """The ViT with its CUDA graphs, loaded and captured at first use; concurrent callers wait."""
        with self._loading:
            if self._vit is None:
                vit = GraphedTransformer(load(self.checkpoint, self.device, self.dtype, self._int8, self._weights))
                vit.capture(self._captured)
                self._vit = vit
            return self._vit

    def encode(self, requests: Sequence[Sequence[ImageFile]]) -> list[torch.Tensor | RequestError]:
        """The results of `encode_each` in the order of the requests."""
        results = dict(self.encode_each(requests))
        return [results[index] for index in range(len(requests))]

    def encode_each(self, requests: Sequence[Sequence[ImageFile]]) -> Iterator[tuple[int, torch.Tensor | RequestError]]:
        """Embed the images of several requests together, yielding each request as soon as it is done.

        Yields:
            The index of the request, and the embeddings of its images one after another, bfloat16 [tokens, hidden_size]
            on the device, in their own memory; or the error of its first unusable image, which does not affect other
            requests.
        """
        size = self.checkpoint.text.hidden_size
        for index, found in self._encode(requests):
            result = found if isinstance(found, RequestError) else self._join(found, size)
            self._finish()
            yield index, result

    def _cache_key(self, file: ImageFile) -> str:
        return f"{self._digest}/{file.media_hash}"

    def _media_hash(self, file: ImageFile) -> str:
        return media_hash(file.data, file.grid)

    def _read(self, file: ImageFile) -> _Decoded:
        check_grid(file.grid, self.image_limits, "")  # a direct caller may send any grid
        limits = self.image_limits
        size = file.grid[1] * limits.patch_size, file.grid[2] * limits.patch_size
        info = read_image(file.data, self.limits, "") if self._device_resizes else None
        if info is None or info.width * info.height > MAX_UPLOAD_PIXELS:
            pixels = decode_image(file.data, self.limits, "")
            return _Decoded(self._cache_key(file), file.grid, torch.from_numpy(patches(pixels, size, limits)))
        result = run_on_side_stream(
            self.device, lambda: device_patches(self._upload(file, info), size, limits, self.dtype)
        )
        return _Decoded(self._cache_key(file), file.grid, result)

    def _upload(self, file: ImageFile, info: ImageInfo) -> torch.Tensor:
        """Decode an image to pixels uint8 [H, W, 3] on the device."""
        lines = None
        if info.format == "PNG" and info.orientation == 1 and max(info.width, info.height) <= MAX_SIDE:
            lines = read_scanlines(file.data)
        if lines is None:
            return self._copy(np.array(decode_image(file.data, self.limits, "")))
        return get_kernels(self.device).unfilter(rows=self._copy(lines.rows), channels=lines.channels)

    def _copy(self, array: NDArray[np.uint8]) -> torch.Tensor:
        """Copy to the device through pinned memory, so that the thread does not hold the GIL meanwhile."""
        pinned = torch.empty(array.shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        np.copyto(pinned.numpy(), array)
        return pinned.to(self.device, non_blocking=True)

    def _fits(self, group: Sequence[_Decoded], another: _Decoded) -> bool:
        return sum(image.patches.shape[0] for image in (*group, another)) <= self.max_patches

    @torch.inference_mode()
    def _features(self, group: list[_Decoded]) -> list[torch.Tensor]:
        for image in group:
            if image.patches.is_cuda:
                image.patches.record_stream(torch.cuda.current_stream(self.device))
        packed = torch.cat([image.patches.to(self.device, self.dtype) for image in group])
        features = self.vit(packed, [image.grid for image in group]).to(FEATURE_DTYPE)
        if len(group) == 1:
            return [features]
        merged = self.checkpoint.vision.spatial_merge_size**2
        lengths = [image.patches.shape[0] // merged for image in group]
        return [part.clone() for part in features.split_with_sizes(lengths)]

    def _warm_up(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Load the weights; on a GPU also encode an image file of each size (width, height), which compiles kernels.

        Raises:
            RuntimeError: one of them failed.
        """
        config = self.vit.model.config
        if self.device.type != "cuda":
            return
        begin = time.perf_counter()
        for width, height in sizes:
            file = io.BytesIO()
            Image.new("RGB", (width, height)).save(file, "PNG")
            data, limits = file.getvalue(), self.image_limits
            grid = grid_of(smart_resize(height, width, limits), limits)
            (result,) = self.encode([[ImageFile(data, grid, media_hash(data, grid), "image")]])
            if isinstance(result, RequestError):
                raise RuntimeError(f"the vision encoder's warm-up with {width}x{height} failed: {result.message}")
        log.info("warmed up the vision encoder (depth %d) in %.1f s", config.depth, time.perf_counter() - begin)
