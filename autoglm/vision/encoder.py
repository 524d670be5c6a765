"""The vision encoder as a server needs it: image files of many requests in, their embeddings out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

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


class _Decoded(NamedTuple):
    """An image's patches [N, 1176], and the index of the request that it belongs to."""

    request: int
    patches: torch.Tensor
    grid: tuple[int, int, int]


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
        jobs = [[self._threads.submit(self._patches, image) for image in images] for images in requests]
        faults: dict[int, RequestError] = {}
        features: list[list[torch.Tensor]] = [[] for _ in requests]
        pending: list[_Decoded] = []
        for index, images in enumerate(requests):
            try:
                pairs = zip(jobs[index], images, strict=True)
                pending += [_Decoded(index, job.result(), image.grid) for job, image in pairs]
            except RequestError as error:
                faults[index] = error
            except Exception as error:  # such as a want of memory: this request's alone
                log.exception("an image could not be decoded")
                faults[index] = RequestError(f"an image could not be decoded: {error}", ErrorCode.INTERNAL)
        for group in self._passes(pending):
            try:
                embedded = self._embed(group)
            except Exception as error:
                log.exception("a pass over %d images failed", len(group))
                fault = RequestError(f"the vision encoder failed: {error}", ErrorCode.INTERNAL)
                faults |= {image.request: fault for image in group}
            else:
                for image, feature in zip(group, embedded, strict=True):
                    features[image.request].append(feature)
        none = torch.empty(0, self.checkpoint.text.hidden_size, dtype=FEATURE_DTYPE, device=self.device)
        results = [faults[i] if i in faults else torch.cat((none, *rows)) for i, rows in enumerate(features)]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the features go to another process, which knows no stream of ours
        return results

    def _patches(self, image: ImageFile) -> torch.Tensor:
        limits = self.checkpoint.image_limits
        size = image.grid[1] * limits.patch_size, image.grid[2] * limits.patch_size
        pixels = decode_image(image.data, self.limits, image.name)
        return torch.from_numpy(patches(pixels, size, limits))

    def _passes(self, pending: list[_Decoded]) -> Iterator[list[_Decoded]]:
        """Cut the images into runs of at most `max_patches` patches; one that is larger goes alone."""
        group: list[_Decoded] = []
        count = 0
        for image in pending:
            if group and count + image.patches.shape[0] > self.max_patches:
                yield group
                group, count = [], 0
            group.append(image)
            count += image.patches.shape[0]
        if group:
            yield group

    @torch.inference_mode()
    def _embed(self, group: list[_Decoded]) -> tuple[torch.Tensor, ...]:
        """One pass; the features of each image."""
        packed = torch.cat([image.patches.to(self.device) for image in group]).to(self.dtype)
        features = self.model(packed, [image.grid for image in group]).to(FEATURE_DTYPE)
        merged = self.checkpoint.vision.spatial_merge_size**2
        return torch.split(features, [image.patches.shape[0] // merged for image in group])
