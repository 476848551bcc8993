"""Reload saved models in a fresh process, which has Transformers and nothing of this library.

Usage: ``python reload_child.py THREADS RESULTS FOLDER...``.  Each folder is one that
``conftest.Collector`` wrote; what happened to each goes to RESULTS as JSON.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers.dynamic_module_utils import get_class_from_dynamic_module

CASE = "case.pt"
NEW_TOKENS = 4


def outputs_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every tensor that a forward pass returns; caches are left out."""
    with torch.no_grad():
        result = model(**inputs)
    return {key: value for key, value in result.items() if isinstance(value, torch.Tensor)}


def tokens_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Greedily generated tokens, where the model can generate."""
    if not model.can_generate():
        return None
    ids = inputs["input_ids"]
    mask = torch.ones_like(ids)
    # min_new_tokens: a random model could end at once, and equal nothings would prove nothing
    return model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
    )


def ties_of(model: torch.nn.Module) -> list[list[str]]:
    """The names of every Parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return sorted(sorted(group) for group in names.values() if len(group) > 1)


def reload(folder: Path) -> dict[str, Any]:
    """Load one folder and compare with what the live model did."""
    case = torch.load(folder / CASE, weights_only=True)
    cls = getattr(transformers, case["class"], None)
    if cls is None:  # code in the folder
        references = transformers.AutoConfig.from_pretrained(folder).auto_map.values()
        (reference,) = {r for r in references if r.endswith(f".{case['class']}")}
        cls = get_class_from_dynamic_module(reference, folder)
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    model.eval()
    # Weights from a safetensors file lie where the file's header leaves them, pruned ones where
    # torch's allocator does. CPU matrix products choose another order of summation by alignment
    # (batch 1 above all), which moves the last bit; a clone is aligned like the live weights.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    got = outputs_of(model, case["inputs"])
    live = case["outputs"]
    tokens = tokens_of(model, case["inputs"])
    again = folder / "again"
    model.save_pretrained(again)
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = sorted(file.keys())
    return {
        "outputs": sorted(got),
        "different": sorted(
            key for key in live.keys() | got.keys() if not _equal(live.get(key), got.get(key))
        ),
        "same_tokens": _equal(case["tokens"], tokens),
        "new_tokens": 0 if tokens is None else NEW_TOKENS,
        "same_config": (folder / "config.json").read_bytes()
        == (again / "config.json").read_bytes(),
        "loading": {key: sorted(map(str, value)) for key, value in info.items() if value},
        "ties": ties_of(model),
        "stored": stored,
    }


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


def main(threads: str, results: str, *folders: str) -> None:
    torch.set_num_threads(int(threads))
    transformers.logging.set_verbosity_error()
    found: dict[str, Any] = {}
    for folder in folders:
        try:
            found[folder] = reload(Path(folder))
        except Exception:
            found[folder] = {"error": traceback.format_exc()}
    Path(results).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
