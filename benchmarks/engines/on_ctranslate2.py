"""CTranslate2, through its own converter."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ctranslate2
import numpy as np
import torch
from ctranslate2.converters import TransformersConverter
from pooled import scaled
from transformers import AutoTokenizer


def generate(folder: Path, question: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found: dict[str, Any] = {"tokens": [], "log_probabilities": []}
    with TemporaryDirectory() as converted:
        TransformersConverter(str(folder)).convert(converted, force=True)
        model = ctranslate2.Generator(converted, compute_type="float32", intra_threads=1)
        for ids in question["ids"]:
            result = model.generate_batch(
                [tokenizer.convert_ids_to_tokens(ids)],
                max_length=question["new_tokens"],
                sampling_topk=1,
                include_prompt_in_result=False,
                end_token=[],  # all engines go on to the same length
            )[0]
            tokens = result.sequences_ids[0]
            scores = model.forward_batch([ids + tokens], return_log_probs=True)
            rows = torch.as_tensor(np.array(scores))[0, len(ids) - 1 : -1]
            chosen = rows.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            found["tokens"].append(list(tokens))
            found["log_probabilities"].append(chosen.tolist())
    return found


def embed(folder: Path, question: dict[str, Any]) -> dict[str, Any]:
    """Mean pooled token vectors."""
    with TemporaryDirectory() as converted:
        TransformersConverter(str(folder)).convert(converted, force=True)
        model = ctranslate2.Encoder(converted, compute_type="float32", intra_threads=1)
        outputs = [model.forward_batch([ids]).last_hidden_state for ids in question["ids"]]
        return {"embeddings": [scaled(np.array(output)[0]) for output in outputs]}
