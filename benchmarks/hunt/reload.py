"""Loads saved models in processes that have never seen the library: ``python reload.py``.

Reads one line of JSON for each batch, ``{"folders": [...], "seconds": 60}``; imports once and forks
for every batch.  Answers with one line: for every folder what differs, or ``null``.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from generation import generated, outputs_of, prepare

CASE = "case.pt"


def compared(folder: Path) -> str | None:
    """Load one folder and compare with what the live model computed."""
    case = torch.load(folder / CASE, weights_only=True)
    model_class = getattr(transformers, case["class"])
    try:
        model, info = model_class.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager", output_loading_info=True
        )
        said = {key: sorted(map(str, value)) for key, value in info.items() if value}
        if said:
            return f"loading reports {said}"[:300]
        prepare(model)
        if not same(outputs_of(model, case["inputs"]), case["outputs"]):
            return "loaded again it computes other outputs"
        for cache, live in zip((True, False), case["generated"], strict=True):
            if not same(generated(model, case["inputs"], cache), live):
                return f"loaded again it generates something else (use_cache={cache})"
    except Exception as error:
        return " ".join(f"it cannot be loaded: {type(error).__name__}: {error}".split())[:300]
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
