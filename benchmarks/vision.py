"""The vision encoder on a 1080x2400 screenshot.

    python -m benchmarks.vision --checkpoint DIR [--setting int8|bf16]

The setting is the dtype of the ViT's blocks. vit-N: the ViT alone, on N patches that are on the device.
png-to-embeddings: from a PNG file (68x150 random pixels, upscaled; always a new one) to its embeddings on the device;
png-to-embeddings-known: the same with a feature cache hit. Medians.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from contextlib import closing

import torch

from autoglm.checkpoint import Checkpoint
from autoglm.config import LimitsConfig, VisionSection, load_config
from autoglm.device import choose_device
from autoglm.errors import RequestError
from autoglm.media.image_file import ImageFile, media_hash
from autoglm.vision.encoder import VisionEncoder
from autoglm.vision.image_processor import grid_of, smart_resize
from benchmarks import limits
from benchmarks.report import Row, make_row, read_options, report
from benchmarks.screens import SIZE, random_screens

REPEATS = 9


def measure(
    checkpoint: Checkpoint, options: argparse.Namespace, size: tuple[int, int] = SIZE, repeats: int = REPEATS
) -> list[Row]:
    config = VisionSection(int8=options.setting == "int8", warm_up=(size,))
    grid = grid_of(smart_resize(size[1], size[0], checkpoint.image_limits), checkpoint.image_limits)
    images = [ImageFile(data, grid, media_hash(data, grid), "image") for data in random_screens(0, repeats + 2, size)]
    device, dtype = choose_device(load_config().model)
    with closing(VisionEncoder(checkpoint, config, LimitsConfig(), device, dtype)) as encoder:

        def encode(image: ImageFile) -> None:
            (features,) = encoder.encode([[image]])
            if isinstance(features, RequestError):
                raise features

        vit = encoder.vit
        num_patches, width = math.prod(grid), vit.model.patch_embed.proj.weight[0].numel()
        patches = torch.randn(num_patches, width, device=device).to(dtype)
        with torch.inference_mode():
            alone = median_seconds(lambda: vit(patches, [grid]), repeats)
        cold = median_seconds(lambda: encode(images.pop()), repeats)
        warm = median_seconds(lambda: encode(images[0]), 3 * repeats)
    work = limits.encode(checkpoint.vision, num_patches, options.setting)
    limit = limits.milliseconds(work, options.machine, options.setting)
    rate = {"TFLOP/s": work.operations / alone / 1e12}
    return [
        make_row(options, f"vit-{num_patches}", alone * 1e3, "ms", limit, rate),
        make_row(options, "png-to-embeddings", cold * 1e3, "ms", limit),
        make_row(options, "png-to-embeddings-known", warm * 1e3, "ms"),
    ]


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median time of a call until the device is done, after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    options = read_options(__doc__)
    report(options, "vision", measure(Checkpoint.open(options.checkpoint), options))


if __name__ == "__main__":
    main()
