"""The vision encoder as a server needs it: image files of many requests in, their embeddings out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from autoglm.checkpoint import Checkpoint
from autoglm.config import LimitsConfig, VisionSection
from autoglm.errors import ErrorCode, RequestError
from autoglm.media import decode_image
from autoglm.vision.image_processor import patches
from autoglm.vision.vit import VisionTransformer

log = logging.getLogger(__name__)

# Features are handed over and kept in this dtype, whatever the encoder computes in.
FEATURE_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class ImageFile:
    """An encoded image, the grid (1, rows, columns) of patches it is resized to, and its name in messages."""

    data: bytes
    grid: tuple[int, int, int]
    name: str


class VisionEncoder:
    """Decodes in a pool of threads and embeds the images of all given requests in as few passes as the bound allows."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: VisionSection,
        limits: LimitsConfig,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.checkpoint = checkpoint
        self.limits = limits
        self.max_patches = config.max_patches_per_pass
        self.device = device
        self.dtype = dtype
        self.model = VisionTransformer.load(checkpoint, device, dtype)
        self._threads = ThreadPoolExecutor(config.decode_threads, thread_name_prefix="decode")

    def close(self) -> None:
        self._threads.shutdown()

    def encode(self, requests: Sequence[Sequence[ImageFile]]) -> list[torch.Tensor | RequestError]:
        """Embed the images of several requests together.

        Returns:
            For each request its images' embeddings one after another, bfloat16 [tokens, hidden_size] on the device,
            or the error of its first image that cannot be used; other requests are not affected.
        """
        decoded = [[self._threads.submit(self._patches, image) for image in images] for images in requests]
        results: list[torch.Tensor | RequestError] = []
        pending: list[tuple[int, torch.Tensor, tuple[int, int, int]]] = []
        for index, images in enumerate(requests):
            results.append(torch.empty(0, self.checkpoint.text.hidden_size, dtype=FEATURE_DTYPE, device=self.device))
            try:
                ready = [(index, job.result(), im.grid) for job, im in zip(decoded[index], images, strict=True)]
            except RequestError as error:
                results[index] = error
            except Exception as error:  # such as a want of memory: this request's alone
                log.exception("an image could not be decoded")
                results[index] = RequestError(f"an image could not be decoded: {error}", ErrorCode.INTERNAL)
            else:
                pending += ready
        for group in self._passes(pending):
            try:
                features = self._embed([pixels for _, pixels, _ in group], [grid for _, _, grid in group])
            except Exception as error:
                log.exception("a pass over %d images failed", len(group))
                for index, _, _ in group:
                    results[index] = RequestError(f"the vision encoder failed: {error}", ErrorCode.INTERNAL)
                continue
            for (index, _, _), feature in zip(group, features, strict=True):
                before = results[index]
                if isinstance(before, torch.Tensor):
                    results[index] = torch.cat((before, feature))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the features go to another process, which knows no stream of ours
        return results

    def _patches(self, image: ImageFile) -> torch.Tensor:
        limits = self.checkpoint.image_limits
        size = image.grid[1] * limits.patch_size, image.grid[2] * limits.patch_size
        pixels = decode_image(image.data, self.limits, image.name)
        return torch.from_numpy(patches(pixels, size, limits))

    def _passes(
        self, pending: list[tuple[int, torch.Tensor, tuple[int, int, int]]]
    ) -> Iterator[list[tuple[int, torch.Tensor, tuple[int, int, int]]]]:
        """Cut the images into runs of at most `max_patches` patches; one that is larger goes alone."""
        group: list[tuple[int, torch.Tensor, tuple[int, int, int]]] = []
        count = 0
        for item in pending:
            if group and count + item[1].shape[0] > self.max_patches:
                yield group
                group, count = [], 0
            group.append(item)
            count += item[1].shape[0]
        if group:
            yield group

    @torch.inference_mode()
    def _embed(self, pixels: list[torch.Tensor], grids: list[tuple[int, int, int]]) -> Sequence[torch.Tensor]:
        packed = torch.cat([p.to(self.device) for p in pixels]).to(self.dtype)
        merged = self.checkpoint.vision.spatial_merge_size**2
        return self.model(packed, grids).to(FEATURE_DTYPE).split([p.shape[0] // merged for p in pixels])  # type: ignore[no-any-return]
