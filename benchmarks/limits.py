"""What the hardware allows: the time that bytes and operations take at least, from the checkpoint's shape.

Two numbers make a floor: the bytes that must be read from the GPU's memory, at the bandwidth that a plain read
reaches there, and the operations of products and attention, at the rate that the best library's large square product
reaches. The larger of the two times counts, as if everything else were free and both could be hidden behind each
other. Not counted are norms, biases, scales (4 bytes a row), activations, sampling, launches and the host.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autoglm.checkpoint import TextConfig, VisionConfig

GIB = 2**30
WEIGHT_BYTES = {"int8": 1, "bf16": 2}
CACHE_BYTES = 2  # keys and values in bf16


@dataclass(frozen=True)
class Ceilings:
    """Measured on the machine: bytes/s of one pass of reading over 4 GB, operations/s of products."""

    read: float
    int8: float
    bf16: float

    def products(self, setting: str) -> float:
        return self.int8 if setting == "int8" else self.bf16


CEILINGS = {"h200": Ceilings(read=4.50e12, int8=950e12, bf16=740e12)}  # 2026-11-22, torch 2.11.0+cu130


@dataclass(frozen=True)
class Work:
    """Bytes that are read, and operations (a multiply and an add are two), by the type that they are done in."""

    bytes: float = 0.0
    products: float = 0.0  # with the layers' weights, in the setting's type
    bf16: float = 0.0  # attention, and what else is not quantised

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.products + other.products, self.bf16 + other.bf16)

    @property
    def operations(self) -> float:
        return self.products + self.bf16

    def seconds(self, ceilings: Ceilings, setting: str) -> float:
        """The larger of the two times."""
        computing = self.products / ceilings.products(setting) + self.bf16 / ceilings.bf16
        return max(self.bytes / ceilings.read, computing)


def milliseconds(work: Work, machine: str, setting: str) -> float:
    """The floor on a machine; NaN for one whose ceilings are not known."""
    ceilings = CEILINGS.get(machine)
    return math.nan if ceilings is None else 1e3 * work.seconds(ceilings, setting)


def linear_parameters(text: TextConfig) -> int:
    """Weights of the layers' products (qkv, o, gate, up, down); 8.158e9 for the 9B shape."""
    heads = text.num_attention_heads + 2 * text.num_key_value_heads
    attention = (heads + text.num_attention_heads) * text.head_dim * text.hidden_size
    return text.num_hidden_layers * (attention + 3 * text.hidden_size * text.intermediate_size)


def head_parameters(text: TextConfig) -> int:
    """Of the output head; as many as of the embedding table."""
    return text.vocab_size * text.hidden_size


def decode_step(text: TextConfig, setting: str, batch: int, keys: float) -> Work:
    """One step of `batch` sequences with `keys` keys each: all weights once, every sequence's keys and values once."""
    weights = linear_parameters(text) + head_parameters(text)
    cache = batch * keys * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    scores = 4 * batch * keys * text.num_attention_heads * text.head_dim * text.num_hidden_layers
    return Work(weights * WEIGHT_BYTES[setting] + cache * CACHE_BYTES, 2 * batch * weights, scores)


def prefill(text: TextConfig, setting: str, prompts: Sequence[int]) -> Work:
    """Prompts of so many tokens, together: all weights once, the products of every token (the head only of the last
    of each prompt), causal attention, which is half of the square."""
    layers, head = linear_parameters(text), head_parameters(text)
    width = text.num_attention_heads * text.head_dim * text.num_hidden_layers
    return Work(
        (layers + head) * WEIGHT_BYTES[setting],
        2 * (sum(prompts) * layers + len(prompts) * head),
        sum(2 * length * (length + 1) * width for length in prompts),
    )


def block_parameters(vision: VisionConfig) -> int:
    """Weights of the ViT's blocks, which every patch meets."""
    size = vision.hidden_size
    return vision.depth * (4 * size * size + 3 * size * vision.out_hidden_size)


def merger_parameters(vision: VisionConfig) -> int:
    """Weights of the downsampling and the merger, which every token meets, 2x2 patches."""
    size, out = vision.hidden_size, vision.out_hidden_size
    return vision.spatial_merge_size**2 * size * out + out * out + 3 * out * vision.intermediate_size


def patch_parameters(vision: VisionConfig) -> int:
    """Weights of the first product."""
    return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * vision.hidden_size


def encode(vision: VisionConfig, patches: int, setting: str = "bf16") -> Work:
    """The ViT over one image of so many patches: the blocks' products, in the setting's type; those before and behind
    them, and attention of all patches to all, in bf16."""
    tokens = patches // vision.spatial_merge_size**2
    blocks = block_parameters(vision)
    others = 2 * patches * patch_parameters(vision) + 2 * tokens * merger_parameters(vision)
    attention = 4 * patches * patches * vision.hidden_size * vision.depth
    weights = 2 * (_vision_parameters(vision) - blocks) + WEIGHT_BYTES[setting] * blocks
    return Work(weights, 2 * patches * blocks, others + attention)


def resident_gib(text: TextConfig, vision: VisionConfig, setting: str) -> float:
    """GiB of weights that must lie on the GPU: language model in the setting's type, ViT in bf16. The embedding table
    (2 bytes a weight) is not counted: a decode step reads one row of it, which the host can hold."""
    language = (linear_parameters(text) + head_parameters(text)) * WEIGHT_BYTES[setting]
    return (language + 2 * _vision_parameters(vision)) / GIB


def _vision_parameters(vision: VisionConfig) -> int:
    places = (vision.image_size // vision.patch_size) ** 2 * vision.hidden_size
    return block_parameters(vision) + merger_parameters(vision) + patch_parameters(vision) + places
