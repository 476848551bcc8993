"""Load and run a folder in a process that has Transformers and nothing of this library.

Usage: ``python child.py JOB``; JOB is a JSON file with the keys of :func:`run`.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch


def run(job: dict[str, Any]) -> None:
    """Load every folder of a job, run it on the job's inputs and save what came of it.

    ``folders``: each with its ``folder``, its ``class`` (module and name), ``code``: whether that
    is the folder's own, and ``options`` for ``from_pretrained``; ``inputs``, ``results``: files;
    ``threads``, ``device``, ``path`` (of modules): where it runs; ``cast``: inputs take the
    model's type.
    """
    torch.set_num_threads(job["threads"])
    sys.path += [place for place in job["path"] if place not in sys.path]
    inputs = torch.load(job["inputs"], map_location=job["device"], weights_only=True)
    torch.save([loaded_and_run(one, inputs, job) for one in job["folders"]], job["results"])


def loaded_and_run(
    one: dict[str, Any], inputs: dict[str, Any], job: dict[str, Any]
) -> dict[str, Any]:
    """A folder's outputs, and what Transformers said of loading it; or its error."""
    try:
        model, info = _class(one).from_pretrained(
            one["folder"], output_loading_info=True, local_files_only=True, **one["options"]
        )
        model = model.to(job["device"]).eval()
        for parameter in model.parameters():  # aligned in memory as torch does it, not as the file
            parameter.data = parameter.data.clone()
        if job["cast"]:
            inputs = {key: _cast(value, model.dtype) for key, value in inputs.items()}
        outputs = {key: value.cpu() for key, value in outputs_of(model, inputs).items()}
    except Exception as error:  # said where the job came from
        text = " ".join(str(error).split())
        return {"outputs": {}, "loading": {}, "error": f"{type(error).__name__}: {text}"}
    loading = {key: sorted(map(str, value)) for key, value in info.items() if value}
    return {"outputs": outputs, "loading": loading, "error": None}


def outputs_of(model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every tensor that a forward pass returns, by name; caches are left out."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some forward passes draw masks
        result = model(**inputs)
    return dict(_tensors("", result))


def _tensors(name: str, value: Any) -> list[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        return [(name or "output", value)]
    inside: Any = ()
    if isinstance(value, dict):
        inside = value.items()
    elif isinstance(value, (list, tuple)):
        inside = enumerate(value)
    return [
        one for key, part in inside for one in _tensors(f"{name}.{key}" if name else str(key), part)
    ]


def _class(one: dict[str, Any]) -> Any:
    module, name = one["class"]
    if one["code"]:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(name, one["folder"])
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _cast(value: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text()))
