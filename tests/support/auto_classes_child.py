"""Load saved models by every auto class of their ``auto_map``, where this library is not.

Usage: ``python auto_classes_child.py RESULTS FOLDER...``.  Each folder holds ``case.pt``: inputs,
the outputs of the saved model, and those of its body.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # an import of it fails
    sys.modules["tp_hf_config"] = None  # type: ignore[assignment]

import torch
import transformers

CASE = "case.pt"


def outputs_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The tensors that a forward pass returns, one after the other; caches are left out."""
    with torch.no_grad():
        result = model(**inputs)
    return [value for value in result.values() if isinstance(value, torch.Tensor)]


def weights_of(base: Any, lists: Iterable[str]) -> dict[str, torch.Tensor]:
    """The weights in a body's layers by name."""
    inside = tuple(f"{name}." for name in lists)
    return {name: value for name, value in base.state_dict().items() if name.startswith(inside)}


def _same(now: list[torch.Tensor], before: list[torch.Tensor]) -> bool:
    """Whether outputs are the same; a file's weights are aligned otherwise, which may round."""
    pairs = zip(now, before, strict=True)
    return all(float((one - other).norm() / other.norm()) < 1e-5 for one, other in pairs)


def loaded(folder: Path, auto: str, case: dict[str, Any]) -> dict[str, Any]:
    """Load a folder by one auto class, and compare it with the saved model."""
    model, info = getattr(transformers, auto).from_pretrained(
        str(folder),
        trust_remote_code=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # of a head with another number of labels
    )
    for parameter in model.parameters():  # aligned in memory as the saved model's are
        parameter.data = parameter.data.clone()
    base = model.base_model
    same_base = type(base).__name__.removeprefix("Layerwise") == case["base"]
    stock = type(model).__name__ == case["class"]
    outputs = outputs_of(model, case["inputs"]) if stock else []
    weights = weights_of(base, type(model).layers_with_own_config)
    return {
        "class": type(model).__name__,
        "experts": getattr(model.config, "_experts_implementation", None),
        "attention": model.config._attn_implementation,
        "same_outputs": _same(outputs, case["outputs"]) if stock else None,
        "same_body": _same(outputs_of(base, case["inputs"])[:1], case["body"][:1])
        and all(torch.equal(value, weights[name]) for name, value in case["weights"].items())
        if same_base
        else None,
        "lacking": sorted(
            key
            for key in (*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"]))
            if any(f"{name}." in key for name in type(model).layers_with_own_config)
        ),
    }


def main(results: str, *folders: str) -> None:
    transformers.logging.set_verbosity_error()
    found: dict[str, Any] = {}
    for folder in map(Path, folders):
        case = torch.load(folder / CASE, weights_only=True)
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        found[folder.name] = {}
        for auto in auto_map:
            try:
                found[folder.name][auto] = loaded(folder, auto, case)
            except Exception:
                found[folder.name][auto] = {"error": traceback.format_exc()}
    Path(results).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
