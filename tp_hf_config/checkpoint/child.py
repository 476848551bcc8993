"""Load and run folders with Transformers alone, without this library.

Only models that may be larger than memory use :mod:`~tp_hf_config.model.files`.

Usage: ``python child.py JOB``; JOB is a JSON file with the keys of :func:`run`.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

ALIGNED = 64  # bytes
LARGE = 1 << 20  # bytes


def run(job: dict[str, Any]) -> None:
    """Load every folder of a job, run it on the job's inputs and save the results.

    Keys of ``job``:
        - folders: a list of ``folder`` (path), ``class`` (module and name, or ``""`` and the
          reference in ``auto_map``), ``options`` of ``from_pretrained``, and ``paged`` (may be
          larger than memory)
        - inputs, results: files
        - threads, device, path (``sys.path``): where it runs
        - cast: convert inputs to the model's dtype
    """
    torch.set_num_threads(job["threads"])
    sys.path += [folder for folder in job["path"] if folder not in sys.path]
    inputs = torch.load(job["inputs"], map_location=job["device"], weights_only=True)
    torch.save([_load_and_run(entry, inputs, job) for entry in job["folders"]], job["results"])


def _load_and_run(
    entry: dict[str, Any], inputs: dict[str, Any], job: dict[str, Any]
) -> dict[str, Any]:
    """The outputs of an entry of ``folders``, and what Transformers reports; or its error."""
    try:
        options = {**entry["options"], "local_files_only": True}
        paged = bool(entry.get("paged"))
        with _paged(entry["folder"]) if paged else nullcontext():
            model, loading = load(_class(entry), entry["folder"], options)
        model = model.to(job["device"]).eval()
        if job["cast"]:
            inputs = {key: _cast(value, model.dtype) for key, value in inputs.items()}
        torch.manual_seed(0)  # some forward passes draw masks
        with aligned(model, in_turn=paged):
            outputs = {key: value.cpu() for key, value in outputs_of(model, inputs).items()}
    except Exception as error:  # the parent process reports it
        text = " ".join(str(error).split())
        return {"outputs": {}, "loading": {}, "error": f"{type(error).__name__}: {text}"}
    return {"outputs": outputs, "loading": loading, "error": None}


def load(
    model_class: Any, folder: str | Path, options: dict[str, Any]
) -> tuple[Any, dict[str, list[str]]]:
    """Load a folder; return the model, and the keys that Transformers reports, by kind."""
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    return model, {key: sorted(map(str, value)) for key, value in info.items() if value}


@contextmanager
def _paged(folder: str) -> Iterator[None]:
    """Put weights that are converted while this is open into files without names."""
    from tp_hf_config.model import paging

    with paging.paged(Path(folder)), paging.conversions_in_files():
        yield


@contextmanager
def aligned(model: torch.nn.Module, in_turn: bool) -> Iterator[None]:
    """Align weights in memory as torch does: the order of sums can depend on it.

    Mapped files align them differently. ``in_turn``: align a large weight only while its module
    runs, and a layer in a list while it runs, because all may be larger than memory.
    """
    handles: list[Any] = []
    turns = _turns(model) if in_turn else {}
    later = {id(parameter) for parameters in turns.values() for parameter in parameters}
    for parameter in model.parameters():
        if id(parameter) not in later:
            parameter.data = _aligned(parameter.data)
    for module, parameters in turns.items():
        handles += _aligned_while_it_runs(module, parameters)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _turns(model: torch.nn.Module) -> dict[torch.nn.Module, list[torch.nn.Parameter]]:
    """The layers in lists with their parameters, and other modules with large ones of their own."""
    turns = {layer: list(layer.parameters()) for layer in _listed(model)}
    inside = {module for layer in turns for module in layer.modules()}
    for module in model.modules():
        if module not in inside:
            own = [p for p in module.parameters(recurse=False) if p.nbytes >= LARGE]
            turns |= {module: own} if own else {}
    return turns


def _aligned(values: torch.Tensor) -> torch.Tensor:
    misaligned = values.data_ptr() % ALIGNED if type(values) is torch.Tensor else 0
    return values.clone() if misaligned else values


def _aligned_while_it_runs(
    module: torch.nn.Module, parameters: list[torch.nn.Parameter]
) -> list[Any]:
    mapped: list[tuple[Any, torch.Tensor]] = []

    def enter(*_: Any) -> None:
        for parameter in parameters:
            mapped.append((parameter, parameter.data))
            parameter.data = _aligned(parameter.data)

    def leave(*_: Any) -> None:
        while mapped:
            parameter, values = mapped.pop()
            parameter.data = values

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def _listed(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the outermost modules in lists, such as decoder layers."""
    for child in module.children():
        if isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential)):
            yield child
        else:
            yield from _listed(child)


def outputs_of(model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every tensor that a forward pass returns, by name; caches are left out."""
    with torch.no_grad():
        result = model(**inputs)
    return dict(_tensors("", result))


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in nested dicts, lists and tuples, with dotted names."""
    if isinstance(value, torch.Tensor):
        yield name or "output", value
    elif isinstance(value, (dict, list, tuple)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(f"{name}.{key}" if name else str(key), part)


def _class(entry: dict[str, Any]) -> Any:
    module, name = entry["class"]
    if not module:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(name, entry["folder"])
    target: Any = importlib.import_module(module)
    for part in name.split("."):
        target = getattr(target, part)
    return target


def _cast(value: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value


if __name__ == "__main__":
    # Python puts this script's folder first, so that its modules would hide others of the same name
    own = Path(__file__).resolve().parent
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != own]
    run(json.loads(Path(sys.argv[1]).read_text()))
