"""How long the vision encoder takes for a 1080x2400 screenshot.

    python -m benchmarks.vision --checkpoint DIR [--setting int8|bf16]

The setting is that of the blocks' products in the ViT. vit-N: the ViT alone, on N patches that lie on the device.
png-to-embeddings: from a PNG's bytes (68x150 random pixels, enlarged; another one each time) to its embeddings on the
device; png-to-embeddings-known: the same for a file that the feature cache knows. Medians.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

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
    encoder = VisionEncoder(checkpoint, config, LimitsConfig(), *choose_device(load_config().model))
    try:
        grid = grid_of(smart_resize(size[1], size[0], checkpoint.image_limits), checkpoint.image_limits)
        count = math.prod(grid)

        images = [
            ImageFile(data, grid, media_hash(data, grid), "image") for data in random_screens(0, repeats + 2, size)
        ]

        def encode(image: ImageFile) -> None:
            (features,) = encoder.encode([[image]])
            if isinstance(features, RequestError):
                raise features

        vit = encoder.vit
        width = vit.model.patch_embed.proj.weight[0].numel()
        patches = torch.randn(count, width, device=encoder.device).to(encoder.dtype)
        with torch.inference_mode():
            alone = seconds(lambda: vit(patches, [grid]), repeats)
        cold = seconds(lambda: encode(images.pop()), repeats)
        warm = seconds(lambda: encode(images[0]), 3 * repeats)
    finally:
        encoder.close()
    work = limits.encode(checkpoint.vision, count, options.setting)
    least = limits.milliseconds(work, options.machine, options.setting)
    rate = {"TFLOP/s": work.operations / alone / 1e12}
    return [
        make_row(options, f"vit-{count}", alone * 1e3, "ms", least, rate),
        make_row(options, "png-to-embeddings", cold * 1e3, "ms", least),
        make_row(options, "png-to-embeddings-known", warm * 1e3, "ms"),
    ]


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median of so many runs to their end on the device, after one that does not count."""
    found = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def main() -> None:
    options = read_options(__doc__)
    report(options, "vision", measure(Checkpoint.open(options.checkpoint), options))


if __name__ == "__main__":
    main()
