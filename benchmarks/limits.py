"""Roofline model: lower bounds on time from a workload's bytes and operations, for a checkpoint's shape.

A bound is the larger of two times, as if they overlapped perfectly: the bytes that must be read from GPU memory, at the
measured bandwidth of a plain read, and the operations of GEMMs and attention, at the measured rate of the best
library's large square GEMM. Not counted: norms, biases, scales (4 bytes per row), activations, sampling, launches and
the host.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autoglm.checkpoint import TextConfig, VisionConfig

GIB = 2**30
WEIGHT_BYTES = {"int8": 1, "bf16": 2}
CACHE_BYTES = 2  # keys and values in bf16


@dataclass(frozen=True)
class PeakRates:
    """Measured on the machine: bytes/s of reading 4 GB once, and operations/s of GEMMs."""

    read: float
    int8: float
    bf16: float

    def gemm(self, setting: str) -> float:
        return self.int8 if setting == "int8" else self.bf16


PEAK_RATES = {"h200": PeakRates(read=4.50e12, int8=950e12, bf16=740e12)}  # 2026-11-22, torch 2.11.0+cu130


@dataclass(frozen=True)
class Work:
    """Bytes read, and operations (a multiply-add is two) by the dtype that they are computed in."""

    bytes: float = 0.0
    products: float = 0.0  # of the linear layers, in the setting's dtype
    bf16: float = 0.0  # of attention and everything else that is not quantised

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.products + other.products, self.bf16 + other.bf16)

    @property
    def operations(self) -> float:
        return self.products + self.bf16

    def seconds(self, rates: PeakRates, setting: str) -> float:
        """The larger of the two times."""
        return max(self.bytes / rates.read, self.products / rates.gemm(setting) + self.bf16 / rates.bf16)


def milliseconds(work: Work, machine: str, setting: str) -> float:
    """The lower bound on a machine; NaN if its peak rates have not been measured."""
    rates = PEAK_RATES.get(machine)
    return math.nan if rates is None else 1e3 * work.seconds(rates, setting)


def linear_parameters(text: TextConfig) -> int:
    """Weights of the layers' GEMMs (qkv, o, gate, up, down); 8.158e9 for the 9B shape."""
    heads = text.num_attention_heads + 2 * text.num_key_value_heads
    attention = (heads + text.num_attention_heads) * text.head_dim * text.hidden_size
    return text.num_hidden_layers * (attention + 3 * text.hidden_size * text.intermediate_size)


def head_parameters(text: TextConfig) -> int:
    """Weights of the output head, and of the embedding table."""
    return text.vocab_size * text.hidden_size


def decode_step(text: TextConfig, setting: str, batch: int, keys: float) -> Work:
    """One step of `batch` sequences with `keys` keys each: reads all weights once, and each sequence's KV cache."""
    weights = linear_parameters(text) + head_parameters(text)
    cache = batch * keys * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    scores = 4 * batch * keys * text.num_attention_heads * text.head_dim * text.num_hidden_layers
    return Work(weights * WEIGHT_BYTES[setting] + cache * CACHE_BYTES, 2 * batch * weights, scores)


def prefill(text: TextConfig, setting: str, prompts: Sequence[int]) -> Work:
    """A batch of prompts of these lengths: reads all weights once; linear layers for every token, the head for each
    prompt's last token only, and causal attention."""
    layers, head = linear_parameters(text), head_parameters(text)
    width = text.num_attention_heads * text.head_dim * text.num_hidden_layers
    return Work(
        (layers + head) * WEIGHT_BYTES[setting],
        2 * (sum(prompts) * layers + len(prompts) * head),
        sum(2 * length * (length + 1) * width for length in prompts),
    )


def block_parameters(vision: VisionConfig) -> int:
    """Weights of the ViT's blocks, applied to every patch."""
    size = vision.hidden_size
    return vision.depth * (4 * size * size + 3 * size * vision.out_hidden_size)


def merger_parameters(vision: VisionConfig) -> int:
    """Weights of the downsampling and the merger, applied to every token (2x2 patches)."""
    size, out = vision.hidden_size, vision.out_hidden_size
    return vision.spatial_merge_size**2 * size * out + out * out + 3 * out * vision.intermediate_size


def patch_parameters(vision: VisionConfig) -> int:
    """Weights of the patch embedding."""
    return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * vision.hidden_size


def encode(vision: VisionConfig, patches: int, setting: str = "bf16") -> Work:
    """The ViT on one image: the blocks' linear layers in the setting's dtype; the patch embedding, the merger and full
    attention in bf16."""
    tokens = patches // vision.spatial_merge_size**2
    blocks = block_parameters(vision)
    others = 2 * patches * patch_parameters(vision) + 2 * tokens * merger_parameters(vision)
    attention = 4 * patches * patches * vision.hidden_size * vision.depth
    weights = 2 * (_vision_parameters(vision) - blocks) + WEIGHT_BYTES[setting] * blocks
    return Work(weights, 2 * patches * blocks, others + attention)


def resident_gib(text: TextConfig, vision: VisionConfig, setting: str) -> float:
    """GiB of weights that must be on the GPU: the language model in the setting's dtype, the ViT in bf16. The embedding
    table is not counted: it may be in host memory, because a decode step reads only one row per sequence."""
    language = (linear_parameters(text) + head_parameters(text)) * WEIGHT_BYTES[setting]
    return (language + 2 * _vision_parameters(vision)) / GIB


def _vision_parameters(vision: VisionConfig) -> int:
    positions = (vision.image_size // vision.patch_size) ** 2 * vision.hidden_size
    return block_parameters(vision) + merger_parameters(vision) + patch_parameters(vision) + positions
