"""The vision encoder as a server needs it: image files of many requests in, their embeddings out."""

from __future__ import annotations

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
from autoglm.device import beside
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
from autoglm.vision.vit import VisionTransformer
from autoglm.weights.cache import WeightCache

log = logging.getLogger(__name__)

MIB = 2**20
# Larger images are resized on the host. They would be uploaded from pinned memory, which torch never gives back.
MAX_UPLOAD_PIXELS = 2**24
MAX_SIDE = 2**14  # of a PNG that the GPU unfilters: it works along the rows of a band, one step for a pixel


class _Decoded(NamedTuple):
    """An image under its key in the cache, and its patches [N, 1176], on the host or already on the device."""

    key: str
    grid: tuple[int, int, int]
    patches: torch.Tensor


class VisionEncoder(MediaEncoder[ImageFile, _Decoded]):
    """Image files to embeddings, batched, cached, safe for several threads."""

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
        """
        Args:
            dtype: what is computed in.
            weights: the weight cache, for INT8.
        """
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
            self._warm_up(config.warm_up)  # while nothing is kept
        self.cache = FeatureCache(device, config.feature_cache_mb * MIB, config.feature_cache_host_mb * MIB)

    @property
    def model(self) -> VisionTransformer:
        """The ViT; it is loaded when it is first asked for."""
        return self.vit.model

    @property
    def vit(self) -> GraphedTransformer:
        """The ViT. Its weights are read and its passes captured when it is first asked for; who asks meanwhile
        waits."""
        with self._loading:
            if self._vit is None:
                vit = GraphedTransformer(load(self.checkpoint, self.device, self.dtype, self._int8, self._weights))
                vit.capture(self._captured)
                self._vit = vit
            return self._vit

    def encode(self, requests: Sequence[Sequence[ImageFile]]) -> list[torch.Tensor | RequestError]:
        """What `encode_each` gives, in the order of the requests."""
        results = dict(self.encode_each(requests))
        return [results[index] for index in range(len(requests))]

    def encode_each(self, requests: Sequence[Sequence[ImageFile]]) -> Iterator[tuple[int, torch.Tensor | RequestError]]:
        """Embed the images of several requests together; whose images are embedded need not wait for the others'.

        Yields:
            Which request, and its images' embeddings one after another, bfloat16 [tokens, hidden_size] on the device,
            in memory of their own; or the error of its first image that cannot be used, which other requests do not
            notice.
        """
        size = self.checkpoint.text.hidden_size
        for index, found in self._encode(requests):
            result = found if isinstance(found, RequestError) else self._join(found, size)
            self._finish()
            yield index, result

    def _key(self, file: ImageFile) -> str:
        return f"{self._digest}/{file.hash}"

    def _identity(self, file: ImageFile) -> str:
        return media_hash(file.data, file.grid)

    def _read(self, file: ImageFile) -> _Decoded:
        check_grid(file.grid, self.image_limits, "")  # who calls this model by itself may say any
        limits = self.image_limits
        size = file.grid[1] * limits.patch_size, file.grid[2] * limits.patch_size
        info = read_image(file.data, self.limits, "") if self._device_resizes else None
        if info is None or info.width * info.height > MAX_UPLOAD_PIXELS:
            pixels = decode_image(file.data, self.limits, "")
            return _Decoded(self._key(file), file.grid, torch.from_numpy(patches(pixels, size, limits)))
        result = beside(self.device, lambda: device_patches(self._upload(file, info), size, limits, self.dtype))
        return _Decoded(self._key(file), file.grid, result)

    def _upload(self, file: ImageFile, info: ImageInfo) -> torch.Tensor:
        """An image's pixels, uint8 [H, W, 3] on the device."""
        lines = None
        if info.format == "PNG" and info.orientation == 1 and max(info.width, info.height) <= MAX_SIDE:
            lines = read_scanlines(file.data)
        if lines is None:
            return self._copy(np.array(decode_image(file.data, self.limits, "")))
        return get_kernels(self.device).unfilter(self._copy(lines.rows), lines.channels)

    def _copy(self, array: NDArray[np.uint8]) -> torch.Tensor:
        """To the device, from pinned memory: this thread need not hold Python's lock meanwhile."""
        pinned = torch.empty(array.shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        np.copyto(pinned.numpy(), array)
        return pinned.to(self.device, non_blocking=True)

    def _fits(self, group: Sequence[_Decoded], another: _Decoded) -> bool:
        return sum(image.patches.shape[0] for image in (*group, another)) <= self.max_patches

    @torch.inference_mode()
    def _features(self, group: list[_Decoded]) -> list[torch.Tensor]:
        """The features of each image, each in a storage of its own."""
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
        """Read the weights; on a GPU also encode images of these sizes (width, height), from their files on, so that
        no request pays for what happens once.

        Raises:
            RuntimeError: one of them failed.
        """
        model = self.model
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
        log.info("the vision encoder (depth %d) is warm after %.1f s", model.config.depth, time.perf_counter() - begin)
