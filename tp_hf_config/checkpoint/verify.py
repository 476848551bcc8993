"""Does it load, and does it compute the same: tried in a fresh process."""

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

from ..dry_run import RealNumbers
from ..errors import CheckpointError
from ..heads import observe
from ..inputs import example_inputs
from ..locate import check_followable, find_pretrained
from ..reference import Refusal, field_name
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
    """What a fresh process made of a folder."""

    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    loading: dict[str, list[str]] = field(default_factory=dict)
    error: str | None = None


def verify_roundtrip(model: nn.Module, inputs: Mapping[str, Any]) -> RoundtripReport:
    """Save a model to a temporary folder, load and run it in a fresh process, compare the outputs.

    Args:
        model: a Hugging Face model, or a module that contains one; it stays as it is.
        inputs: keyword arguments of its forward pass; tensors, numbers, ``None``.

    Returns:
        Whether every output is the same bit for bit, and how far those are that are not.

    Raises:
        UnsupportedModelError: no single Hugging Face model with whole weights.
    """
    _, found = find_pretrained(model)
    check_followable(found)
    with TemporaryDirectory(prefix="tp_hf_config-") as place:
        folder = Path(place) / "saved"
        try:
            found.save_pretrained(folder)
        except Exception as error:  # whatever saving refuses
            name, why = type(found).__name__, f"it cannot be saved: {short(error)}"
            return RoundtripReport(name, name, False, error=why, against="the live model")
        return compare_saved(found, folder, inputs)


def compare_saved(
    model: PreTrainedModel, folder: Path, inputs: Mapping[str, Any]
) -> RoundtripReport:
    """Load a folder in a fresh process and compare with the live model that was saved to it.

    Args:
        model: its weights may be moved to aligned memory, on which the order of sums can depend.
        folder: where it was saved.
        inputs: keyword arguments of its forward pass.
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
    wrong = tuple(_loading(done.loading))
    return replace(report, loading=wrong, same=report.same and not wrong)


def verify_checkpoint(
    folder: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    trust_remote_code: bool = False,
) -> RoundtripReport:
    """Load and run a folder in a fresh process, and compare its outputs with another folder's.

    Args:
        folder: with config.json and weights.
        against: another folder, run on the same small made-up inputs.
        trust_remote_code: run the folder's own code, where its class needs that.

    Returns:
        Whether it loads, with no weight missing or of another shape, and runs; and whether the
        outputs are the same bit for bit.

    Raises:
        CheckpointError: no folder, no weights, or nothing is known to run it on.
    """
    path = Path(folder)
    paths = [path] if against is None else [path, Path(against)]
    for one in paths:
        report = checked_alone(read_folder(one, trust_remote_code))
        if report.sound is False:
            name, causes = report.model or "no class", tuple(cause.text for cause in report.causes)
            return RoundtripReport(str(one), name, False, loading=causes, error="it is not sound")
    known = [checked(one, trust_remote_code) for one in paths]
    name, inputs = _example(known[0])
    jobs = [_job_of(one) for one in known]
    with TemporaryDirectory(prefix="tp_hf_config-") as place:
        done, *others = _fresh(jobs, inputs, Path(place), "cpu", cast=True)
    wrong = tuple(_loading(done.loading, ("missing_keys", "mismatched_keys")))
    notes = tuple(_loading(done.loading, ("unexpected_keys",)))
    if done.error is not None or not others:
        same = done.error is None and not wrong
        outputs = tuple(done.outputs)
        return RoundtripReport(str(path), name, same, wrong, outputs, (), done.error, notes=notes)
    other = str(paths[1])
    if others[0].error is not None:
        error = f"{other} does not run on the inputs made for {path}: {others[0].error}"
        found = RoundtripReport(str(path), name, False, error=error, against=other)
    else:
        found = _compared(str(path), name, others[0].outputs, done, other)
    missing = _loading(others[0].loading, ("missing_keys", "mismatched_keys"))
    wrong += tuple(f"{other}: {one}" for one in missing)
    if not found.same:
        notes += tuple(_apart(*known))
    return replace(found, loading=wrong, notes=notes, same=found.same and not wrong)


def _apart(one: Known, other: Known) -> Iterator[str]:
    """Why two folders may compute different things: their classes, and what their configs say."""
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
    """A folder's class, and small random inputs for it."""
    model = build(read.classes, read.data)
    if isinstance(model, Refusal):
        raise CheckpointError(f"{read.path}: the class refuses config.json: {model.reason}.")
    observe(model)  # which form of inputs the class takes
    with torch.no_grad(), RealNumbers():
        inputs = example_inputs(model)
    generator = torch.Generator().manual_seed(0)
    made = {
        key: torch.rand(value.shape, generator=generator)
        if isinstance(value, torch.Tensor) and value.is_meta
        else value
        for key, value in inputs.items()
    }
    return type(model).__name__, made


def _job_of(read: Known) -> dict[str, Any]:
    """How a folder is loaded in a fresh process."""
    options: dict[str, Any] = {"dtype": "auto", "attn_implementation": "eager"}
    named = _named(read.classes.model)
    if not named[0].startswith(_REMOTE):
        return _job(read.path, named, options)
    references: dict[str, str] = read.data["auto_map"]
    remote = next(ref for key, ref in references.items() if key != "AutoConfig")
    return _job(read.path, named, {**options, "trust_remote_code": True}, remote)


def _named(model_class: type) -> tuple[str, str]:
    import transformers

    name = model_class.__name__
    if getattr(transformers, name, None) is model_class:
        return "transformers", name
    return model_class.__module__, model_class.__qualname__


def _options(model: PreTrainedModel) -> dict[str, Any]:
    """How the live model is loaded again: its type and its kernels."""
    options: dict[str, Any] = {"dtype": str(model.dtype).removeprefix("torch.")}
    attention = getattr(model.config, "_attn_implementation", None)
    experts = getattr(model.config, "_experts_implementation", None)
    options.update({"attn_implementation": attention} if isinstance(attention, str) else {})
    options.update({"experts_implementation": experts} if isinstance(experts, str) else {})
    return options


def _job(
    folder: Path, named: tuple[str, str], options: dict[str, Any], remote: str | None = None
) -> dict[str, Any]:
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
    """Load and run folders in a process of its own."""
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
    found = torch.load(files["results"], weights_only=True)
    return [
        _Run(one["outputs"], one["loading"], one["error"] and short(one["error"])) for one in found
    ]


def _compared(
    what: str, model: str, reference: Mapping[str, torch.Tensor], done: _Run, against: str
) -> RoundtripReport:
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
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        count = max(one.numel() for one in (a, b) if one is not None)
        yield Difference(name, count, count)
        return
    unequal = (a != b) & ~((a != a) & (b != b))  # NaN and NaN are the same
    if bool(unequal.any()):
        x, y = a.double(), b.double()
        largest = float((x - y).abs()[unequal].max())
        scale = float(x.abs().max()) or 1.0
        yield Difference(name, int(unequal.sum()), a.numel(), largest, largest / scale)


def _loading(loading: Mapping[str, list[str]], kinds: Sequence[str] | None = None) -> Iterator[str]:
    """What Transformers says of loading, a line each kind."""
    for kind, keys in loading.items():
        if kinds is None or kind in kinds:
            listed = ", ".join(map(short, keys[:_SHOWN])) + and_more(keys, _SHOWN)
            yield f"{kind.replace('_', ' ')}: {listed}"


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout and the like are off meanwhile."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
