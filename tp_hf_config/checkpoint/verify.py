"""Test in a fresh process whether a model loads and computes the same outputs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import nn

from ..arguments import check_arguments
from ..errors import CheckpointError
from ..forward.find_recipe import find_recipe
from ..forward.inputs import example_inputs
from ..model.build import Refusal
from ..model.layer_class import GENERATED
from ..model.locate import check_followable, find_pretrained
from ..model.meta_run import RealNumbers
from ..model.paging import is_paged
from ..model.surroundings import evaluating, same_random_state
from . import child
from .building import Checkpoint, build, own_reference
from .check import place, solvable_folder
from .folder import CONFIG
from .loading import main_dtype
from .reports import Difference, RoundtripReport, and_more, short

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHOWN = 4
_OF_FOLDERS = ("transformers_modules", GENERATED)  # packages of code from folders
_WEIGHTS_MISSING = ("missing_keys", "mismatched_keys")


class _Run(TypedDict):
    outputs: dict[str, torch.Tensor]
    loading: dict[str, list[str]]
    error: str | None


@check_arguments
def verify_roundtrip(model: nn.Module, inputs: Mapping[str, Any]) -> RoundtripReport:
    """Save a model, load and run it in a fresh process, and compare the outputs.

    Args:
        model: a Hugging Face model, or a module that contains one; its weights keep their values.
        inputs: keyword arguments of its forward pass: tensors, numbers, ``None``.

    Returns:
        A report: whether every output is the same bit for bit, and how far others are from the live
        model's. If the model cannot be saved, ``error`` says why.

    Raises:
        UnsupportedModelError: there is no single Hugging Face model with whole weights.
    """
    _, pretrained = find_pretrained(model)
    check_followable(pretrained)
    with TemporaryDirectory(prefix="tp_hf_config-") as temporary:
        folder = Path(temporary) / "saved"
        try:
            pretrained.save_pretrained(folder)
        except Exception as error:  # saving may refuse with any exception
            name, why = type(pretrained).__name__, f"it cannot be saved: {short(error)}"
            return RoundtripReport(name, name, False, error=why, against="the live model")
        return fresh_run(pretrained, folder, inputs, live_outputs(pretrained, inputs))


def live_outputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Every tensor that a forward pass in eval mode returns; weights may be moved to align them."""
    with child.aligned(model, in_turn=is_paged()), evaluating(model), same_random_state(0):
        return child.outputs_of(model, dict(inputs))


def fresh_run(
    model: PreTrainedModel,
    folder: Path,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, torch.Tensor],
) -> RoundtripReport:
    """Load and run a saved folder in a fresh process; compare with :func:`live_outputs`."""
    job = {**_job(folder, type(model), _options(model)), "paged": is_paged()}
    name, live = type(model).__name__, {key: value.cpu() for key, value in outputs.items()}
    (run,) = _fresh_process([job], dict(inputs), str(model.device))
    if run["error"] is not None:
        return RoundtripReport(name, name, False, error=run["error"], against="the live model")
    report = _compared(name, name, live, run["outputs"], "the live model")
    problems = tuple(_problems(run["loading"]))
    return replace(report, loading=problems, same=report.same and not problems)


@check_arguments
def verify_checkpoint(
    folder: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    trust_remote_code: bool = False,
) -> RoundtripReport:
    """Load and run a folder in a fresh process, and compare it with another folder.

    Args:
        folder: a folder with config.json and weights.
        against: another folder, which is run on the same small random inputs.
        trust_remote_code: run the folder's own code if its class needs it.

    Returns:
        A report; ``same`` is True if all weights load, the folder runs, every output has finite
        numbers and (with ``against``) equals the other folder's bit for bit.

    Raises:
        CheckpointError: a folder or its weights do not exist or are damaged, or no inputs can be
            made (its class is not known, or refuses the config).
    """
    paths = [place(each) for each in (folder, against) if each is not None]
    folders = [solvable_folder(path, trust_remote_code) for path in paths]
    name, inputs = _example(folders[0])
    options = {"dtype": "auto", "attn_implementation": "eager"}
    jobs = [_job(each.path, each.classes.model, options) for each in folders]
    run, *others = _fresh_process(jobs, inputs, "cpu", cast=True)
    what, other = str(paths[0]), None if against is None else str(paths[1])
    if run["error"] is not None:
        return RoundtripReport(what, name, False, error=run["error"])
    reference = others[0] if others else run
    if reference["error"] is not None:
        error = f"{other} does not run on the inputs made for {what}: {reference['error']}"
        report = RoundtripReport(what, name, False, error=error, against=other)
    else:
        report = _compared(what, name, reference["outputs"], run["outputs"], other)
    problems = (
        *_problems(run["loading"], _WEIGHTS_MISSING),
        *(f"{other}: {p}" for each in others for p in _problems(each["loading"], _WEIGHTS_MISSING)),
    )
    notes = (*_problems(run["loading"], ("unexpected_keys",)), *report.notes)
    return replace(report, loading=problems, notes=notes, same=report.same and not problems)


def _example(read: Checkpoint) -> tuple[str, dict[str, Any]]:
    """The name of a folder's class, and small random inputs for it."""
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


def _options(model: PreTrainedModel) -> dict[str, Any]:
    """The ``from_pretrained`` options for the live model's dtype and kernels."""
    options: dict[str, Any] = {"dtype": str(main_dtype(model)).removeprefix("torch.")}
    attention = getattr(model.config, "_attn_implementation", None)
    experts = getattr(model.config, "_experts_implementation", None)
    options.update({"attn_implementation": attention} if isinstance(attention, str) else {})
    options.update({"experts_implementation": experts} if isinstance(experts, str) else {})
    return options


def _job(folder: Path, model_class: type, options: dict[str, Any]) -> dict[str, Any]:
    """An entry of ``folders`` in :func:`child.run`."""
    module, name = model_class.__module__, model_class.__qualname__
    if module.startswith(_OF_FOLDERS):
        module, name = "", str(own_reference(json.loads((folder / CONFIG).read_bytes())))
        options = {**options, "trust_remote_code": True}
    return {"folder": str(folder.absolute()), "class": (module, name), "options": options}


def _fresh_process(
    jobs: list[dict[str, Any]], inputs: dict[str, Any], device: str, cast: bool = False
) -> list[_Run]:
    """Run jobs in one fresh process; ``cast`` inputs to the model's dtype."""
    with TemporaryDirectory(prefix="tp_hf_config-") as exchange:
        files = {key: f"{exchange}/{key}.pt" for key in ("inputs", "results")}
        torch.save(inputs, files["inputs"])
        threads = torch.get_num_threads()
        job = {"folders": jobs, **files, "device": device, "threads": threads, "cast": cast}
        job_file, errors = Path(exchange) / "job.json", Path(exchange) / "errors.txt"
        job_file.write_text(json.dumps({**job, "path": sys.path}))
        process = start_child(job_file, errors)
        try:
            code = process.wait()
        finally:  # also after Ctrl-C
            process.kill()
            process.wait()
        if code != 0:
            ended = _end_of(code, errors.read_text())
            return [_Run(outputs={}, loading={}, error=ended) for _ in jobs]
        runs: list[_Run] = torch.load(files["results"], weights_only=True)
        return [_Run(**{**run, "error": run["error"] and short(run["error"])}) for run in runs]


def _end_of(code: int, errors: str) -> str:
    """How a fresh process that failed ended, from its exit status and standard error."""
    lines = [line for line in errors.splitlines() if line.strip()]
    last = short(lines[-1] if lines else code)
    if code >= 0:
        return f"the fresh process ended with: {last}"
    if code == -getattr(signal, "SIGKILL", 9):  # Windows has none
        return "the fresh process was killed (SIGKILL), most often because memory ran out"
    return f"the fresh process was ended by signal {-code} ({signal.strsignal(-code)}): {last}"


def start_child(job_file: Path, errors: Path) -> subprocess.Popen[bytes]:
    with errors.open("w") as written:
        return subprocess.Popen(
            [sys.executable, child.__file__, str(job_file)],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=written,
        )


def _problems(
    loading: Mapping[str, list[str]], kinds: Sequence[str] | None = None
) -> Iterator[str]:
    """Yield one line for each of these kinds of keys that Transformers reports (``None``: all)."""
    for kind, keys in loading.items():
        if kinds is None or kind in kinds:
            listed = ", ".join(map(short, keys[:_SHOWN])) + and_more(keys, _SHOWN)
            yield f"{kind.replace('_', ' ')}: {listed}"


# What two runs computed


def _compared(
    what: str,
    model: str,
    reference: Mapping[str, torch.Tensor],
    outputs: Mapping[str, torch.Tensor],
    against: str | None,
) -> RoundtripReport:
    """Report on differing outputs; outputs without a finite number never count as the same."""
    names = tuple(dict.fromkeys((*reference, *outputs)))
    differences = tuple(
        difference
        for name in names
        for difference in _difference(name, reference.get(name), outputs.get(name))
    )
    ours = tuple(_not_finite(outputs))
    theirs = (line for line in _not_finite(reference) if line not in ours)
    notes = (*ours, *(f"{line} in {against}" for line in theirs))
    same = bool(names) and not differences and not notes
    numbers = 0 if against is None else sum(tensor.numel() for tensor in reference.values())
    return RoundtripReport(what, model, same, (), names, differences, None, against, notes, numbers)


def _not_finite(outputs: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Yield a line for each output without a finite number."""
    for name, tensor in outputs.items():
        if tensor.numel() and not bool(tensor.isfinite().any()):
            yield f"every number of {name} is NaN or infinite"


def _difference(name: str, a: torch.Tensor | None, b: torch.Tensor | None) -> Iterator[Difference]:
    """Yield how two tensors differ, if they do; ``a`` is the reference."""
    if a is None or b is None or not _comparable(a, b):
        count = max(tensor.numel() for tensor in (a, b) if tensor is not None)
        yield Difference(name, count, count)
        return
    dtypes = None
    if a.dtype != b.dtype:
        dtypes = str(b.dtype).removeprefix("torch."), str(a.dtype).removeprefix("torch.")
        a, b = a.double(), b.double()
    unequal = (a != b) & ~((a != a) & (b != b))  # NaN equals NaN here
    if dtypes is not None or bool(unequal.any()):
        x, y = a.double(), b.double()
        largest = _largest((x - y)[unequal])
        scale = _largest(x[x.isfinite()]) or 1.0
        count = int(unequal.sum())
        yield Difference(name, count, a.numel(), largest, largest / scale, dtypes)


def _comparable(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True for equal shapes, with equal or floating point dtypes."""
    floating = a.is_floating_point() and b.is_floating_point()
    return a.shape == b.shape and (a.dtype == b.dtype or floating)


def _largest(numbers: torch.Tensor) -> float:
    return float(numbers.abs().max()) if numbers.numel() else 0.0
