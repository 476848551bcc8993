"""Loads saved models in processes that have never seen the library: ``python reload.py``.

Reads one line of JSON for each batch, ``{"folders": [...], "seconds": 60}``; imports once and forks
for every batch.  Answers with one line: for every folder what differs, or ``null``.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from generation import generated, outputs_of, prepare
from transformers import dynamic_module_utils
from transformers.models.auto import modeling_auto

CASE = "case.pt"


def compared(folder: Path) -> str | None:
    """Load one folder in every way there is, and compare with what the live model computed."""
    case = torch.load(folder / CASE, weights_only=True)
    with tempfile.TemporaryDirectory(prefix="modules-") as modules:
        dynamic_module_utils.HF_MODULES_CACHE = modules  # where code from folders is copied to
        for way in _ways(folder, case["class"]):
            try:
                why = _compared(way, folder, case)
            except Exception as error:
                why = f"it cannot be loaded: {type(error).__name__}: {error}"
            if why is not None:
                return " ".join(f"{way.__name__}: {why}".split())[:300]
    return None


def _ways(folder: Path, class_name: str) -> list[Any]:
    """Every class that loads a folder: each auto class that knows its class, and what it names.

    A folder without code of its own is also loaded by its class itself.
    """
    config = json.loads((folder / "config.json").read_text())
    own = getattr(transformers, class_name)
    autos = {
        name: auto
        for name, auto in vars(modeling_auto).items()
        if name.startswith("AutoModel") and hasattr(auto, "_model_mapping")
    }
    known = [name for name, auto in autos.items() if own in _classes(auto, own.config_class)]
    named = config.get("auto_map", ())
    ways = [autos[name] for name in autos if name in known or name in named]
    return ways if named else [own, *ways]


def _classes(auto: Any, config_class: Any) -> tuple[Any, ...]:
    found = auto._model_mapping.get(config_class, None)
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


def _compared(way: Any, folder: Path, case: dict[str, Any]) -> str | None:
    """Load a folder in one way: all weights of it, and the same outputs where it is its class."""
    model, info = way.from_pretrained(
        folder,
        dtype=torch.float64,
        attn_implementation="eager",
        trust_remote_code=True,
        output_loading_info=True,
    )
    said = {key: sorted(map(str, value)) for key, value in info.items() if value}
    if case["class"] not in [cls.__name__ for cls in type(model).__mro__]:
        # of another class, only what stands before or behind the layers is another (a pooler), as
        # it is of an unpruned model
        body = re.compile(rf"{re.escape(model.base_model_prefix)}\..*\b\d+\.")
        wrong = [key for key in said.pop("missing_keys", []) if body.match(key)]
        said.pop("unexpected_keys", None)
        said.update({"missing_keys": wrong} if wrong else {})
        return f"loading reports {said}" if said else None
    if said:
        return f"loading reports {said}"
    prepare(model)
    if not same(outputs_of(model, case["inputs"]), case["outputs"]):
        return "loaded again it computes other outputs"
    for cache, live in zip((True, False), case["generated"], strict=True):
        if not same(generated(model, case["inputs"], cache), live):
            return f"loaded again it generates something else (use_cache={cache})"
    return None


def same(one: Any, other: Any) -> bool:
    """Bit for bit; what is no number in one is none in the other."""
    if one is None or other is None:
        return one is other
    return len(one) == len(other) and all(map(_equal, one, other))


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(
        one.nan_to_num(), other.nan_to_num()
    )


def batch(asked: dict[str, Any], answers: str) -> None:
    """In the child: every folder of a batch."""
    seconds = asked["seconds"]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    found: dict[str, Any] = {}
    for folder in asked["folders"]:
        found[folder] = compared(Path(folder))
        Path(answers).write_text(json.dumps(found))


def main() -> None:
    """Answer until there is no more line."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    assert not any(name.startswith("tp_hf_config") for name in sys.modules)
    for line in sys.stdin:
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            child = os.fork()
            if not child:
                os.dup2(2, 1)
                batch(json.loads(line), file.name)
                os._exit(0)
            os.waitpid(child, 0)
            text = Path(file.name).read_text()
        print(text or "{}", flush=True)


if __name__ == "__main__":
    main()
