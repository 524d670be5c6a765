"""One rank of the language model: loads its weights, sizes its KV cache, captures its CUDA graphs."""

import torch

from autoglm.checkpoint import Checkpoint
from autoglm.config import EngineConfig, MemoryConfig, SparseAttentionConfig
from autoglm.distributed.communicator import Communicator, SingleRank
from autoglm.llm.kv_cache import KVCache
from autoglm.llm.loader import Calibrate, LoadConfig, load_language_model
from autoglm.llm.model_runner import ModelRunner
from autoglm.llm.prefill import largest_pass
from autoglm.memory import MemoryManager

CUDA_GRAPH_BYTES = 2**30
CACHE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float8": torch.float8_e4m3fn, "int8": torch.int8}


class Worker:
    """The model, the KV cache and the model runner of one rank."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: EngineConfig,
        device: torch.device,
        dtype: torch.dtype,
        *,
        sparse_attention: SparseAttentionConfig,
        load_config: LoadConfig | None = None,
        calibrate: Calibrate | None = None,
        memory: MemoryManager | None = None,
        communicator: Communicator | None = None,
    ) -> None:
        """Loads the model and allocates the KV cache. All ranks of a group do so at the same time.

        Args:
            dtype: of activations, and of weights that are not quantised.
            sparse_attention: the default for requests.
            load_config: how the weights are quantised and cached; None does neither.
            calibrate: see `load_language_model`.
            memory: of this process; None has the default limits.
        """
        self.checkpoint = checkpoint
        self.config = config
        self.communicator = communicator or SingleRank()
        self.memory = memory or MemoryManager(MemoryConfig(), device)
        pages = sparse_attention if sparse_attention.mode == "pages" else None
        with self.memory.tag("weights"):
            self.model = load_language_model(checkpoint, device, dtype, load_config, calibrate, self.communicator)
        self.kv_cache = self._allocate_kv_cache(dtype, with_key_bounds=pages is not None)
        positions = checkpoint.text.max_position_embeddings
        self.max_context = min(config.max_context, positions, self.kv_cache.num_blocks * config.block_size)
        self.model_runner = ModelRunner(
            self.model, self.kv_cache, max_batch_size=config.max_batch_size, max_context=self.max_context, pages=pages
        )
        # bitsandbytes synchronises with the device, which a CUDA graph cannot capture.
        self.uses_graphs = device.type == "cuda" and not (load_config and load_config.uses_bitsandbytes)

    def capture(self) -> None:
        """Capture the CUDA graphs, if this device has them."""
        if self.uses_graphs:
            with self.memory.tag("graphs"):
                largest, mixed = self.config.max_tokens_per_step, self.config.max_tokens_per_mixed_step
                self.model_runner.capture(max_tokens=largest, max_mixed_tokens=min(largest, mixed))

    def _allocate_kv_cache(self, dtype: torch.dtype, *, with_key_bounds: bool) -> KVCache:
        config, text = self.config, self.model.config
        cache_dtype = CACHE_DTYPES.get(config.kv_cache_dtype, dtype)
        slot_bytes = (config.max_batch_size + 1) * text.vocab_size * (4 + 4)  # token counts and logits
        size = self.memory.kv_cache_bytes(
            config.kv_cache_mb,
            lambda: largest_pass(self.model, config.max_tokens_per_step, config.max_batch_size),
            reserve=slot_bytes + CUDA_GRAPH_BYTES,
        )
        block = KVCache.bytes_per_token(text, cache_dtype) * config.block_size
        block += KVCache.key_bounds_bytes(text, dtype) if with_key_bounds else 0
        with self.memory.tag("KV cache"):
            kv_cache = KVCache(
                text,
                self.model.device,
                dtype,
                num_blocks=self.communicator.minimum(size // block),
                block_size=config.block_size,
                cache_dtype=cache_dtype,
                with_key_bounds=with_key_bounds,
            )
        if self.model.kv_scales is not None and cache_dtype == torch.float8_e4m3fn:
            heads = self.communicator.shard.of(self.checkpoint.text.num_key_value_heads)
            kv_cache.set_scales(*self.model.kv_scales[:, :, heads])
        return kv_cache
