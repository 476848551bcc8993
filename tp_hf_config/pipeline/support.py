"""Try which widths of a class can be pruned, saved and loaded again, at tiny size.

``benchmarks/`` use the parts, for the table of all architectures and the search for faults.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ..arguments import check_arguments
from ..checkpoint.child import aligned, load
from ..errors import TPHFConfigError, UnsupportedModelError
from ..fieldmap.learn_field_map import map_of
from ..forward.coverage import InputsRefusal
from ..forward.observed_pass import PassResult, outputs_in_float64
from ..forward.run_recipe import PLAIN, MakeInputs, RunRecipe
from ..graph.prunable import Width, widths_of
from ..hook.hook import HFConfigSyncHook
from ..model.build import Builder, Refusal, module_of
from ..model.config_json import config_json
from ..model.disk_cache import suspended
from ..model.layer_class import layer_lists
from ..model.locate import check_followable, find_pretrained
from ..model.shapes import shapes
from ..model.surroundings import (
    one_thread,
    plain_autograd,
    quiet_transformers,
    same_random_state,
)
from ..model.tensors import saved_buffers
from ..planning.settings import INNER
from ..reports import Report, Rows, fields_as_json, short, versions
from ..twin.masked_check import (
    difference_of_pass,
    pruned_inputs_of,
    pruned_pass,
    run_once,
    take_weights,
)
from ..twin.tiny.tiny_model import TinyModel, randomise, scale_convolutions, tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Outcome = Literal["works", "refused", "failed"]
_CASE = "case.pt"
_RATIO = 0.5
_STEPS = (1, 2)
_SHORT = 1024  # vectors up to this length get entries that all differ


@dataclass(frozen=True)
class WidthSupport:
    """The outcome of pruning one width of a class.

    Attributes:
        fields: the config fields that set this width.
        outcome: ``works``: after one step and after two, the pruned model computes what the
            original computes with the removed units masked, and a model loaded from the saved
            folder computes the same bits; ``refused``: an error came before anything was pruned or
            written, or no unit may be removed; ``failed``: anything else.
        why: why it does not work; empty if it does.
        units: number of units in the tiny model.
    """

    fields: tuple[str, ...]
    outcome: Outcome
    why: str = ""
    units: int = 0

    @property
    def name(self) -> str:
        """The fields as one text."""
        return " + ".join(self.fields)

    def to_dict(self) -> dict[str, Any]:
        """Return the result for ``json.dumps``."""
        return fields_as_json(self)


@dataclass(frozen=True, repr=False)
class Support(Report):
    """Which widths of one class can be pruned; ``str`` gives a table.

    Attributes:
        model: the name of the class.
        widths: every width that was tried, with its outcome.
        why_not: why nothing could be tried; ``None`` if the tiny model runs.
        partial: True: the tiny model ran on text alone, although the class takes images or sound
            too.
        seed: the seed of the random weights.
        versions: the versions of the packages that were tried.
    """

    model: str
    widths: tuple[WidthSupport, ...] = ()
    why_not: str | None = None
    partial: bool = False
    seed: int = 0
    versions: dict[str, str] = field(default_factory=versions)

    def outcome(self, name: str) -> Outcome | None:
        """Return the outcome of a config field; ``None``: the class has no width with this field.

        If several widths have it: ``failed`` if any failed, else ``works`` if any works.
        """
        outcomes = {width.outcome for width in self.widths if name in width.fields}
        ranked: tuple[Outcome, ...] = ("failed", "works", "refused")
        return next((outcome for outcome in ranked if outcome in outcomes), None)

    def title(self) -> str:
        """Return the class, and why nothing could be tried."""
        if self.why_not is not None:
            return f"{self.model}: not tested: {self.why_not}"
        return f"{self.model} (tested on text only)" if self.partial else self.model

    def rows(self) -> Rows:
        """Return a row for each width."""
        rows = [(width.name, width.outcome, width.why) for width in self.widths]
        return [("config field", "outcome", "why"), *rows] if rows else ()

    def __repr__(self) -> str:
        if self.why_not is not None:
            return super().__repr__()
        works = sum(width.outcome == "works" for width in self.widths)
        verb = "works" if works == 1 else "work"
        return short(self, f"{self.model}: {works} of {len(self.widths)} widths {verb}")


@check_arguments
def supports(
    source: nn.Module | PreTrainedConfig,
    *,
    model_class: type[PreTrainedModel] | None = None,
    seed: int = 0,
    make_inputs: MakeInputs | None = None,
) -> Support:
    """Prune every width of a class at tiny size, and report which of them work.

    Torch-Pruning's ``MetaPruner`` prunes half of each width, in one step and in two. The pruned
    model has to compute what the original computes with the removed units masked, and a model
    loaded from the saved folder has to compute the same bits. The model itself is not changed, and
    its size does not matter. The cache of earlier experiments is not used.

    Args:
        source: a model, with or without weights, or a config.
        model_class: the class to build from a config; default: the class that the config names, or
            the one that the auto classes have for it.
        seed: the seed of the tiny model's random weights.
        make_inputs: a function of a config that returns a forward pass's keyword arguments, for a
            class that the library cannot feed by itself: see :func:`~tp_hf_config.prunable`.

    Returns:
        A report. ``widths`` has one entry for each width: its fields, its outcome (``works``,
        ``refused`` before anything was pruned, ``failed``) and why; ``why_not`` is set if the tiny
        model does not run.

    Raises:
        UnsupportedModelError: ``source`` is not a single Hugging Face model, or a config that
            builds none; or ``make_inputs`` raises or returns inputs with which the class does not
            run.
        TypeError: ``source`` is neither a module nor a config.
    """
    _, model = find_pretrained(module_of(source, model_class))
    check_followable(model, weights=False)
    name = type(model).__name__
    with (
        TemporaryDirectory(prefix="tp_hf_config-") as folder,
        one_thread(),
        plain_autograd(),
        same_random_state(),
        quiet_transformers(),
        suspended(),
    ):
        case = prepared(model, seed, make_inputs)
        if isinstance(case, Refusal):
            return Support(name, why_not=case.reason, seed=seed)
        widths: list[WidthSupport] = []
        for width, saved in trials(case, Path(folder)):
            refusals = (reloaded(type(model), place) for place in saved)
            refusal = next(filter(None, refusals), None)
            if refusal is not None:
                width = replace(width, outcome="failed", why=refusal.reason)
            widths.append(width)
    return Support(name, tuple(widths), None, case.tiny.partial, seed)


def prepared(
    model: PreTrainedModel, seed: int, make_inputs: MakeInputs | None = None
) -> Subject | Refusal:
    tiny = tiny_model(map_of(model, make_inputs=make_inputs))
    if isinstance(tiny, InputsRefusal):
        raise UnsupportedModelError(tiny.reason)
    if isinstance(tiny, Refusal):
        return tiny
    return subject(tiny, seed)


@dataclass(frozen=True)
class Subject:
    model: nn.Module
    tiny: TinyModel

    @cached_property
    def warmed_up(self) -> nn.Module:
        """A copy of the model after a pass, to mask."""
        return run_once(copy.deepcopy(self.model), self.tiny.inputs, self.tiny.recipe)


def subject(tiny: TinyModel, seed: int) -> Subject:
    """Return the class at the tiny model's widths, in float64, with random weights."""
    with same_random_state(seed + 1):
        model = tiny.field_map.builder.build_real(tiny.field_map.data)
        if isinstance(model, Refusal):  # the tiny model itself was built from the same config
            raise RuntimeError(model.reason)
        model.tie_weights()  # type: ignore[operator]
        # not the tiny model's weights: this exposes what experiments found by chance
        randomise(model)
        scale_convolutions(model, tiny.inputs, tiny.recipe)
    with torch.no_grad():
        for value in (*model.parameters(), *saved_buffers(model).values()):
            _as_float32(value)
    _load_computed_buffers(model, tiny.recipe)
    return Subject(model, tiny)


def _load_computed_buffers(model: Any, recipe: RunRecipe) -> None:
    """Give buffers that are not saved their values after loading (GPT-J's precision differs)."""
    saved = saved_buffers(model)
    computed = [name for name, _ in model.named_buffers() if name not in saved]
    if not computed:
        return
    with TemporaryDirectory(prefix="tp_hf_config-") as folder:
        try:
            model.save_pretrained(folder)
            loaded = type(model).from_pretrained(folder, **_options(recipe))
        except Exception:  # each trial says why
            return
    buffers = dict(loaded.named_buffers())
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in computed and name in buffers and buffers[name].shape == buffer.shape:
                buffer.copy_(buffers[name])


def _options(recipe: RunRecipe) -> dict[str, Any]:
    return {"dtype": torch.float64, "attn_implementation": recipe.attention}


def _as_float32(value: torch.Tensor) -> None:
    """Round a tensor to float32 values in place: some classes load some weights in float32."""
    value.copy_(value.float())
    # the masked check finds by value which entries of a short vector remain
    if value.ndim == 1 and len(value) <= _SHORT:
        while len(torch.unique(value)) < len(value):
            value.add_(1e-3 * torch.randn_like(value)).copy_(value.float())


# the outcome, and the saved pruned copies: one for each number of steps
Tried = tuple[WidthSupport, tuple[Path, ...]]


def trials(case: Subject, folder: Path) -> Iterator[Tried]:
    """Try every width that the library lists for a model, in new copies of the model."""
    model: Any = case.model
    field_map = map_of(model, make_inputs=case.tiny.recipe.make_inputs)
    widths = widths_of(model, field_map, case.tiny)
    proved = {name for width in widths if width.reason is None for name in width.names}
    for number, width in enumerate(widths):
        if width.reason is not None and proved & set(width.names):
            continue  # the field can be pruned, only not in this width
        yield _trial(case, width, folder / f"{number:02d}")


def _trial(case: Subject, width: Width, folder: Path) -> Tried:
    """Prune half of a width in one step and, if it has more than two units, in two."""
    folders: list[Path] = []
    for steps in _STEPS if width.units > 2 else _STEPS[:1]:
        folders.append(folder / str(steps))
        pruned = copy.deepcopy(case.model)
        outcome, why = attempt(case, pruned, folders[-1], steps, prune=width.names)
        if outcome == "works":
            continue
        if outcome == "refused":
            counts = [group.count for group in width.groups]  # one is kept in each channel group
            least = max((max(c.minimum, c.channel_groups) for c in counts), default=0)
            why = width.reason or why or f"{least} of {width.units} units must remain"
        elif steps > 1:
            why = f"{steps} steps: {why}"
        return WidthSupport(width.names, outcome, why, width.units), ()
    return WidthSupport(width.names, "works", "", width.units), tuple(folders)


def attempt(
    case: Subject,
    pruned: Any,
    folder: Path,
    steps: int = 1,
    per_layer: bool = False,
    prune: str | Sequence[str] = INNER,
    **given: Any,
) -> tuple[Outcome, str]:
    import torch_pruning as tp

    tiny = case.tiny
    hook = HFConfigSyncHook(prune=prune, make_inputs=tiny.recipe.make_inputs, per_layer=per_layer)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = tp.pruner.MetaPruner(
                pruned,
                None,
                tp.importance.GroupMagnitudeImportance(),
                pruning_ratio=_RATIO,
                iterative_steps=steps,
                hooks=[hook],
                **given,
            )
            refusal = _prune_and_check(case, pruned, pruner, steps)
    except TPHFConfigError as error:
        if shapes(pruned) == shapes(case.model):
            return "refused", str(error)
        refusal = Refusal(f"{type(error).__name__} after the step: {error}")
    except Exception as error:
        refusal = Refusal(f"{type(error).__name__}: {error}")
    if refusal is None and not any(report.groups for report in hook.reports):
        return "refused", ""
    if refusal is None:
        inputs = pruned_inputs_of(case.model, pruned, tiny.inputs, tiny.recipe)
        refusal = save(pruned, inputs, folder, tiny.watched, tiny.recipe)
    return ("works", "") if refusal is None else ("failed", _line(refusal.reason))


def _prune_and_check(case: Subject, model: Any, pruner: Any, steps: int) -> Refusal | None:
    for _ in range(steps):
        pruner.step()
    tiny = case.tiny
    builder = Builder(model, attention=tiny.recipe.attention)
    reference = builder.build_unfilled(config_json(model.config))
    if isinstance(reference, Refusal):
        return Refusal(f"the new config does not build: {reference.reason}")
    given = (tiny.inputs, tiny.watched, tiny.recipe)
    run = take_weights(reference, model) or pruned_pass(case.model, model, *given)
    if isinstance(run, Refusal):
        return run
    run_once(reference, run.inputs, tiny.recipe)
    return difference_of_pass(run, case.warmed_up, reference, *given)


def save(
    model: Any,
    inputs: Mapping[str, Any] | Refusal,
    folder: Path,
    watched: Sequence[PassResult] = (),  # results that count as outputs
    recipe: RunRecipe = PLAIN,
) -> Refusal | None:
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
        torch.save(case, folder / _CASE)
    except Exception as error:
        return Refusal(f"it cannot be saved: {type(error).__name__}: {error}")
    return None


def reloaded(loader: Any, folder: Path, **options: Any) -> Refusal | None:
    """Load a saved model, and return why its outputs are not the same bits, if they are not."""
    case = torch.load(folder / _CASE, weights_only=True)
    recipe = RunRecipe(methods=tuple(case["methods"]))
    watched = [PassResult(*result) for result in case["watched"]]
    try:
        model, problems = load(loader, str(folder), {**case["options"], **options})
        if problems:
            return Refusal(_line(f"loading reports {problems}"))
        for module in model.modules():  # a submodule may accept what the model does not (Kimi K2.5)
            if getattr(module, "_can_set_experts_implementation", bool)():
                module.set_experts_implementation("eager")
        if layer_lists(type(model)):
            model._tell_layers("_experts_implementation_internal")
        model.double().eval()
        with torch.no_grad(), aligned(model, in_turn=False):
            outputs = outputs_in_float64(model, case["inputs"], watched, recipe)
    except Exception as error:
        return Refusal(_line(f"it cannot be loaded: {type(error).__name__}: {error}"))
    same = len(outputs) == len(case["outputs"]) and all(map(torch.equal, outputs, case["outputs"]))
    return None if same else Refusal("loaded again it computes other outputs")


def _line(text: str) -> str:
    return " ".join(text.split())[:500]
