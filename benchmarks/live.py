"""Other engines, measured on the spot: those that can be imported, asked as ours is."""

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
from benchmarks.engines import Prompt
from benchmarks.report import Row, rounded

Ask = Callable[[Sequence[Prompt], int], float]
"""Answers prompts of equal length together, each with exactly so many tokens; returns the seconds that it took."""


def beside(
    rows: Sequence[Row], checkpoint: Checkpoint, setting: str, measure: Callable[[Ask], Mapping[str, float]]
) -> list[Row]:
    """Rows with what the installed peers reach: for bf16 transformers and vLLM, for int8 vLLM's FP8 (its INT8 needs
    another checkpoint). They are loaded one after another.

    Args:
        measure: asks a peer for text, and returns values by the names of rows.
    """
    loaders: list[Callable[[Checkpoint, str], tuple[str, Ask]]] = []
    if setting == "bf16" and find_spec("transformers"):
        loaders.append(_transformers)
    if find_spec("vllm"):
        loaders.append(_vllm)
    for load in loaders:
        _free_memory()
        name, ask = load(checkpoint, setting)
        values = measure(ask)
        del ask
        rows = [
            replace(row, peer={**(row.peer or {}), name: rounded(values[row.name])}) if row.name in values else row
            for row in rows
        ]
    return list(rows)


def _free_memory() -> None:
    """Of whatever nobody holds any more: an engine keeps the collector from looking at what it has made."""
    gc.unfreeze()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _transformers(checkpoint: Checkpoint, setting: str) -> tuple[str, Ask]:
    library: Any = importlib.import_module("transformers")
    device, dtype = choose_device(ModelConfig())
    model = library.Glm4vForConditionalGeneration.from_pretrained(checkpoint.path, dtype=dtype).to(device).eval()

    def ask(prompts: Sequence[Prompt], max_tokens: int) -> float:
        ids = torch.tensor([prompt.token_ids for prompt in prompts], device=device)
        began = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            min_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=checkpoint.eos_token_ids[0],
        )[0, -1].item()
        return time.perf_counter() - began

    return f"transformers {_release('transformers')} bf16", ask


def _vllm(checkpoint: Checkpoint, setting: str) -> tuple[str, Ask]:
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

    def ask(prompts: Sequence[Prompt], max_tokens: int) -> float:
        params = library.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": prompt.token_ids} for prompt in prompts]
        began = time.perf_counter()
        model.generate(inputs, params, use_tqdm=False)
        return time.perf_counter() - began

    return f"vLLM {_release('vllm')} {'FP8' if setting == 'int8' else 'bf16'}", ask


def _release(package: str) -> str:
    """Major and minor version, as `benchmarks.peers` names them."""
    return ".".join(version(package).split(".")[:2])
