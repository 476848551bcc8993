"""Load and run folders in a process that has Transformers but nothing of this library.

Only a model that may be larger than memory takes this library's lazy tensors.

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
    """Load every folder of a job, run it on the job's inputs and save the results.

    ``job``: ``folders``: for each its ``folder`` (a path), its ``class`` (module and name; for code
    in the folder ``""`` and the reference in ``auto_map``), ``options`` for ``from_pretrained`` and
    perhaps ``lazy`` (see :func:`load_lazily`); ``inputs``, ``results``: files; ``threads``,
    ``device``, ``path`` (of modules): where it runs; ``cast``: True if inputs take the model's
    dtype.
    """
    torch.set_num_threads(job["threads"])
    sys.path += [folder for folder in job["path"] if folder not in sys.path]
    inputs = torch.load(job["inputs"], map_location=job["device"], weights_only=True)
    torch.save([_load_and_run(entry, inputs, job) for entry in job["folders"]], job["results"])


def _load_and_run(
    entry: dict[str, Any], inputs: dict[str, Any], job: dict[str, Any]
) -> dict[str, Any]:
    """Return a folder's outputs and what Transformers reports of loading it, or its error.

    ``entry``: an entry of ``folders``.
    """
    try:
        options = {**entry["options"], "local_files_only": True}
        load_as = load_lazily if entry.get("lazy") else load
        model, loading = load_as(_class(entry), entry["folder"], options)
        model = model.to(job["device"]).eval()
        if job["cast"]:
            inputs = {key: _cast(value, model.dtype) for key, value in inputs.items()}
        torch.manual_seed(0)  # some forward passes draw random masks
        outputs = {key: value.cpu() for key, value in outputs_of(model, inputs).items()}
    except Exception as error:  # the process that made the job reports it
        text = " ".join(str(error).split())
        return {"outputs": {}, "loading": {}, "error": f"{type(error).__name__}: {text}"}
    return {"outputs": outputs, "loading": loading, "error": None}


def load(
    model_class: Any, folder: str | Path, options: dict[str, Any]
) -> tuple[Any, dict[str, list[str]]]:
    """Load a folder; return the model, and the keys that Transformers reports, by kind.

    The weights are aligned in memory as torch does it, not as they are in the file.

    ``options``: for ``from_pretrained``.
    """
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model, _problems(info)


def load_lazily(
    model_class: Any, folder: str | Path, options: dict[str, Any]
) -> tuple[Any, dict[str, list[str]]]:
    """Load a folder like :func:`load`, with weights that are read from its files at each use."""
    from tp_hf_config.checkpoint import lazy_weights

    config = model_class.config_class.from_pretrained(folder)
    model, info = lazy_weights.load_lazily(model_class, Path(folder), config, **options)
    return model, _problems(info)


def _problems(info: dict[str, Any]) -> dict[str, list[str]]:
    """Return the keys that Transformers reports of loading, by kind."""
    return {key: sorted(map(str, value)) for key, value in info.items() if value}


def outputs_of(model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return every tensor that a forward pass returns, by name; caches are left out."""
    with torch.no_grad():
        result = model(**inputs)
    return dict(_tensors("", result))


def _tensors(name: str, value: Any) -> list[tuple[str, torch.Tensor]]:
    """Return the tensors in nested dicts, lists and tuples, with dotted names."""
    if isinstance(value, torch.Tensor):
        return [(name or "output", value)]
    inside: Any = ()
    if isinstance(value, dict):
        inside = value.items()
    elif isinstance(value, (list, tuple)):
        inside = enumerate(value)
    return [
        named
        for key, part in inside
        for named in _tensors(f"{name}.{key}" if name else str(key), part)
    ]


def _class(entry: dict[str, Any]) -> Any:
    """Return the class of an entry of ``folders``, imported or from the folder's own code."""
    module, name = entry["class"]
    if not module:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(name, entry["folder"])
    target: Any = importlib.import_module(module)
    for part in name.split("."):
        target = getattr(target, part)
    return target


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Return a floating-point tensor in another dtype, and any other value unchanged."""
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value


if __name__ == "__main__":
    # Python puts this script's folder first, where its modules would hide a user's of their names
    own = Path(__file__).resolve().parent
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != own]
    run(json.loads(Path(sys.argv[1]).read_text()))
