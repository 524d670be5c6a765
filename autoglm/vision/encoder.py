"""The vision encoder as a server needs it: image files of many requests in, their embeddings out."""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from autoglm.checkpoint import Checkpoint
from autoglm.config import LimitsConfig, VisionSection
from autoglm.errors import RequestError
from autoglm.feature_cache import FeatureCache
from autoglm.media import ImageFile, decode_image, media_hash
from autoglm.media_encoder import FEATURE_DTYPE, MediaEncoder
from autoglm.vision.image_processor import check_grid, device_patches, grid_of, patches, smart_resize
from autoglm.vision.loading import cache_key, load
from autoglm.vision.pixel_limits import server_limits
from autoglm.vision.vit import VisionTransformer
from autoglm.weight_cache import WeightCache

log = logging.getLogger(__name__)

MIB = 2**20
# Larger images are resized on the host. They would be uploaded from pinned memory, which torch never gives back.
MAX_UPLOAD_PIXELS = 2**24


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
        self._model: VisionTransformer | None = None
        self._loading = threading.Lock()
        if config.loading == "preload":
            self._warm_up(config.warm_up)  # while nothing is kept
        self.cache = FeatureCache(device, config.feature_cache_mb * MIB, config.feature_cache_host_mb * MIB)

    @property
    def model(self) -> VisionTransformer:
        """The ViT. Its weights are read when it is first asked for; who asks meanwhile waits."""
        with self._loading:
            if self._model is None:
                self._model = load(self.checkpoint, self.device, self.dtype, self._int8, self._weights)
            return self._model

    def encode(self, requests: Sequence[Sequence[ImageFile]]) -> list[torch.Tensor | RequestError]:
        """Embed the images of several requests together.

        Returns:
            For each request its images' embeddings one after another, bfloat16 [tokens, hidden_size] on the device,
            in memory of their own; or the error of its first image that cannot be used, which other requests do not
            notice.
        """
        size = self.checkpoint.text.hidden_size
        found = self._encode(requests)
        results = [part if isinstance(part, RequestError) else self._join(part, size) for part in found]
        self._finish()
        return results

    def _key(self, file: ImageFile) -> str:
        return f"{self._digest}/{file.hash}"

    def _identity(self, file: ImageFile) -> str:
        return media_hash(file.data, file.grid)

    def _read(self, file: ImageFile) -> _Decoded:
        check_grid(file.grid, self.image_limits, "")  # who calls this model by itself may say any
        pixels = decode_image(file.data, self.limits, "")
        limits = self.image_limits
        size = file.grid[1] * limits.patch_size, file.grid[2] * limits.patch_size
        if not self._device_resizes or pixels.width * pixels.height > MAX_UPLOAD_PIXELS:
            return _Decoded(self._key(file), file.grid, torch.from_numpy(patches(pixels, size, limits)))
        uploaded = torch.from_numpy(np.array(pixels)).pin_memory().to(self.device, non_blocking=True)
        return _Decoded(self._key(file), file.grid, device_patches(uploaded, size, limits, self.dtype))

    def _fits(self, group: Sequence[_Decoded], another: _Decoded) -> bool:
        return sum(image.patches.shape[0] for image in (*group, another)) <= self.max_patches

    @torch.inference_mode()
    def _features(self, group: list[_Decoded]) -> list[torch.Tensor]:
        """The features of each image, each in a storage of its own."""
        packed = torch.cat([image.patches.to(self.device, self.dtype) for image in group])
        features = self.model(packed, [image.grid for image in group]).to(FEATURE_DTYPE)
        merged = self.checkpoint.vision.spatial_merge_size**2
        return [part.clone() for part in features.split([image.patches.shape[0] // merged for image in group])]

    def _warm_up(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Read the weights; on a GPU also encode images of these sizes (width, height), so that no request pays for
        what happens once.

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
