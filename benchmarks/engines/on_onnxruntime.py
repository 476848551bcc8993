"""ONNX Runtime, exported and run by optimum."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from greedy import greedy
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForFeatureExtraction
from pooled import pooled


def generate(folder: Path, question: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens."""
    with TemporaryDirectory() as scratch:
        model = ORTModelForCausalLM.from_pretrained(
            with_rope_theta(folder, Path(scratch)), export=True
        )
        return greedy(model, question["ids"], question["new_tokens"])


def embed(folder: Path, question: dict[str, Any]) -> dict[str, Any]:
    """Mean pooled token vectors."""
    model = ORTModelForFeatureExtraction.from_pretrained(folder, export=True)
    return {"embeddings": [pooled(model, ids) for ids in question["ids"]]}


def with_rope_theta(folder: Path, copy: Path) -> Path:
    """The folder with ``rope_theta`` where transformers 4 reads it."""
    for file in folder.iterdir():
        (copy / file.name).symlink_to(file.resolve())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return copy
