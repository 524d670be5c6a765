"""The vision encoder as a server needs it: image files of many requests in, their embeddings out."""

from __future__ import annotations

import io
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from autoglm.checkpoint import Checkpoint
from autoglm.config import LimitsConfig, VisionSection
from autoglm.errors import ErrorCode, Exact, RequestError, invalid
from autoglm.media import ImageFile, decode_image, media_hash
from autoglm.vision.feature_cache import FeatureCache
from autoglm.vision.image_processor import check_grid, device_patches, grid_of, patches, smart_resize
from autoglm.vision.loading import cache_key, load
from autoglm.vision.pixel_limits import server_limits
from autoglm.vision.vit import VisionTransformer
from autoglm.weight_cache import WeightCache

log = logging.getLogger(__name__)

MIB = 2**20
# Features are handed over and kept in this dtype, whatever the encoder computes in.
FEATURE_DTYPE = torch.bfloat16
# Larger images are resized on the host. They would be uploaded from pinned memory, which torch never gives back.
MAX_UPLOAD_PIXELS = 2**24


class _Decoded(NamedTuple):
    """An image under its key in the cache, and its patches [N, 1176], on the host or already on the device."""

    key: str
    grid: tuple[int, int, int]
    patches: torch.Tensor


class VisionEncoder:
    """Decodes in a pool of threads and embeds the images of all given requests in as few passes as the bound allows.

    What it has embedded it keeps, within bounds: a known image is not even decoded. May be called by several threads;
    an image that they bring at the same time is encoded once.
    """

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
        self.checkpoint = checkpoint
        self.limits = limits
        self.image_limits = server_limits(checkpoint.image_limits, limits)
        self.max_patches = config.max_patches_per_pass
        self.device = device
        self.dtype = dtype
        self._threads = ThreadPoolExecutor(config.decode_threads, "decode", self._enter_thread)
        self._ahead = 2 * config.decode_threads  # images decoded beyond the pass that is being filled
        resample = checkpoint.image_limits.resample
        self._device_resizes = device.type != "cpu" and resample == Image.Resampling.BICUBIC
        self._int8 = config.int8
        self._weights = weights
        self._identity = cache_key(checkpoint, dtype, config.int8).digest
        self._model: VisionTransformer | None = None
        self._loading = threading.Lock()
        if config.loading == "preload":
            self.cache = FeatureCache(device, 0)  # what warms up is not kept
            self._warm_up(config.warm_up)
        self.cache = FeatureCache(device, config.feature_cache_mb * MIB, config.feature_cache_host_mb * MIB)

    @property
    def model(self) -> VisionTransformer:
        """The ViT. Its weights are read when it is first asked for; who asks meanwhile waits."""
        with self._loading:
            if self._model is None:
                self._model = load(self.checkpoint, self.device, self.dtype, self._int8, self._weights)
            return self._model

    def close(self) -> None:
        self._threads.shutdown()

    def encode(self, requests: Sequence[Sequence[ImageFile]]) -> list[torch.Tensor | RequestError]:
        """Embed the images of several requests together.

        Returns:
            For each request its images' embeddings one after another, bfloat16 [tokens, hidden_size] on the device,
            in memory of their own; or the error of its first image that cannot be used, which other requests do not
            notice.
        """
        claimed: list[tuple[ImageFile, Future[torch.Tensor]]] = []
        shares: list[list[Future[torch.Tensor]]] = [[] for _ in requests]
        try:
            for images, futures in zip(requests, shares, strict=True):
                for image in images:
                    future, is_mine = self.cache.claim(self._key(image))
                    futures.append(future)
                    if is_mine:
                        claimed.append((image, future))
            for group in self._passes(self._decoded(image for image, _ in claimed)):
                self._embed(group)
        finally:  # whatever has happened, nobody may wait for ever
            for image, future in claimed:
                if not future.done():
                    self.cache.fail(self._key(image), RequestError(": the vision encoder failed", ErrorCode.INTERNAL))
        results = [self._join(*pair) for pair in zip(requests, shares, strict=True)]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the features go to another process, which knows no stream of ours
        return results

    def _enter_thread(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # each thread has its own; Triton's kernels run on that

    def _key(self, image: ImageFile) -> str:
        return f"{self._identity}/{image.hash}"

    def _join(self, images: Sequence[ImageFile], shares: Sequence[Future[torch.Tensor]]) -> torch.Tensor | RequestError:
        """A copy of one request's features: the cache's own are handed to nobody who could write them."""
        rows = [torch.empty(0, self.checkpoint.text.hidden_size, dtype=FEATURE_DTYPE, device=self.device)]
        for image, share in zip(images, shares, strict=True):
            # Not raised: an error would keep this frame alive, and the frame the error, with all that they hold.
            fault = share.exception()
            if isinstance(fault, RequestError):
                return RequestError(image.name + fault.message, fault.code)
            rows.append(share.result())
        return torch.cat(rows)

    def _decoded(self, images: Iterable[ImageFile]) -> Iterator[_Decoded]:
        """The images that can be used, in order; the others' claims are answered with the reason.

        Threads decode ahead of whoever takes the images, but not further than memory is meant to be filled.
        """
        jobs: deque[Future[_Decoded | None]] = deque()
        for image in images:
            jobs.append(self._threads.submit(self._decode, image))
            if len(jobs) > self._ahead and (decoded := jobs.popleft().result()):
                yield decoded
        while jobs:
            if decoded := jobs.popleft().result():
                yield decoded

    def _decode(self, image: ImageFile) -> _Decoded | None:
        key = self._key(image)
        try:
            return _Decoded(key, image.grid, self._patches(image))
        except RequestError as error:
            self.cache.fail(key, RequestError(error.message, error.code))
        except Exception as error:  # such as a want of memory: this image's alone
            log.exception("an image could not be decoded")
            self.cache.fail(key, RequestError(f": could not be decoded: {error}", ErrorCode.INTERNAL))
        return None

    def _patches(self, image: ImageFile) -> torch.Tensor:
        """Decode and resize. Messages of errors begin after the image's name: several requests may share them."""
        # Who calls this model by itself may say any grid and hash. A false hash finds what it names, but puts nothing
        # there.
        check_grid(image.grid, self.image_limits, "")
        if media_hash(image.data, image.grid) != image.hash:
            raise invalid("", Exact("a hash that is not this file's"), "the SHA-256 of the file and its grid")
        pixels = decode_image(image.data, self.limits, "")
        limits = self.image_limits
        size = image.grid[1] * limits.patch_size, image.grid[2] * limits.patch_size
        if not self._device_resizes or pixels.width * pixels.height > MAX_UPLOAD_PIXELS:
            return torch.from_numpy(patches(pixels, size, limits))
        uploaded = torch.from_numpy(np.array(pixels)).pin_memory().to(self.device, non_blocking=True)
        return device_patches(uploaded, size, limits, self.dtype)

    def _passes(self, images: Iterable[_Decoded]) -> Iterator[list[_Decoded]]:
        """Cut the images into runs of at most `max_patches` patches; one that is larger goes alone."""
        group: list[_Decoded] = []
        count = 0
        for image in images:
            if group and count + image.patches.shape[0] > self.max_patches:
                yield group
                group, count = [], 0
            group.append(image)
            count += image.patches.shape[0]
        if group:
            yield group

    def _embed(self, group: list[_Decoded]) -> None:
        """One pass; it answers the claims of its images."""
        try:
            features = self._features(group)
        except Exception as error:
            log.exception("a pass over %d images failed", len(group))
            fault = RequestError(f": the vision encoder failed: {error}", ErrorCode.INTERNAL)
            for image in group:
                self.cache.fail(image.key, fault)
        else:
            for image, part in zip(group, features, strict=True):
                self.cache.put(image.key, part)

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
