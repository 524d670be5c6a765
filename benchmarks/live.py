"""Other engines, measured in the same run with the same workloads, if they are installed."""

import gc
import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch

from autoglm.checkpoint import Checkpoint
from autoglm.config import ModelConfig
from autoglm.device import choose_device
from benchmarks.engines import BenchmarkPrompt
from benchmarks.report import Row, rounded

Generate = Callable[[Sequence[BenchmarkPrompt], int], float]
"""Answers a batch of prompts of equal length with exactly this many tokens each; returns the seconds taken."""


def with_peers(
    rows: Sequence[Row], checkpoint: Checkpoint, setting: str, measure: Callable[[Generate], Mapping[str, float]]
) -> list[Row]:
    """Add the figures of installed engines to the rows: transformers (bf16 only) and vLLM, loaded one after another.
    For int8 vLLM runs in FP8, because its INT8 needs a quantised checkpoint.

    Args:
        measure: runs the workloads and returns values by row name.
    """
    loaders: list[Callable[[Checkpoint, str], tuple[str, Generate]]] = []
    if setting == "bf16" and find_spec("transformers"):
        loaders.append(_transformers)
    if find_spec("vllm"):
        loaders.append(_vllm)
    for load in loaders:
        _free_memory()
        name, generate = load(checkpoint, setting)
        values = measure(generate)
        del generate
        rows = [
            replace(row, peer={**(row.peer or {}), name: rounded(values[row.name])}) if row.name in values else row
            for row in rows
        ]
    return list(rows)


def _free_memory() -> None:
    gc.unfreeze()  # a started engine has frozen its objects
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _transformers(checkpoint: Checkpoint, setting: str) -> tuple[str, Generate]:
    library: Any = importlib.import_module("transformers")
    device, dtype = choose_device(ModelConfig())
    model = library.Glm4vForConditionalGeneration.from_pretrained(checkpoint.path, dtype=dtype).to(device).eval()

    def generate(prompts: Sequence[BenchmarkPrompt], max_tokens: int) -> float:
        ids = torch.tensor([prompt.token_ids for prompt in prompts], device=device)
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            min_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=checkpoint.eos_token_ids[0],
        )[0, -1].item()
        return time.perf_counter() - start

    return f"transformers {_release('transformers')} bf16", generate


def _vllm(checkpoint: Checkpoint, setting: str) -> tuple[str, Generate]:
    library: Any = importlib.import_module("vllm")
    model = library.LLM(
        model=str(checkpoint.path),
        quantization="fp8" if setting == "int8" else None,
        dtype="bfloat16",
        max_model_len=4096,
        max_num_seqs=64,
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
        limit_mm_per_prompt={"image": 0, "video": 0},
        skip_tokenizer_init=True,
    )

    def generate(prompts: Sequence[BenchmarkPrompt], max_tokens: int) -> float:
        params = library.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": prompt.token_ids} for prompt in prompts]
        start = time.perf_counter()
        model.generate(inputs, params, use_tqdm=False)
        return time.perf_counter() - start

    return f"vLLM {_release('vllm')} {'FP8' if setting == 'int8' else 'bf16'}", generate


def _release(package: str) -> str:
    """Major and minor version, as in `benchmarks.peers`."""
    return ".".join(version(package).split(".")[:2])
