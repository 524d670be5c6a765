"""Recorded figures of other engines on the same machine; `benchmarks.live` can measure some of them again.

Measured on one NVIDIA H200 (2026-11-22, driver 580.159, torch 2.11.0+cu130) with the benchmarks' own workloads and
random weights in the 9B shape. vLLM ran in-process (`LLM.generate`) with CUDA graphs, torch.compile, FlashAttention 3,
prefix caching off, max_num_batched_tokens 8192, max_num_seqs 64; its INT8 is W8A8. vLLM's screenshots start from a PIL
image, those of transformers from pixel values. vLLM's start uses random weights and reads no checkpoint.
"""

INT8, FP8, BF16 = "vLLM 0.26 INT8", "vLLM 0.26 FP8", "vLLM 0.26 bf16"
TRANSFORMERS = "transformers 5.17 bf16"

MEASURED: dict[str, dict[tuple[str, str], dict[str, float]]] = {
    "h200": {
        ("decode-1", "int8"): {INT8: 4.81, FP8: 4.34},
        ("decode-4", "int8"): {INT8: 4.83, FP8: 4.41},
        ("decode-16", "int8"): {INT8: 4.95, FP8: 4.44},
        ("decode-64", "int8"): {INT8: 5.22, FP8: 4.83},
        ("decode-1", "bf16"): {BF16: 6.59, TRANSFORMERS: 37.2},
        ("decode-4", "bf16"): {BF16: 6.51},
        ("decode-16", "bf16"): {BF16: 6.21, TRANSFORMERS: 36.3},
        ("decode-64", "bf16"): {BF16: 6.73},
        ("prefill-128", "int8"): {INT8: 8.1, FP8: 12.4},
        ("prefill-128", "bf16"): {BF16: 14.5, TRANSFORMERS: 46},
        ("vit-13416", "bf16"): {TRANSFORMERS: 119},
        ("screenshot-first-token", "int8"): {INT8: 337, FP8: 334},
        ("screenshot-first-token", "bf16"): {BF16: 318, TRANSFORMERS: 266},
        ("screenshot-65", "int8"): {INT8: 645, FP8: 574},
        ("screenshot-65", "bf16"): {BF16: 748, TRANSFORMERS: 2621},  # transformers: 64 tokens
        ("screenshot-16", "int8"): {INT8: 3.20, FP8: 3.02},
        ("screenshot-16", "bf16"): {BF16: 2.74},
        ("weights-gib", "int8"): {INT8: 11.69},
        ("weights-gib", "bf16"): {BF16: 19.26, TRANSFORMERS: 19.2},
        ("warm-start-s", "int8"): {INT8: 57, FP8: 122},
        ("warm-start-s", "bf16"): {BF16: 60},
    }
}


def measured(machine: str, name: str, setting: str) -> dict[str, float] | None:
    """The peers' figures for one row, in the row's unit; None if there are none."""
    return MEASURED.get(machine, {}).get((name, setting))
