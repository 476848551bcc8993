"""vLLM on the processor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.config import PoolerConfig
from vllm.inputs import TokensPrompt

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that an error says what it is
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "trust_remote_code": True,  # of models whose layers differ
    "enforce_eager": True,
    "max_model_len": 256,
    "distributed_executor_backend": "uni",
    "gpu_memory_utilization": 0.1,  # of the machine's memory, on a processor
}


def generate(folder: Path, question: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens."""
    model = LLM(model=str(folder), **SETTINGS)
    sampling = SamplingParams(
        temperature=0, max_tokens=question["new_tokens"], ignore_eos=True, logprobs=1
    )
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in question["ids"]]
    found: dict[str, Any] = {"tokens": [], "log_probabilities": []}
    for output in model.generate(prompts, sampling, use_tqdm=False):
        (result,) = output.outputs
        tokens = list(result.token_ids)
        scores = [one[token].logprob for one, token in zip(result.logprobs, tokens, strict=True)]
        found["tokens"].append(tokens)
        found["log_probabilities"].append(scores)
    return found


def embed(folder: Path, question: dict[str, Any]) -> dict[str, Any]:
    """Mean pooled token vectors."""
    pooling = PoolerConfig(pooling_type="MEAN")
    model = LLM(model=str(folder), runner="pooling", pooler_config=pooling, **SETTINGS)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in question["ids"]]
    outputs = model.embed(prompts, use_tqdm=False)
    return {"embeddings": [output.outputs.embedding for output in outputs]}
