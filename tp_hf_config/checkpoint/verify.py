"""Test in a fresh process whether a model loads and computes the same outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..forward.find_recipe import find_recipe
from ..forward.inputs import example_inputs
from ..model.build import Refusal
from ..model.config_json import field_name
from ..model.locate import check_followable, find_pretrained
from ..model.meta_run import RealNumbers
from . import child
from .building import build, entries
from .check import Known, checked, checked_alone, read_folder
from .reports import Difference, RoundtripReport
from .words import and_more, number, short

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHOWN = 4
_ALIGNED = 64
_OF_NO_EFFECT = ("transformers_version", "_name_or_path", "architectures")
_REMOTE = "transformers_modules"


@dataclass(frozen=True)
class _Run:
    """What a fresh process reports of one folder.

    Attributes:
        outputs: output name -> tensor.
        loading: kind of problem (``missing_keys``) -> the keys that Transformers reports.
        error: why the folder does not load or run; ``None`` if it does.
    """

    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    loading: dict[str, list[str]] = field(default_factory=dict)
    error: str | None = None


def verify_roundtrip(model: nn.Module, inputs: Mapping[str, Any]) -> RoundtripReport:
    """Save a model to a temporary folder, load and run it in a fresh process, compare the outputs.

    Args:
        model: a Hugging Face model, or a module that contains one; its weights keep their values.
        inputs: keyword arguments of its forward pass; tensors, numbers, ``None``.

    Returns:
        A report that says whether every output is the same bit for bit, and how far the others are
        from the live model's. If the model cannot be saved, ``error`` says why.

    Raises:
        UnsupportedModelError: there is no single Hugging Face model with whole weights.
    """
    _, pretrained = find_pretrained(model)
    check_followable(pretrained)
    with TemporaryDirectory(prefix="tp_hf_config-") as place:
        folder = Path(place) / "saved"
        try:
            pretrained.save_pretrained(folder)
        except Exception as error:  # saving may refuse with any exception
            name, why = type(pretrained).__name__, f"it cannot be saved: {short(error)}"
            return RoundtripReport(name, name, False, error=why, against="the live model")
        return compare_saved(pretrained, folder, inputs)


def compare_saved(
    model: PreTrainedModel, folder: Path, inputs: Mapping[str, Any]
) -> RoundtripReport:
    """Load a folder in a fresh process and compare it with the live model that was saved to it.

    Args:
        model: the live model. Its weights may be moved to aligned memory, because the order of sums
            can depend on the alignment.
        folder: the folder that the model was saved to.
        inputs: keyword arguments of its forward pass.

    Returns:
        A report; ``same`` is True if every output is the same bit for bit and Transformers reports
        no problem with loading.
    """
    for parameter in model.parameters():
        if parameter.data_ptr() % _ALIGNED:
            parameter.data = parameter.data.clone()
    with _evaluating(model):
        live = {key: value.cpu() for key, value in child.outputs_of(model, dict(inputs)).items()}
    named, options = _named(type(model)), _options(model)
    job = _job(folder, named, options)
    if named[0].startswith(_REMOTE):
        job = _job_of(checked(folder, trust_remote_code=True))
        job["options"].update(options)
    with TemporaryDirectory(prefix="tp_hf_config-") as place:
        (done,) = _fresh([job], dict(inputs), Path(place), str(model.device))
    name = type(model).__name__
    report = _compared(name, name, live, done, "the live model")
    problems = tuple(_loading(done.loading))
    return replace(report, loading=problems, same=report.same and not problems)


def verify_checkpoint(
    folder: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    trust_remote_code: bool = False,
) -> RoundtripReport:
    """Load and run a folder in a fresh process, and compare its outputs with another folder's.

    Args:
        folder: a folder with config.json and weights.
        against: another folder, which is run on the same small made-up inputs.
        trust_remote_code: run the folder's own code if its class needs it.

    Returns:
        A report; ``same`` is True if the folder loads with no weight missing or of another shape,
        runs, and (with ``against``) gives the other folder's outputs bit for bit.

    Raises:
        CheckpointError: a folder or its weights do not exist, or nothing is known to run it on
            (its class is not known, or refuses the config).
    """
    path = Path(folder)
    paths = [path] if against is None else [path, Path(against)]
    for one in paths:
        report = checked_alone(read_folder(one, trust_remote_code))
        if report.sound is False:
            name, causes = report.model or "no class", tuple(cause.text for cause in report.causes)
            return RoundtripReport(str(one), name, False, loading=causes, error="it is not sound")
    folders = [checked(one, trust_remote_code) for one in paths]
    name, inputs = _example(folders[0])
    jobs = [_job_of(one) for one in folders]
    with TemporaryDirectory(prefix="tp_hf_config-") as place:
        done, *others = _fresh(jobs, inputs, Path(place), "cpu", cast=True)
    problems = tuple(_loading(done.loading, ("missing_keys", "mismatched_keys")))
    notes = tuple(_loading(done.loading, ("unexpected_keys",)))
    if done.error is not None or not others:
        same = done.error is None and not problems
        outputs = tuple(done.outputs)
        return RoundtripReport(
            str(path), name, same, problems, outputs, (), done.error, notes=notes
        )
    other = str(paths[1])
    if others[0].error is not None:
        error = f"{other} does not run on the inputs made for {path}: {others[0].error}"
        comparison = RoundtripReport(str(path), name, False, error=error, against=other)
    else:
        comparison = _compared(str(path), name, others[0].outputs, done, other)
    missing = _loading(others[0].loading, ("missing_keys", "mismatched_keys"))
    problems += tuple(f"{other}: {one}" for one in missing)
    if not comparison.same:
        notes += tuple(_apart(*folders))
    return replace(comparison, loading=problems, notes=notes, same=comparison.same and not problems)


def _apart(one: Known, other: Known) -> Iterator[str]:
    """Yield why two folders may compute different things: other classes, other config fields."""
    names = [read.classes.model.__name__ for read in (one, other)]
    if names[0] != names[1]:
        yield f"{other.path} is of another class: {names[1]}"
    ours, theirs = (dict(entries(read.data)) for read in (one, other))
    said = [
        f"{field_name(path)} {number(ours.get(path))}, there {number(theirs.get(path))}"
        for path in dict.fromkeys((*ours, *theirs))
        if ours.get(path) != theirs.get(path) and path[-1] not in _OF_NO_EFFECT
    ]
    if said:
        yield f"config.json differs: {'; '.join(said[:_SHOWN])}{and_more(said, _SHOWN)}"


def _example(read: Known) -> tuple[str, dict[str, Any]]:
    """Return the name of a folder's class, and small random inputs for it."""
    model = build(read.classes, read.data)
    if isinstance(model, Refusal):
        raise CheckpointError(f"{read.path}: the class refuses config.json: {model.reason}.")
    recipe = find_recipe(model)
    with torch.no_grad(), RealNumbers():
        inputs = example_inputs(model, recipe)
    generator = torch.Generator().manual_seed(0)
    filled = {
        key: torch.rand(value.shape, generator=generator)
        if isinstance(value, torch.Tensor) and value.is_meta
        else value
        for key, value in inputs.items()
    }
    return type(model).__name__, filled


def _job_of(read: Known) -> dict[str, Any]:
    """Return the job entry for a folder (see :func:`_job`)."""
    options: dict[str, Any] = {"dtype": "auto", "attn_implementation": "eager"}
    named = _named(read.classes.model)
    if not named[0].startswith(_REMOTE):
        return _job(read.path, named, options)
    references: dict[str, str] = read.data["auto_map"]
    remote = next(ref for key, ref in references.items() if key != "AutoConfig")
    return _job(read.path, named, {**options, "trust_remote_code": True}, remote)


def _named(model_class: type) -> tuple[str, str]:
    """Return the module and the name by which a fresh process imports a class."""
    import transformers

    name = model_class.__name__
    if getattr(transformers, name, None) is model_class:
        return "transformers", name
    return model_class.__module__, model_class.__qualname__


def _options(model: PreTrainedModel) -> dict[str, Any]:
    """Return the ``from_pretrained`` options that give the live model's dtype and kernels."""
    options: dict[str, Any] = {"dtype": str(model.dtype).removeprefix("torch.")}
    attention = getattr(model.config, "_attn_implementation", None)
    experts = getattr(model.config, "_experts_implementation", None)
    options.update({"attn_implementation": attention} if isinstance(attention, str) else {})
    options.update({"experts_implementation": experts} if isinstance(experts, str) else {})
    return options


def _job(
    folder: Path, named: tuple[str, str], options: dict[str, Any], remote: str | None = None
) -> dict[str, Any]:
    """Return how a fresh process loads a folder: one entry of ``folders`` in :func:`child.run`.

    Args:
        folder: the folder.
        named: module and name of the class.
        options: for ``from_pretrained``.
        remote: the reference of the class in ``auto_map`` if it is the folder's own code.
    """
    return {
        "folder": str(folder.absolute()),
        "class": list(named) if remote is None else ["", remote],
        "code": remote is not None,
        "options": options,
    }


def _fresh(
    jobs: list[dict[str, Any]],
    inputs: dict[str, Any],
    place: Path,
    device: str,
    cast: bool = False,
) -> list[_Run]:
    """Load and run folders in one fresh process; return one run for each.

    Args:
        jobs: the folders (see :func:`_job`).
        inputs: keyword arguments of the forward pass.
        place: a temporary folder for the files that go back and forth.
        device: where to run.
        cast: give floating inputs the model's dtype.
    """
    files = {key: str(place / f"{key}.pt") for key in ("inputs", "results")}
    torch.save(inputs, files["inputs"])
    threads = torch.get_num_threads()
    job = {"folders": jobs, **files, "device": device, "threads": threads, "cast": cast}
    (place / "job.json").write_text(json.dumps({**job, "path": sys.path}))
    done = subprocess.run(
        [sys.executable, child.__file__, str(place / "job.json")],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        text = f"the fresh process ended with: {short(lines[-1] if lines else done.returncode)}"
        return [_Run(error=text) for _ in jobs]
    results = torch.load(files["results"], weights_only=True)
    return [
        _Run(result["outputs"], result["loading"], result["error"] and short(result["error"]))
        for result in results
    ]


def _compared(
    what: str, model: str, reference: Mapping[str, torch.Tensor], done: _Run, against: str
) -> RoundtripReport:
    """Return the report on a run, with the differences from reference outputs."""
    if done.error is not None:
        return RoundtripReport(what, model, False, error=done.error, against=against)
    names = tuple(dict.fromkeys((*reference, *done.outputs)))
    differences = tuple(
        difference
        for name in names
        for difference in _difference(name, reference.get(name), done.outputs.get(name))
    )
    same = bool(names) and not differences
    numbers = sum(tensor.numel() for tensor in reference.values())
    return RoundtripReport(what, model, same, (), names, differences, None, against, (), numbers)


def _difference(name: str, a: torch.Tensor | None, b: torch.Tensor | None) -> Iterator[Difference]:
    """Yield how two tensors differ, if they do; ``None`` differs from any tensor."""
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        count = max(tensor.numel() for tensor in (a, b) if tensor is not None)
        yield Difference(name, count, count)
        return
    unequal = (a != b) & ~((a != a) & (b != b))  # NaN equals NaN here
    if bool(unequal.any()):
        x, y = a.double(), b.double()
        largest = float((x - y).abs()[unequal].max())
        scale = float(x.abs().max()) or 1.0
        yield Difference(name, int(unequal.sum()), a.numel(), largest, largest / scale)


def _loading(loading: Mapping[str, list[str]], kinds: Sequence[str] | None = None) -> Iterator[str]:
    """Yield one line for each kind of key that Transformers reports of loading.

    Args:
        loading: kind (``missing_keys``) -> the keys.
        kinds: the kinds to list; ``None``: all.
    """
    for kind, keys in loading.items():
        if kinds is None or kind in kinds:
            listed = ", ".join(map(short, keys[:_SHOWN])) + and_more(keys, _SHOWN)
            yield f"{kind.replace('_', ' ')}: {listed}"


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off, and restore each module's training mode afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
