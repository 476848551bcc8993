"""Remove whole layers from a live model and update its config: all of it or nothing."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..arguments import Count, check_arguments
from ..calibration.depth_refit import depth_refits, refitted
from ..calibration.importance import layer_influence
from ..calibration.passes import undisturbed
from ..errors import ConfigSyncError, UnsupportedModelError, in_one_line, listed
from ..fieldmap.fewer_layers import Change, KeptLayers, config_without, layer_lists_in
from ..fieldmap.layer_kinds import lists_of
from ..fieldmap.learn_field_map import build_live, notes_on_options, whole_build
from ..forward.find_recipe import find_recipe
from ..forward.inputs import example_inputs, text_inputs
from ..forward.observed_pass import AllFloat64, Argument, handed_on, without_layers
from ..forward.output_tensors import unmasked
from ..graph.layer_fields import layers_listed
from ..model.build import Builder, Refusal
from ..model.config_json import (
    changed_values,
    config_json,
    config_nodes,
    field_name,
    value_at,
    with_values,
)
from ..model.layer_entries import KEY, entries_of
from ..model.locate import check_followable, find_pretrained
from ..model.shapes import compare, shapes
from ..model.surroundings import quiet_transformers, raise_shortage, same_random_state
from ..reports import MOST_LINES, Report
from .apply import Changes, all_or_nothing, difference, write
from .follow import with_mirrored_fields

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..calibration.calibrate import Calibration


@check_arguments
def drop_layers(
    model: nn.Module,
    layers: Sequence[int] | None = None,
    *,
    count: Count | None = None,
    calibration: Calibration | None = None,
    refit: Calibration | None = None,
    which: str | None = None,
) -> DroppedLayers:
    """Remove whole layers from a model, in place, and update its config.

    The class is asked which fields change: the number of layers, lists with one entry per layer,
    layer numbers and rules about them. The remaining layers keep their Parameters and are
    renumbered. Afterwards, the model computes what it computed with each dropped layer replaced by
    the identity, and with the refitted weights. Call this before making a pruner.

    Args:
        model: the model, or a module that contains it.
        layers: numbers of the layers to drop, from 0 on.
        count: number of layers to drop: those that change the hidden states least on the data of
            ``calibration`` (block influence: ShortGPT, arXiv 2403.03853).
        calibration: result of :func:`calibrate` for this model; needed for ``count``.
        refit: such a result, to refit the weight in front of the dropped layers, so that it makes
            up for them (ReplaceMe, arXiv 2505.02819). Without it, the remaining weights stay.
        which: name of the layer list, or a part of it (``"encoder"``), if there are several.

    Returns:
        A report. If anything fails, nothing is changed.

    Raises:
        ValueError: the arguments contradict each other.
        UnsupportedModelError: there is no single list of layers, or the model is not supported.
        ConfigSyncError: no config describes the model without these layers, or its outputs would
            differ.
        CalibrationError: the model cannot be measured on the data of ``calibration``.
    """
    _check_arguments(layers, count, calibration)
    live: Any = find_pretrained(model)[1]
    check_followable(live)
    for given in (calibration, refit):
        if given is not None:
            given.check_measures(live)
    before = config_json(live.config, use_diff=False)
    with layers_listed(live, per_layer=False):  # the entries of single layers, where layers differ
        dropping = _Dropping(live, which)
        influence: tuple[float, ...] = ()
        notes: tuple[str, ...] = ()
        if layers is not None:
            chosen = _sorted(layers, dropping)
        elif count is not None and calibration is not None:
            influence = layer_influence(
                calibration.model, dropping.modules, calibration.train, calibration.ranks
            )
            chosen, notes = dropping.least(count, influence)
        refits, unrefitted = depth_refits(refit, dropping.modules, chosen) if refit else ([], [])
        with refitted(live, refits):
            report = dropping.drop(chosen, (*notes, *unrefitted))
    changed = changed_values(before, config_json(live.config, use_diff=False))
    fields = {
        field_name(field): (value_at(before, field), value)
        for field, value in changed
        if KEY not in field  # whose layers the report names
    }
    explained = {each.parameter: each.explained for each in refits}
    return replace(report, fields=fields, influence=influence, refits=explained)


def _check_arguments(
    layers: Sequence[int] | None, count: int | None, calibration: Calibration | None
) -> None:
    if (layers is None) == (count is None):
        raise ValueError(
            "pass either the layers to drop, drop_layers(model, layers=[14, 25]), or their number, "
            "drop_layers(model, count=2, calibration=calibrate(model))"
        )
    if count is not None and calibration is None:
        raise ValueError(
            "count= drops the layers that change the hidden states least, which is measured on "
            "data: drop_layers(model, count=2, calibration=calibrate(model))"
        )


def _sorted(layers: Sequence[int], dropping: _Dropping) -> tuple[int, ...]:
    """Return layer numbers, rising; raise if one is missing in the model or given twice."""
    total = len(dropping.modules)
    twice = [number for number, times in Counter(layers).items() if times > 1]
    if twice:
        raise ValueError(
            f"layers={list(layers)} names layer {listed(twice)} twice. Name every layer once"
        )
    wrong = [number for number in layers if not 0 <= number < total]
    chosen = tuple(sorted(set(layers)))
    if wrong or not 0 < len(chosen) < total:
        found = "no layer" if not chosen else "all layers"
        raise ValueError(
            f"layers={list(layers)} names {f'layer {listed(wrong)}' if wrong else found}: "
            f"{dropping.name} has layers 0 to {total - 1}, and at least one has to be kept"
        )
    return chosen


class _Dropping:
    def __init__(self, model: PreTrainedModel, which: str | None):
        self.model = model
        self.builder, built = build_live(model, buffers=True)
        self.reference = whole_build(model, self.builder, built)
        self.data = config_json(model.config, use_diff=False)
        self.full = _build(self.builder, self.data)
        self.name = self._list_named(which)
        self.list = model.get_submodule(self.name)
        self.modules = list(self.list.children())

    def _list_named(self, which: str | None) -> str:
        """Return the name of the layer list that fits ``which``; raise if not exactly one does."""
        kind = type(self.model).__name__
        if which is not None and which in lists_of(self.full):
            return which
        found = layer_lists_in(self.builder, self.data, self.full)
        names = [name for name, refusal in found.items() if refusal is None]
        if not names:
            reasons = [f"{name}: {refusal.reason}" for name, refusal in found.items() if refusal]
            raise UnsupportedModelError(
                f"{kind} has no list of layers that its config can shorten, so no layer can be "
                f"dropped ({listed(reasons, '; ') or 'it has no list of layers'}). Nothing was "
                "changed."
            )
        fitting = [name for name in names if which is None or f".{which}." in f".{name}."]
        if len(fitting) == 1:
            return fitting[0]
        if which is not None and not fitting:
            raise UnsupportedModelError(
                f"which={which!r} names no list of layers of {kind}. Its lists are: "
                f"{', '.join(names)}."
            )
        raise UnsupportedModelError(
            f"{kind} has {len(fitting)} lists of layers: {', '.join(fitting)}. Name one of them: "
            f"drop_layers(model, ..., which={fitting[0]!r}), in the shell --drop-layers "
            f"{fitting[0]}=N. Nothing was changed."
        )

    def least(
        self, count: int, influence: Sequence[float]
    ) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Return the least influential layers that can be dropped together, and notes."""
        total = len(self.modules)
        if not 0 < count < total:
            raise ValueError(
                f"count={count}: {self.name} has {total} layers, of which 1 to {total - 1} can be "
                "dropped"
            )
        order = sorted(range(total), key=lambda number: influence[number])
        chosen = tuple(sorted(order[:count]))
        if not isinstance(self._change(chosen), Refusal):
            return chosen, ()
        chosen, passed_by = (), dict[int, str]()  # number -> why it cannot be dropped too
        for number in order:
            if len(chosen) < count:
                more = tuple(sorted((*chosen, number)))
                change = self._change(more)
                if isinstance(change, Refusal):
                    passed_by[number] = change.reason
                else:
                    chosen = more
        reason = next(iter(passed_by.values()))
        if len(chosen) < count:
            raise self._refused(order[:count], reason)
        note = (
            f"layers {listed([*passed_by])} change the hidden states less than some of the dropped "
            f"layers, but were kept, because no config describes the model without them: {reason}"
        )
        return chosen, (note,)

    def _kept(self, dropped: Sequence[int]) -> tuple[int, ...]:
        return tuple(number for number in range(len(self.modules)) if number not in dropped)

    def _change(self, dropped: Sequence[int]) -> Change | Refusal:
        return config_without(self.builder, self.data, self.full, self.name, self._kept(dropped))

    def _refused(self, dropped: Sequence[int], reason: str) -> ConfigSyncError:
        numbers = ", ".join(map(str, sorted(dropped)))
        return ConfigSyncError(
            f"no config describes {type(self.model).__name__} without layer {numbers} of "
            f"{self.name}: {reason.rstrip('.')}. Choose the layers so that every remaining layer "
            "has the kind that its new position requires; the last layers often work. Nothing was "
            "changed."
        )

    def drop(self, dropped: tuple[int, ...], notes: Sequence[str]) -> DroppedLayers:
        """Drop layers (rising numbers) and return the report; change nothing if anything fails."""
        change = self._change(dropped)
        if isinstance(change, Refusal):
            raise self._refused(dropped, change.reason)
        data, built = self._proved(change)
        keep, parameters = self._kept(dropped), self.model.num_parameters()
        fresh = _build(self.builder, self.data)  # running one changes it (Swin's windows)
        outputs = OutputsWithout(self.model, fresh, self.modules, dropped)
        with all_or_nothing() as changes:
            self._write(changes, data, built, keep)
            self._check_written(keep)
            compared = outputs.compare(self.name)
        name, tensors = type(self.model).__name__, len(shapes(self.model))
        return DroppedLayers(
            self.name,
            dropped,
            keep,
            parameters=(parameters, self.model.num_parameters()),
            proof=f"proved: {tensors} tensors have the shapes that {name} builds from the new "
            f"config; {compared}",
            notes=(*notes, *notes_on_options(self.model, self.builder), *outputs.notes),
        )

    def _proved(self, change: Change) -> tuple[dict[str, Any], nn.Module]:
        """Return the new config and its build, with fields updated that repeat a changed one."""
        data = with_values(self.data, change)
        built = self.builder.build(data, buffers=True)
        if isinstance(built, Refusal):  # it was built without buffers before
            raise ConfigSyncError(
                f"{type(self.model).__name__} refuses the config without these layers: "
                f"{built.reason}. Nothing was changed."
            )
        refusal = self.builder.initialised(data)  # loading a folder asks for initial weights
        if refusal is not None and self.builder.initialised(self.data) is None:
            raise ConfigSyncError(
                f"{type(self.model).__name__} with {len(self.modules)} layers can be loaded, but "
                f"with fewer layers it fails while it initialises its weights: {refusal.reason}. "
                "Drop fewer layers. Nothing was changed."
            )
        # its notes are dropped: other fields may equal the old number of layers by chance (experts)
        data, built, _ = with_mirrored_fields(self.builder, self.data, data, built)
        return data, built

    def _write(
        self, changes: Changes, data: dict[str, Any], built: nn.Module, keep: Sequence[int]
    ) -> None:
        entries = _entries_kept(self.model, self.data, data, keep)
        for config, _ in entries:
            changes.set(config, KEY, None)  # entries of removed layers are invalid
        _shorten(changes, self.list, keep)
        _shorten(Changes(), self.reference.get_submodule(self.name), keep)
        new = difference(self.model, self.reference, built)
        fields = [item for item in new.fields if KEY not in item[1]]
        write(changes, self.model, replace(new, fields=fields))
        for config, left in entries:
            changes.set(config, KEY, left)

    def _check_written(self, keep: Sequence[int]) -> None:
        built = self.builder.build(config_json(self.model.config))
        if isinstance(built, Refusal):
            reason: str | None = built.reason
        else:
            reason = KeptLayers(self.full, self.name, tuple(keep)).difference(built)
            if reason is None and shapes(self.model) != shapes(built):
                reason = listed(compare(shapes(self.model), shapes(built))) or (
                    "it builds more tensors"
                )
        if reason is not None:
            raise ConfigSyncError(
                f"{type(self.model).__name__} changes the config without these layers, or builds "
                f"something else from it: {reason.rstrip('.')}. Nothing was changed."
            )


def _build(builder: Builder, data: dict[str, Any]) -> nn.Module:
    """Build a class on the meta device from its own config, with every default written out."""
    built = builder.build(data)
    if isinstance(built, Refusal):
        raise UnsupportedModelError(
            f"{builder.model_class.__name__} cannot be built from its own config with every default"
            f" written out: {built.reason}. Nothing was changed."
        )
    return built


def _shorten(changes: Changes, layers: nn.Module, keep: Sequence[int]) -> None:
    modules = list(layers._modules.values())
    kept = {str(new): modules[number] for new, number in enumerate(keep)}
    changes.set(layers, "_modules", kept)


def _entries_kept(
    model: PreTrainedModel, old: dict[str, Any], new: dict[str, Any], keep: Sequence[int]
) -> list[tuple[Any, dict[int, dict[str, Any]]]]:
    """Return each config whose per-layer entries change, with the remaining entries."""
    changed: list[tuple[Any, dict[int, dict[str, Any]]]] = []
    for path, config in config_nodes(model.config):
        field = (*path, KEY)
        if value_at(old, field) != value_at(new, field):
            entries = entries_of(config)
            changed.append((config, {place: entries[n] for place, n in enumerate(keep)}))
    return changed


@dataclass(frozen=True, repr=False)
class DroppedLayers(Report):
    """The layers that were removed from a model; ``str`` gives a few lines of text.

    Attributes:
        layers: name of the layer list.
        dropped: old numbers of the removed layers.
        kept: old numbers of the remaining layers; the first is layer 0 now.
        fields: config field -> (old value, new value).
        parameters: number of parameters before and after.
        influence: how much each layer changed the hidden states: 1 - cosine of its input and
            output, mean over tokens. Empty if not measured.
        refits: refitted weight -> how much it makes up for of what the dropped layers behind it
            added to the hidden states: R² on held-out data, 1 is all.
        proof: what the config was compared with.
        notes: what else the user should know.
    """

    layers: str
    dropped: tuple[int, ...]
    kept: tuple[int, ...]
    fields: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    parameters: tuple[int, int] = (0, 0)
    influence: tuple[float, ...] = ()
    refits: Mapping[str, float] = field(default_factory=dict)
    proof: str = ""
    notes: Sequence[str] = ()
    most_lines = MOST_LINES

    def title(self) -> str:
        """Return which layers were removed."""
        total = len(self.dropped) + len(self.kept)
        of = {number: f": influence {value:.3f}" for number, value in enumerate(self.influence)}
        went = ", ".join(f"{number}{of.get(number, '')}" for number in self.dropped)
        return f"{self.layers}: {len(self.dropped)} of {total} layers dropped ({went})"

    def lines(self) -> Iterator[str]:
        """Yield the changes of config and parameters, and the notes."""
        before, after = self.parameters
        changes = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in self.fields.items())
        yield f"  {changes or 'no config field changes'}"
        yield f"  parameters {before:,} -> {after:,} ({after / max(1, before):.1%}); {self.proof}"
        for name, explained in self.refits.items():
            yield f"  {name} is refitted, and makes up for {explained:.0%} of what was dropped (R²)"
        yield from (f"  note: {note}" for note in self.notes)


_TWO_TOKENS: dict[str, Any] = {
    "use_cache": True,
    "do_sample": False,
    "min_new_tokens": 2,
    "max_new_tokens": 2,
    "pad_token_id": 0,
}
_TOLERANCE = 16  # times the dtype's epsilon: the same operations run in the same order


class OutputsWithout:
    """Outputs of a whole model on small inputs while some of its layers pass on their input."""

    def __init__(
        self, model: nn.Module, full: nn.Module, layers: Sequence[nn.Module], dropped: Sequence[int]
    ):
        self._model: Any = model
        self._total = len(layers)
        self._inputs: dict[str, Any] | Refusal
        try:
            with torch.no_grad(), same_random_state():
                self._inputs = example_inputs(model, find_recipe(full))
        except Exception as error:  # it runs parts of the model
            raise_shortage(error)
            self._inputs = Refusal(in_one_line(error))
        with handed_on(layers) as handed:
            self._whole = self._run()
            text = text_inputs(model) if isinstance(self._whole, Refusal) else None
            if text is not None:  # with some configs' sizes, no image fits the text
                self._inputs = text
                self._whole = self._run()
        self._expected = self._run([layers[number] for number in dropped], handed)
        self._failing = self._failures()
        self.notes: list[str] = []

    def _run(
        self, passing: Sequence[nn.Module] = (), handed: Mapping[int, Argument] | None = None
    ) -> dict[str, Tensor] | Refusal:
        """Return the outputs by name while the layers ``passing`` pass on their input."""
        if isinstance(self._inputs, Refusal):
            return self._inputs
        try:
            with undisturbed(self._model), without_layers(passing, handed) as impossible:
                result = self._in_its_dtype(self._inputs)
        except Exception as error:  # a class that the library cannot feed may raise anything
            raise_shortage(error)
            return Refusal(in_one_line(error))
        if impossible:
            raise ConfigSyncError(
                f"the layer {impossible[0]} cannot be dropped: its output has another shape than "
                "its input. Drop other layers. Nothing was changed."
            )
        return dict(tensors_by_name(result, self._total))

    def _in_its_dtype(self, inputs: Mapping[str, Any]) -> Any:
        if torch.float64 in {parameter.dtype for parameter in self._model.parameters()}:
            # a class may cast activations to float32, which do not multiply with float64 weights;
            # another insists on float32 there (ImageGPT)
            with suppress(Exception), AllFloat64():
                return self._model(**inputs)
        return self._model(**inputs)

    def _failures(self) -> dict[str, str]:
        """Return what the model cannot do with a cache, ``generate`` or ``run`` -> why."""
        inputs = self._inputs
        if isinstance(inputs, Refusal):
            return {}
        calls: dict[str, Callable[..., Any]] = {}
        if getattr(self._model, "can_generate", bool)():
            calls["generate"] = functools.partial(self._model.generate, **_TWO_TOKENS)
        if any(getattr(node, "use_cache", False) for _, node in config_nodes(self._model.config)):
            calls["run"] = functools.partial(self._model, use_cache=True)
        failures: dict[str, str] = {}
        for what, call in calls.items():
            left_out = ("use_", "decoder") if what == "generate" else ("use_",)
            given = {k: v for k, v in inputs.items() if not k.startswith(left_out)}
            try:
                with undisturbed(self._model), quiet_transformers(logging.CRITICAL):
                    call(**given)
            except Exception as error:  # as in a forward pass
                raise_shortage(error)
                failures[what] = in_one_line(error)
        return failures

    def compare(self, layers: str) -> str:
        """Say what was compared, once the layers are removed; raise if the outputs differ."""
        expected, now = self._expected, self._run()
        if isinstance(expected, Refusal):
            return (
                f"outputs were not compared, because no small inputs were found: {expected.reason}"
            )
        if isinstance(now, Refusal):
            raise ConfigSyncError(
                f"{type(self._model).__name__} does not run without these layers of {layers}: "
                f"{now.reason}. Nothing was changed."
            )
        failing = {k: why for k, why in self._failures().items() if k not in self._failing}
        if "run" in failing:
            raise ConfigSyncError(
                f"{type(self._model).__name__} without these layers of {layers} fails with the "
                f"cache that it makes by default: {failing['run'].rstrip('.')}. Keep at least one "
                "layer of each kind. Nothing was changed."
            )
        if "generate" in failing:
            self.notes.append(
                "the model no longer generates with a cache, because the class makes the cache for "
                f"another number of layers ({failing['generate']}). Pass use_cache=False to "
                "generate(), or drop as many layers from the other list of layers"
            )
        for key, value in expected.items():
            error = _relative_error(value, now.get(key))
            if not error <= _TOLERANCE * torch.finfo(value.dtype).eps:
                raise ConfigSyncError(
                    f"{type(self._model).__name__} without these layers of {layers} does not "
                    f"compute the same as when these layers pass their input on unchanged: {key} "
                    f"differs by {error:.1e}. A part after these layers depends on their number or "
                    "position. Drop other layers; the last layers often work. Nothing was changed."
                )
        whole = {} if isinstance(self._whole, Refusal) else self._whole
        if all(key in whole and torch.equal(whole[key], v) for key, v in expected.items()):
            return (
                "its outputs are unchanged, but on small inputs no output depends on these layers"
            )
        return (
            "its outputs equal those of the original whose dropped layers pass their input on "
            "unchanged"
        )


def tensors_by_name(output: Any, layers: int, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield an output's floating-point tensors by name; tuple items by index."""
    if isinstance(output, Tensor) and output.is_floating_point():
        yield name or "output", output.detach().clone()
    elif isinstance(output, Mapping):
        for key, item in output.items():
            # a tuple with one item per layer (hidden states, attentions) is left out
            if not (isinstance(item, tuple) and 0 <= len(item) - layers <= 1):
                yield from tensors_by_name(item, layers, ".".join(filter(None, (name, str(key)))))
    elif isinstance(output, (tuple, list)):
        for place, item in enumerate(output):
            yield from tensors_by_name(item, layers, f"{name}[{place}]")


def _relative_error(before: Tensor, after: Tensor | None) -> float:
    if after is None or after.shape != before.shape:
        return float("inf")
    before, after = (torch.nan_to_num(unmasked(value.double())) for value in (before, after))
    return float((after - before).norm()) / (float(before.norm()) or 1.0)
