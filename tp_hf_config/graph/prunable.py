"""Which widths of a model can be pruned: the proved groups of each config field, or why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from ..arguments import check_arguments
from ..errors import listed
from ..fieldmap.field_map import FieldMap
from ..fieldmap.learn_field_map import map_of
from ..fieldmap.model_view import by_layers, view_of
from ..forward.run_recipe import MakeInputs
from ..model.build import Refusal, module_of
from ..model.config_json import FieldPath, field_name
from ..model.disk_cache import VARIABLE
from ..model.layer_entries import name_in_all_layers
from ..model.surroundings import ONE_AT_A_TIME, plain_autograd, same_random_state
from ..model.tensors import parameter_names, tensor
from ..reports import Report, Rows, html_table, short
from ..twin.find_groups import with_single_positions
from ..twin.layout import Finding, UnitLayout
from ..twin.tiny.tiny_model import TinyModel
from .experiments import experiments_of
from .full_size import Group, expand
from .rebuild import meta_copy_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_FROM_CACHE = f"from the cache of an earlier run ({VARIABLE}=off repeats the experiments)"
_HEAD = ("config field", "units", "groups", "layers", "parameters a unit", "proof")


@dataclass(frozen=True)
class Width:
    """A config field, or several joint ones, with its groups or the reason why it cannot be pruned.

    Attributes:
        fields: the field, or the joint fields.
        groups: dependency groups, proved on the tiny model and carried over to full size.
        units: number of units; 0 if the width cannot be pruned.
        layers: number of the model's layers with tensor dims in the groups.
        parameters: parameters that one unit holds in all groups.
        reason: why the width cannot be pruned; ``None`` if it can.
        unobserved_parameters: parameters that no output depends on. They lose the same units as the
            residual stream, which no experiment can show.
        outward: True if an output of the model has this width, so that its reader has to be pruned
            too.
        encoder_states: inputs that lose the same units. The encoder outside the model that computes
            them has to be pruned too.
    """

    fields: tuple[FieldPath, ...]
    groups: tuple[Group, ...] = ()
    units: int = 0
    layers: int = 0
    parameters: int = 0
    reason: str | None = None
    unobserved_parameters: tuple[str, ...] = ()
    outward: bool = False
    encoder_states: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the fields, as in a config (``text_config.hidden_size``)."""
        return tuple(field_name(field) for field in self.fields)

    @property
    def name(self) -> str:
        """Names of the fields, joined by ``" + "``."""
        return " + ".join(self.names)

    def __repr__(self) -> str:
        groups = f"{len(self.groups)} group{'' if len(self.groups) == 1 else 's'}"
        proved = f"{self.units:,} units in {groups}, proved"
        return short(self, f"{self.name}: {self.reason or proved}")

    def _repr_html_(self) -> str:
        return html_table([_HEAD, _row(self)])

    def to_dict(self) -> dict[str, Any]:
        """Return the width as a dict for ``json.dumps``."""
        return {
            "fields": list(self.names),
            "units": self.units,
            "groups": len(self.groups),
            "layers": self.layers,
            "parameters_per_unit": self.parameters,
            "reason": self.reason,
            "inputs": list(self.encoder_states),
        }


def _row(width: Width) -> tuple[str, ...]:
    numbers = (width.units, len(width.groups), width.layers, width.parameters)
    shown = [f"{n:,}" if width.reason is None else "" for n in numbers]
    proved = "units permuted: same outputs" + note_on_unobserved(width.unobserved_parameters)
    return (width.name, *shown, width.reason or proved + note_on_states(width.encoder_states))


def _row_of(name: str, widths: Sequence[Width]) -> tuple[str, ...]:
    """Return the table row of a width; several layers' widths become ranges."""
    rows = list(map(_row, widths))
    if len(rows) == 1:
        return rows[0]
    units = [width.units for width in widths]
    low, high = rows[units.index(min(units))][1:5], rows[units.index(max(units))][1:5]
    numbers = (a if a == b else f"{a}..{b}" for a, b in zip(low, high, strict=True))
    return (f"{name} (of {len(rows)} layers)", *numbers, rows[0][5])


@dataclass(frozen=True, repr=False)
class Prunable(Report):
    """The widths of one model; prints as a table.

    Attributes:
        model: name of the class.
        widths: one for each config field, or joint fields.
        cached: True if the experiments were read from the disk cache.
    """

    model: str
    widths: tuple[Width, ...]
    cached: bool = False

    def title(self) -> str:
        """Return the name of the class."""
        return self.model

    def rows(self) -> Rows:
        """Return one row per width; per-layer widths of one field share a row."""
        alike: dict[tuple[Any, ...], list[Width]] = {}
        for width in self.widths:
            alike.setdefault((name_in_all_layers(width.name), width.reason), []).append(width)
        return [_HEAD, *(_row_of(name, widths) for (name, _), widths in alike.items())]

    def lines(self) -> list[str]:
        """Return a line about the disk cache if it was used."""
        return [_FROM_CACHE] if self.cached else []

    def __repr__(self) -> str:
        proved = sum(width.reason is None for width in self.widths)
        return short(self, f"{self.model}: {proved} of {len(self.widths)} widths proved")


@check_arguments
def prunable(
    model_or_config: nn.Module | PreTrainedConfig,
    *,
    model_class: type[PreTrainedModel] | None = None,
    make_inputs: MakeInputs | None = None,
) -> Prunable:
    """Find out what can be pruned in a model.

    Experiments run on a tiny model of the class with random weights, so the cost does not grow with
    the model.

    Args:
        model_or_config: a model (it may be on the meta device), or a config.
        model_class: the class to build from a config; default: as in :func:`~tp_hf_config.plan`.
        make_inputs: a function of a config that returns the keyword arguments of one forward pass,
            as a dict. Needed for a class whose inputs the library cannot make. It is also called
            with smaller configs of the class, so every size has to come from the config. Two
            samples that differ are best, ``(2, ...)``. Floating-point tensors are cast to the
            model's dtype and device. With it, nothing is cached on disk.

    Returns:
        One width for each config field, or joint fields, with its groups or a reason.

    Raises:
        UnsupportedModelError: there is not exactly one Hugging Face model that is supported, the
            config builds no model, or ``make_inputs`` raises or returns unusable inputs.
        TypeError: ``model_or_config`` is neither a module nor a config.
    """
    model = meta_copy_of(module_of(model_or_config, model_class))
    view = view_of(model, make_inputs, weights=False)
    widths = widths_of(view.model, view.field_map)
    return Prunable(type(view.model).__name__, widths, experiments_of(view.field_map).cached)


def widths_of(
    model: PreTrainedModel,
    field_map: FieldMap | None = None,
    tiny: TinyModel | None = None,  # the model itself if it is tiny
    fields: tuple[FieldPath, ...] = (),  # if each can be pruned alone, others may be missing
) -> tuple[Width, ...]:
    """Return the widths of a model; the experiments run once per class and config."""
    field_map = field_map or map_of(model, how=by_layers)
    experiments = experiments_of(field_map, tiny, fields)
    if isinstance(experiments.tiny, Refusal):
        return tuple(Width((field,), reason=experiments.tiny.reason) for field in field_map.values)
    names = tuple(map(tuple, parameter_names(model).values()))
    with ONE_AT_A_TIME:
        if names not in experiments.widths:
            with same_random_state(), plain_autograd():  # may repeat a search for layouts
                widths = tuple(
                    _width(finding, experiments.tiny, field_map, model)
                    for finding in experiments.findings
                )
            experiments.widths[names] = widths + _only_in_proportion(field_map)
        result: tuple[Width, ...] = experiments.widths[names]
        return result


def _only_in_proportion(field_map: FieldMap) -> tuple[Width, ...]:
    """Return refused widths for fields that the class only lets change together with others."""
    return tuple(
        Width(
            (field,),
            reason=f"{field_map.builder.config_class.__name__} accepts another value of it only "
            "together with another value of "
            f"{' or '.join(field_name(other) for other in others)}",
        )
        for field, others in field_map.ratio_partners.items()
        if field not in field_map.values
    )


def _width(finding: Finding, tiny: TinyModel, field_map: FieldMap, model: PreTrainedModel) -> Width:
    """Return a finding as a width of the real model, refused if it does not carry over."""
    if all(field_map.values.get(field) == 1 for field in finding.fields):
        return Width(finding.fields, reason="it is 1 and cannot be smaller")
    if finding.reason is not None:
        return Width(finding.fields, reason=finding.reason)
    groups = expand(finding, tiny, field_map, model)
    if isinstance(groups, Refusal) and (finer := with_single_positions(tiny, finding)) is not None:
        finer_groups = expand(finer, tiny, field_map, model)
        groups = groups if isinstance(finer_groups, Refusal) else finer_groups
    if isinstance(groups, Refusal):
        return Width(finding.fields, reason=groups.reason)
    if not groups:
        return Width(finding.fields, reason="the full-size model has no group of this width")
    return Width(
        fields=finding.fields,
        groups=_limited(groups, finding.minimum, model),
        units=groups[0].count.units // groups[0].count.per_field_unit,
        layers=len({dim.layer for group in groups for dim in group.dims}),
        parameters=_parameters_per_unit(groups, model),
        unobserved_parameters=finding.unobserved_parameters,
        outward=finding.outward,
        encoder_states=finding.encoder_states,
    )


def _limited(groups: Sequence[Group], minimum: int, model: nn.Module) -> tuple[Group, ...]:
    """Return a width's groups with what limits their unit counts."""
    channels = Counter[tuple[str, int]]()  # per unit; several groups may cut one dimension
    for dim in (dim for group in groups for dim in group.dims):
        channels[dim.place] += dim.layout.parts * dim.layout.run
    result = []
    for group in groups:
        layers = {(tensor(model, m.name).shape[m.dim], channels[m.place]) for m in group.dims}
        count = replace(group.count, minimum=minimum, layers=tuple(sorted(layers)))
        result.append(replace(group, count=count))
    return tuple(result)


def note_on_unobserved(names: Sequence[str]) -> str:
    if not names:
        return ""
    return f"; cut in the same way, though no output depends on it: {listed(names)}"


def note_on_states(names: Iterable[str]) -> str:
    return "".join(
        f"; remove the same channels from the input {name}" for name in dict.fromkeys(names)
    )


def _parameters_per_unit(groups: Sequence[Group], model: nn.Module) -> int:
    """Return how many parameters one field unit holds in all groups; tied ones count once."""
    total = 0
    counted: set[tuple[int, int, UnitLayout]] = set()
    for group in groups:
        for dim in group.dims:
            parameter = tensor(model, dim.name)
            place = id(parameter), dim.dim, dim.layout  # fused q, k and v have a layout each
            if place not in counted:
                counted.add(place)
                share = dim.layout.parts * dim.layout.run * group.count.per_field_unit
                total += parameter.numel() // parameter.shape[dim.dim] * share
    return total
