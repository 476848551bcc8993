"""ONNX Runtime, exported and run by optimum."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from greedy import greedy
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForFeatureExtraction
from pooled import pooled


def generate(folder: Path, question: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens; where its idea of the head dim is wrong, again with the right one."""
    with TemporaryDirectory() as scratch:
        model = ORTModelForCausalLM.from_pretrained(
            with_rope_theta(folder, Path(scratch)), export=True
        )
        asked = question["ids"], question["new_tokens"]
        try:
            return greedy(model, *asked)
        except InvalidArgument as error:
            said = f"{type(error).__name__}: {error}"
        model.embed_size_per_head = model.config.head_dim
        remedy = f"model.embed_size_per_head = {model.config.head_dim}"
        return {**greedy(model, *asked), "after": {"why": said, "remedy": remedy}}


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
