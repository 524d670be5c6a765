"""The memory of the paged KV cache, allocated once."""

import torch

from autoglm.checkpoint import TextConfig


class KVCache:
    """Keys and values of every layer, [layers, slots, kv_heads, head_dim] each; slot = block * block_size + offset."""

    def __init__(
        self, config: TextConfig, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.num_hidden_layers, num_blocks * block_size, config.num_key_value_heads, config.head_dim)
        self.block_size = block_size
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)

    @staticmethod
    def blocks_in(megabytes: int, config: TextConfig, block_size: int, dtype: torch.dtype) -> int:
        """How many blocks fit into so many MiB."""
        token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
        return megabytes * 2**20 // (token * block_size)
