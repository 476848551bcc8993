"""Prune, compare, save and load again every width of one class, at tiny size."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import nn

from ..checkpoint.child import load
from ..errors import TPHFConfigError
from ..fieldmap.learn_field_map import map_of
from ..forward.observed_pass import PassResult, outputs_in_float64
from ..forward.run_recipe import PLAIN, RunRecipe
from ..graph.prunable import Width, widths_of
from ..hook.hook import HFConfigSyncHook
from ..model.build import Builder, Refusal
from ..model.config_json import config_json
from ..model.layer_class import layer_lists
from ..model.shapes import shapes
from ..model.surroundings import same_random_state
from ..model.tensors import saved_buffers
from ..planning.pruner_kwargs import pruner_kwargs
from ..planning.settings import Layers
from ..twin.masked_check import (
    difference_of_pass,
    fill,
    own_tensors,
    pruned_inputs_of,
    pruned_pass,
    run_once,
)
from ..twin.tiny.tiny_model import TinyModel, randomise, scale_convolutions

Outcome = Literal["works", "refused", "failed"]
CASE = "case.pt"
RATIO = 0.5
STEPS = (1, 2)
_SHORT = 1024  # entries of a vector that are made different from each other


@dataclass(frozen=True)
class WidthSupport:
    """The outcome of pruning one width of a class.

    Attributes:
        fields: the config fields that set this width.
        outcome: ``works``: after one step and after two, the pruned model computes what the
            original computes with the removed units masked, and a model loaded from the saved
            folder computes the same bits; ``refused``: an error came before anything was pruned or
            written, or no unit may go; ``failed``: anything else.
        why: why it does not work; empty if it does.
        graph: ``config``, the dependency graph that pruned it; empty if none did.
        units: how many units it has in the tiny model.
    """

    fields: tuple[str, ...]
    outcome: Outcome
    why: str = ""
    graph: str = ""
    units: int = 0

    @property
    def name(self) -> str:
        """Return the fields as one text."""
        return " + ".join(self.fields)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as data for ``json.dumps``."""
        return asdict(self)


@dataclass(frozen=True)
class Subject:
    """A model to prune copies of.

    Attributes:
        model: the class at the tiny model's widths, with other random weights, in float64.
        tiny: the tiny model; its inputs and watched results are used.
    """

    model: nn.Module
    tiny: TinyModel

    @cached_property
    def warmed_up(self) -> nn.Module:
        """A copy of the model after a pass, to mask."""
        return run_once(copy.deepcopy(self.model), self.tiny.inputs, self.tiny.recipe)


@dataclass(frozen=True)
class Trial:
    """One width that was pruned in copies of the tiny model.

    Attributes:
        width: the outcome.
        folders: where the pruned copies were saved, one for each number of steps.
    """

    width: WidthSupport
    folders: tuple[Path, ...] = ()


def subject(tiny: TinyModel, seed: int) -> Subject:
    """Return the class at the tiny model's widths, with random weights made from ``seed``.

    The weights are not the tiny model's own, so that trials expose what experiments with those
    found by chance.
    """
    with same_random_state(seed + 1):
        model = tiny.field_map.builder.build_real(tiny.field_map.data)
        if isinstance(model, Refusal):  # the tiny model itself was built from the same config
            raise RuntimeError(model.reason)
        model.tie_weights()  # type: ignore[operator]
        randomise(model)
        scale_convolutions(model, tiny.inputs, tiny.recipe)
    with torch.no_grad():
        for value in (*model.parameters(), *saved_buffers(model).values()):
            _as_float32(value)
    _load_computed_buffers(model, tiny.recipe)
    return Subject(model, tiny)


def _load_computed_buffers(model: Any, recipe: RunRecipe) -> None:
    """Give buffers that are not saved the values that loading computes.

    Loading computes GPT-J's tables in another precision. Nothing changes if a class does not load;
    each trial says why then.
    """
    saved = saved_buffers(model)
    computed = [name for name, _ in model.named_buffers() if name not in saved]
    if not computed:
        return
    with TemporaryDirectory(prefix="tp_hf_config-") as folder:
        try:
            model.save_pretrained(folder)
            loaded = type(model).from_pretrained(folder, **_options(recipe))
        except Exception:
            return
    buffers = dict(loaded.named_buffers())
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in computed and name in buffers and buffers[name].shape == buffer.shape:
                buffer.copy_(buffers[name])


def _options(recipe: RunRecipe) -> dict[str, Any]:
    """Return ``from_pretrained`` options with which a loaded model computes as the saved one."""
    return {"dtype": torch.float64, "attn_implementation": recipe.attention}


def _as_float32(value: torch.Tensor) -> None:
    """Round a tensor to float32 values in place.

    Some classes load some weights in float32, whatever dtype is asked for. The entries of a short
    vector stay different, because the masked check finds by value which of them remain.
    """
    value.copy_(value.float())
    if value.ndim == 1 and len(value) <= _SHORT:
        while len(torch.unique(value)) < len(value):
            value.add_(1e-3 * torch.randn_like(value)).copy_(value.float())


def trials(case: Subject, folder: Path) -> Iterator[Trial]:
    """Yield a trial for every width that the library lists for a model; prune new copies for each.

    Leave out a width that cannot be pruned if one of its fields is in a width that can.

    ``case``: the model, which is not changed, and its inputs.
    """
    model: Any = case.model
    field_map = map_of(model, make_inputs=case.tiny.recipe.make_inputs)
    widths = widths_of(model, field_map, case.tiny)
    proved = {name for width in widths if width.reason is None for name in width.names}
    for number, width in enumerate(widths):
        if width.reason is not None and proved & set(width.names):
            continue  # the field can be pruned, only not in this width
        yield _trial(case, width, folder / f"{number:02d}")


def _trial(case: Subject, width: Width, folder: Path) -> Trial:
    """Prune half of a width in one step and, if it has more than two units, in two."""
    folders: list[Path] = []
    for steps in STEPS if width.units > 2 else STEPS[:1]:
        folders.append(folder / str(steps))
        pruned = copy.deepcopy(case.model)
        outcome, why = attempt(case, pruned, folders[-1], steps, prune=width.names)
        if outcome == "works":
            continue
        if outcome == "refused":
            counts = [group.count for group in width.groups]  # one stays in each channel group
            least = max((max(c.minimum, c.channel_groups) for c in counts), default=0)
            why = width.reason or why or f"{least} of {width.units} have to stay"
        elif steps > 1:
            why = f"{steps} steps: {why}"
        graph = "" if outcome == "refused" else "config"
        return Trial(WidthSupport(width.names, outcome, why, graph, width.units))
    return Trial(WidthSupport(width.names, "works", "", "config", width.units), tuple(folders))


def attempt(
    case: Subject,
    pruned: Any,
    folder: Path,
    steps: int = 1,
    layers: Layers = "uniform",
    **given: Any,
) -> tuple[Outcome, str]:
    """Prune a copy and save it; return the outcome, and why it does not work.

    Args:
        case: the model that ``pruned`` is a copy of.
        pruned: the copy, which is pruned in place.
        folder: where to save.
        steps: the number of steps.
        layers: whether layers may get widths of their own.
        given: other arguments of ``pruner_kwargs``.

    Returns:
        ``refused`` without a reason if nothing was pruned.
    """
    import torch_pruning as tp

    tiny, hook = case.tiny, HFConfigSyncHook(layers=layers)
    try:
        with _quiet():
            pruner = tp.pruner.MetaPruner(
                pruned,
                **pruner_kwargs(
                    pruned, make_inputs=tiny.recipe.make_inputs, layers=layers, **given
                ),
                importance=tp.importance.GroupMagnitudeImportance(),
                pruning_ratio=RATIO,
                iterative_steps=steps,
                hooks=[hook],
            )
    except TPHFConfigError as error:
        return "refused", str(error)
    except Exception as error:
        return "failed", _line(f"{type(error).__name__} from the pruner's constructor: {error}")
    try:
        refusal = _prune_and_check(case, pruned, pruner, steps)
    except TPHFConfigError as error:
        if shapes(pruned) == shapes(case.model):
            return "refused", str(error)
        refusal = Refusal(f"{type(error).__name__} after the step: {error}")
    if refusal is None and not any(report.groups for report in hook.reports):
        return "refused", ""
    if refusal is None:
        inputs = pruned_inputs_of(case.model, pruned, tiny.inputs, tiny.recipe)
        refusal = save(pruned, inputs, folder, tiny.watched, tiny.recipe)
    return ("works", "") if refusal is None else ("failed", _line(refusal.reason))


def _prune_and_check(case: Subject, model: Any, pruner: Any, steps: int) -> Refusal | None:
    """Run all steps and the masked check; return why that failed, or ``None``.

    Errors of the library pass through.
    """
    try:
        with _quiet():
            for _ in range(steps):
                pruner.step()
        tiny = case.tiny
        builder = Builder(model, attention=tiny.recipe.attention)
        reference = builder.build_unfilled(config_json(model.config))
        if isinstance(reference, Refusal):
            return Refusal(f"the new config does not build: {reference.reason}")
        reference.tie_weights()  # type: ignore[operator]
        given = (tiny.inputs, tiny.watched, tiny.recipe)
        run = fill(reference, own_tensors(model), []) or pruned_pass(case.model, model, *given)
        if isinstance(run, Refusal):
            return run
        run_once(reference, run.inputs, tiny.recipe)
        return difference_of_pass(run, case.warmed_up, reference, *given)
    except TPHFConfigError:
        raise
    except Exception as error:
        return Refusal(f"{type(error).__name__}: {error}")


def save(
    model: Any,
    inputs: Mapping[str, Any] | Refusal,
    folder: Path,
    watched: Sequence[PassResult] = (),
    recipe: RunRecipe = PLAIN,
) -> Refusal | None:
    """Save a model with inputs and its outputs; return why that failed, or ``None``.

    ``inputs``: keyword arguments of its forward pass, or why there are none.
    ``watched``: results that count as outputs.
    """
    if isinstance(inputs, Refusal):
        return inputs
    try:
        with torch.no_grad():
            outputs = outputs_in_float64(model, inputs, watched, recipe)
        model.save_pretrained(folder)
        case = {
            "inputs": dict(inputs),
            "watched": [tuple(result) for result in watched],
            "methods": list(recipe.methods),
            "outputs": outputs,
            "options": _options(recipe),
        }
        torch.save(case, folder / CASE)
    except Exception as error:
        return Refusal(f"it cannot be saved: {type(error).__name__}: {error}")
    return None


def reloaded(model_class: Any, folder: Path) -> Refusal | None:
    """Load a saved model and compare its outputs bit for bit; return what is wrong, or ``None``.

    Code that was saved with it runs, as every auto class that it names lets it: those of the model
    itself, and those of the classes beside it, which only have to have its layers.
    """
    config = json.loads((folder / "config.json").read_text())
    places = (config.get("auto_map") or {}).items()
    models = {_auto(name): place for name, place in places if name.startswith("AutoModel")}
    saved = f".{config['architectures'][0]}"
    own = [auto for auto, place in models.items() if place.endswith(saved)] or [model_class]
    beside = [auto for auto in models if auto not in own]
    case = torch.load(folder / CASE, weights_only=True)
    case["options"].update({"trust_remote_code": True} if models else {})
    for loader in (*own, *beside):
        try:
            reason = _wrong_of(loader, folder, case) if loader in own else _lacks(loader, folder)
        except Exception as error:
            reason = f"it cannot be loaded: {type(error).__name__}: {error}"
        if reason is not None:
            by = f"{loader.__name__}: " if loader in beside else ""
            return Refusal(_line(f"{by}{reason}"))
    return None


def _wrong_of(loader: Any, folder: Path, case: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a saved model that a class loads; ``None`` if it is the same."""
    recipe = RunRecipe(methods=tuple(case["methods"]))
    model, problems = load(loader, str(folder), case["options"])
    if problems:
        return f"loading reports {problems}"
    for module in model.modules():  # a part may take it where the whole may not (Kimi K2.5)
        if getattr(module, "_can_set_experts_implementation", bool)():
            module.set_experts_implementation("eager")
    if layer_lists(type(model)):
        model._tell_layers("_experts_implementation_internal")
    with torch.no_grad():
        watched = [PassResult(*result) for result in case["watched"]]
        outputs = outputs_in_float64(model.double().eval(), case["inputs"], watched, recipe)
    same = len(outputs) == len(case["outputs"]) and all(map(torch.equal, outputs, case["outputs"]))
    return None if same else "loaded again it computes other outputs"


def _lacks(loader: Any, folder: Path) -> str | None:
    """Return which layers get no weights in a class beside the saved one; ``None`` if all do."""
    options = {"trust_remote_code": True, "ignore_mismatched_sizes": True}  # of its own head
    model, problems = load(loader, str(folder), options)
    lists = tuple(f"{name}." for name in layer_lists(type(model)))
    keys = (*problems.get("missing_keys", ()), *problems.get("mismatched_keys", ()))
    lacking = [key for key in keys if any(name in key for name in lists)]
    return f"no weights are loaded for {lacking}" if lacking else None


def _auto(name: str) -> Any:
    """Return the auto class of this name."""
    import transformers

    return getattr(transformers, name)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _line(text: str) -> str:
    return " ".join(text.split())[:500]
