"""llama.cpp through llama-cpp-python, on a GGUF file of float32 tensors."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf_file
import llama_cpp
import numpy as np

# By itself it keeps keys and values in float16.
SETTINGS: dict[str, Any] = {
    "n_ctx": 256,
    "n_threads": 1,
    "n_threads_batch": 1,
    "type_k": llama_cpp.GGML_TYPE_F32,
    "type_v": llama_cpp.GGML_TYPE_F32,
    "flash_attn": False,
    "verbose": False,
}


def generate(folder: Path, question: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens, after prompts that its own tokenizer has to cut as transformers does."""
    found: dict[str, Any] = {"tokens": [], "log_probabilities": []}
    with TemporaryDirectory() as scratch:
        gguf_file.write(folder, Path(question["source"]), path := Path(scratch) / "pruned.gguf")
        model = llama_cpp.Llama(str(path), logits_all=True, **SETTINGS)
        for text, ids in zip(question["texts"], question["ids"], strict=True):
            cut = model.tokenize(text.encode(), add_bos=False)
            if cut != ids:
                raise ValueError(f"its tokenizer gives {cut}, transformers' {ids}")
            model.reset()
            model.eval(ids)
            tokens, scores = [], []
            for _ in range(question["new_tokens"]):
                logits = model.scores[model.n_tokens - 1].astype(np.float64)
                tokens.append(int(logits.argmax()))
                shifted = logits - logits.max()
                scores.append(float(shifted[tokens[-1]] - np.log(np.exp(shifted).sum())))
                model.eval(tokens[-1:])
            found["tokens"].append(tokens)
            found["log_probabilities"].append(scores)
    return found


def embed(folder: Path, question: dict[str, Any]) -> dict[str, Any]:
    """Mean pooled token vectors, from the text itself."""
    with TemporaryDirectory() as scratch:
        gguf_file.write(folder, Path(question["source"]), path := Path(scratch) / "pruned.gguf")
        model = llama_cpp.Llama(str(path), embedding=True, **SETTINGS)
        return {"embeddings": [model.embed(text, normalize=True) for text in question["texts"]]}
