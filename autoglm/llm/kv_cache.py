"""The memory of the paged KV cache, allocated once."""

import torch

from autoglm.checkpoint import TextConfig
from autoglm.kernels.base import LayerCache
from autoglm.kernels.reference.attention import decode


class KVCache:
    """Keys and values of every layer, [layers, slots, kv_heads, head_dim] each; slot = block * block_size + offset.

    Stored in the model's dtype, in INT8 (a scale for each slot and head), or in FP8 (float8_e4m3fn, one fixed scale
    for each layer and head, 1 until `set_scales`).
    """

    def __init__(
        self,
        config: TextConfig,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
        stored_as: torch.dtype | None = None,
        summarized: bool = False,
    ) -> None:
        """`dtype` is the model's; `stored_as` is that, torch.int8 or torch.float8_e4m3fn. A summarized cache has room
        for what `summarize` notes."""
        stored_as = stored_as or dtype
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        slots = num_blocks * block_size
        self.block_size = block_size
        self.dtype = dtype
        self.keys, self.values = (
            torch.empty(layers, slots, heads, config.head_dim, device=device, dtype=stored_as) for _ in range(2)
        )
        self.key_scales: torch.Tensor | None = None  # fp32 [layers, slots, kv_heads]
        self.value_scales: torch.Tensor | None = None
        if stored_as == torch.int8:
            self.key_scales, self.value_scales = (torch.empty(layers, slots, heads, device=device) for _ in range(2))
        elif stored_as == torch.float8_e4m3fn:
            self.key_scales, self.value_scales = (
                torch.ones(layers, 1, heads, device=device).expand(-1, slots, -1) for _ in range(2)
            )
        elif stored_as != dtype:
            raise ValueError(f"a KV cache of {stored_as} for a model of {dtype}")
        self.summaries: torch.Tensor | None = None  # [layers, blocks, kv_heads, 2, head_dim], minima and maxima
        if summarized:
            self.summaries = torch.zeros(layers, num_blocks, heads, 2, config.head_dim, device=device, dtype=dtype)
        self._layers = [
            LayerCache(
                self.keys[layer],
                self.values[layer],
                block_size,
                None if self.key_scales is None else self.key_scales[layer],
                None if self.value_scales is None else self.value_scales[layer],
            )
            for layer in range(layers)
        ]

    @property
    def quantized(self) -> bool:
        return self.key_scales is not None

    def layer(self, index: int) -> LayerCache:
        return self._layers[index]

    def summary(self, index: int) -> torch.Tensor:
        """[blocks, kv_heads, 2, head_dim] of one layer."""
        if self.summaries is None:
            raise ValueError("this KV cache has no room for summaries")
        return self.summaries[index]

    def set_scales(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The fixed scales of an FP8 cache, fp32 [layers, kv_heads] each. Only while the cache holds nothing."""
        if self.keys.dtype != torch.float8_e4m3fn or self.key_scales is None or self.value_scales is None:
            raise ValueError(f"a KV cache of {self.keys.dtype} has no fixed scales")
        self.key_scales[:, 0].copy_(keys)
        self.value_scales[:, 0].copy_(values)

    def copy(self, sources: torch.Tensor, target: torch.Tensor) -> None:
        """Copy keys and values, those of each layer and head from slots of its own.

        Args:
            sources: int64 [layers, kv_heads, n].
            target: int64 [n], other slots than these.
        """
        heads = torch.arange(self.keys.shape[2], device=target.device)
        copied = [self.keys, self.values]
        if self.key_scales is not None and self.value_scales is not None and self.keys.dtype == torch.int8:
            copied += [self.key_scales, self.value_scales]
        for stored in copied:
            raw = stored.view(torch.uint8) if stored.dtype == torch.float8_e4m3fn else stored
            for layer, slots in zip(raw, sources, strict=True):
                layer[target] = layer[slots.T, heads]

    def summarize(self, blocks: torch.Tensor) -> None:
        """Note the least and the greatest of the keys of whole blocks, int64 [m], in each channel of each head."""
        slots = blocks[:, None] * self.block_size + torch.arange(self.block_size, device=blocks.device)
        for index, layer in enumerate(self._layers):
            keys, _ = decode(layer, slots, self.dtype)  # [m, block_size, kv_heads, head_dim]
            self.summary(index)[blocks] = torch.stack((keys.amin(1), keys.amax(1)), dim=2)

    @staticmethod
    def summary_bytes(config: TextConfig, dtype: torch.dtype) -> int:
        """What the summary of one block takes in all layers."""
        return config.num_hidden_layers * config.num_key_value_heads * 2 * config.head_dim * dtype.itemsize

    @staticmethod
    def bytes_per_token(config: TextConfig, stored_as: torch.dtype) -> int:
        """What one token takes in all layers, scales included."""
        head = config.head_dim * stored_as.itemsize + (4 if stored_as == torch.int8 else 0)
        return 2 * config.num_hidden_layers * config.num_key_value_heads * head

    @staticmethod
    def blocks_in(megabytes: int, config: TextConfig, block_size: int, stored_as: torch.dtype) -> int:
        """How many blocks fit into so many MiB."""
        return megabytes * 2**20 // (KVCache.bytes_per_token(config, stored_as) * block_size)
