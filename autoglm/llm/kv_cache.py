"""The memory of the paged KV cache, allocated once."""

import torch

from autoglm.checkpoint import TextConfig
from autoglm.kernels.base import LayerCache, required
from autoglm.kernels.reference.attention import dequantize_kv


class KVCache:
    """Keys and values of all layers, [layers, num_blocks * block_size, kv_heads, head_dim] each.

    A token's index is block * block_size + offset. Stored in the model's dtype, in INT8 (a scale for each token and
    head), or in FP8 (float8_e4m3fn, one fixed scale for each layer and head, 1 until `set_scales`).
    """

    def __init__(
        self,
        config: TextConfig,
        device: torch.device,
        dtype: torch.dtype,
        *,
        num_blocks: int,
        block_size: int,
        cache_dtype: torch.dtype | None = None,
        with_key_bounds: bool = False,
    ) -> None:
        """
        Args:
            dtype: of the model.
            cache_dtype: `dtype`, torch.int8 or torch.float8_e4m3fn.
            with_key_bounds: allocate the key bounds.
        """
        cache_dtype = cache_dtype or dtype
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        num_tokens = num_blocks * block_size
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        shape = layers, num_tokens, heads, config.head_dim
        self.keys, self.values = (torch.empty(shape, device=device, dtype=cache_dtype) for _ in range(2))
        self.key_scales: torch.Tensor | None = None  # fp32 [layers, num_tokens, kv_heads]
        self.value_scales: torch.Tensor | None = None
        if cache_dtype == torch.int8:
            self.key_scales, self.value_scales = (torch.empty(shape[:3], device=device) for _ in range(2))
        elif cache_dtype == torch.float8_e4m3fn:
            self.key_scales, self.value_scales = (
                torch.ones(layers, 1, heads, device=device).expand(-1, num_tokens, -1) for _ in range(2)
            )
        elif cache_dtype != dtype:
            raise ValueError(f"cache_dtype must be {dtype}, torch.int8 or torch.float8_e4m3fn (got {cache_dtype})")
        self.key_bounds: torch.Tensor | None = None  # [layers, num_blocks, kv_heads, 2, head_dim], minima and maxima
        if with_key_bounds:
            self.key_bounds = torch.zeros(layers, num_blocks, heads, 2, config.head_dim, device=device, dtype=dtype)
        self._layers = [
            LayerCache(
                self.keys[layer],
                self.values[layer],
                block_size,
                None if self.key_scales is None else self.key_scales[layer],
                None if self.value_scales is None else self.value_scales[layer],
                None if self.key_bounds is None else self.key_bounds[layer],
            )
            for layer in range(layers)
        ]

    @property
    def quantized(self) -> bool:
        return self.key_scales is not None

    def layer(self, index: int) -> LayerCache:
        return self._layers[index]

    def set_scales(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Set the fixed scales of an empty FP8 cache, fp32 [layers, kv_heads] each."""
        if self.keys.dtype != torch.float8_e4m3fn or self.key_scales is None or self.value_scales is None:
            raise ValueError(f"a KV cache of {self.keys.dtype} has no fixed scales")
        self.key_scales[:, 0].copy_(keys)
        self.value_scales[:, 0].copy_(values)

    def update_key_bounds(self, blocks: torch.Tensor) -> None:
        """Compute the minima and maxima of the keys of full blocks, int64 [m], in each channel of each head."""
        indices = blocks[:, None] * self.block_size + torch.arange(self.block_size, device=blocks.device)
        for layer in self._layers:
            keys, _ = dequantize_kv(layer, indices, self.dtype)  # [m, block_size, kv_heads, head_dim]
            required(layer.key_bounds)[blocks] = torch.stack((keys.amin(1), keys.amax(1)), dim=2)

    @staticmethod
    def key_bounds_bytes(config: TextConfig, dtype: torch.dtype) -> int:
        """Bytes of the key bounds of one block in all layers."""
        return config.num_hidden_layers * config.num_key_value_heads * 2 * config.head_dim * dtype.itemsize

    @staticmethod
    def bytes_per_token(config: TextConfig, cache_dtype: torch.dtype) -> int:
        """Bytes of one token in all layers, scales included."""
        head = config.head_dim * cache_dtype.itemsize + (4 if cache_dtype == torch.int8 else 0)
        return 2 * config.num_hidden_layers * config.num_key_value_heads * head
