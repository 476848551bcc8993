"""Which widths of a model can be pruned: the proved groups of each config field, or why not."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..fieldmap.field_map import FieldMap, map_of
from ..fieldmap.legal_values import straying, vanishing
from ..fieldmap.solve.explain import some
from ..fieldmap.unit_shares import units_of
from ..model.build import Refusal
from ..model.config_json import FieldPath, field_name
from ..model.from_config import model_of
from ..model.shapes import shapes
from ..model.surroundings import one_thread
from ..model.tensors import parameter_names, tensor
from ..notebook import page, short, table
from ..schema import dated
from ..twin.find_groups import find_groups, in_positions
from ..twin.group import Finding
from ..twin.layout import TensorDim, UnitLayout
from ..twin.tiny.tiny_model import TinyModel, tiny_model
from ..twin.twin_test import TwinTest
from .full_size import Group, expand

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_MOST_BUILDS = 64
_HEAD = ("config field", "units", "groups", "layers", "parameters a unit", "proof")


@dataclass(frozen=True)
class Width:
    """One config field, or joint fields, with its groups, or the reason why it cannot be pruned.

    Attributes:
        fields: the field, or the joint fields.
        groups: the dependency groups, proved on the tiny model and carried over to full size.
        units: how many units the width has; 0 if it cannot be pruned.
        layers: how many layers of the model have tensor dims in its groups.
        parameters: how many parameters one unit holds in all of the groups.
        reason: why it cannot be pruned; ``None`` if it can.
        disproved: an experiment ruled it out (it told its units apart, say); groups found in any
            other way would be wrong too.
        tried: experiments were made with the class; False if its tiny model does not run.
        along: parameters that no output depends on; they lose the same units as the residual
            stream, which no experiment can show.
        outward: an output of the model is as wide, so whatever reads it has to be pruned alike.
        handed: inputs that lose the same units: encoder states. The encoder outside the model that
            makes them has to be pruned alike.
    """

    fields: tuple[FieldPath, ...]
    groups: tuple[Group, ...] = ()
    units: int = 0
    layers: int = 0
    parameters: int = 0
    reason: str | None = None
    disproved: bool = False
    tried: bool = True
    along: tuple[str, ...] = ()
    outward: bool = False
    handed: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the fields, as people write them."""
        return tuple(field_name(field) for field in self.fields)

    @property
    def name(self) -> str:
        """The names of the fields in one text, joined by ``" + "``."""
        return " + ".join(self.names)

    def __repr__(self) -> str:
        groups = f"{len(self.groups)} group{'' if len(self.groups) == 1 else 's'}"
        proved = f"{self.units:,} units in {groups}, proved"
        return short(self, f"{self.name}: {self.reason or proved}")

    def _repr_html_(self) -> str:
        return table(_HEAD, [_row(self)])

    def to_dict(self) -> dict[str, Any]:
        """Return the width as a dict for ``json.dumps``."""
        return {
            "fields": list(self.names),
            "units": self.units,
            "groups": len(self.groups),
            "layers": self.layers,
            "parameters_per_unit": self.parameters,
            "reason": self.reason,
            "inputs": list(self.handed),
        }


def _row(width: Width) -> tuple[str, ...]:
    """Return the width's row of the table, in the columns of ``_HEAD``."""
    numbers = (width.units, len(width.groups), width.layers, width.parameters)
    shown = [f"{n:,}" if width.reason is None else "" for n in numbers]
    proved = "units permuted: same outputs" + said_along(width.along)
    return (width.name, *shown, width.reason or proved + said_handed(width.handed))


@dataclass(frozen=True)
class _Experiments:
    """What experiments with one class and config found.

    Attributes:
        tiny: the tiny model, or the class's refusal to run at tiny widths.
        findings: the groups of each width in the tiny model, or why it cannot be pruned.
        widths: the findings carried over to full size, by the names of the model's parameters
            (they show its ties).
    """

    tiny: TinyModel | Refusal
    findings: tuple[Finding, ...]
    widths: dict[Any, tuple[Width, ...]] = dataclasses.field(default_factory=dict)


_experiments: weakref.WeakKeyDictionary[FieldMap, _Experiments] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Prunable:
    """The widths of one model; prints as a table."""

    model: str
    widths: tuple[Width, ...]

    def _rows(self) -> list[tuple[str, ...]]:
        """Return the head of the table and one row for each width."""
        return [_HEAD, *map(_row, self.widths)]

    def __repr__(self) -> str:
        proved = sum(width.reason is None for width in self.widths)
        return short(self, f"{self.model}: {proved} of {len(self.widths)} widths proved")

    def _repr_html_(self) -> str:
        head, *rows = self._rows()
        return page(self.model, table(head, rows))

    def __str__(self) -> str:
        rows = self._rows()
        sizes = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(
                [row[0].ljust(sizes[0]), *(row[i].rjust(sizes[i]) for i in range(1, 5)), row[5]]
            )
            for row in rows
        ]
        return "\n".join([self.model, *lines])

    def __rich__(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        head, *rows = self._rows()
        table = Table(title=self.model)
        for name in head:
            left = name in (head[0], head[-1])
            table.add_column(name, justify="left" if left else "right", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return the table as a dict for ``json.dumps``, with schema and package versions."""
        return dated({"model": self.model, "widths": [width.to_dict() for width in self.widths]})


def prunable(
    model_or_config: nn.Module | PreTrainedConfig,
    *,
    model_class: type[PreTrainedModel] | None = None,
) -> Prunable:
    """Return what can be pruned in a model through the graph made from its config.

    Experiments run on a tiny model of the class with random weights (see
    :mod:`tp_hf_config.twin`), so the cost does not grow with the model.

    Args:
        model_or_config: a model (the meta device will do), or a config.
        model_class: the class to build from a config; default: as in :func:`~tp_hf_config.plan`.

    Returns:
        The widths: one for each config field, or joint fields, with its groups or a reason.

    Raises:
        UnsupportedModelError: there is no single Hugging Face model that can be followed, or the
            config builds none.
        TypeError: ``model_or_config`` is neither a module nor a config.
    """
    model = model_of(model_or_config, model_class)
    return Prunable(type(model).__name__, widths_of(model))


def widths_of(
    model: PreTrainedModel, field_map: FieldMap | None = None, made: TinyModel | None = None
) -> tuple[Width, ...]:
    """Return the widths of a model; the experiments run once per class and config.

    Args:
        model: the live model.
        field_map: its field map, if it was looked up already.
        made: its tiny model, if the model is one itself; else it is built.
    """
    field_map = field_map or map_of(model)
    if field_map not in _experiments:
        with one_thread():
            tiny = made or tiny_model(field_map)
            findings = [] if isinstance(tiny, Refusal) else find_groups(tiny)
            full = field_map if isinstance(tiny, Refusal) else tiny.full
            checked = (_apart(_sayable(finding, field_map), findings, full) for finding in findings)
            _experiments[field_map] = _Experiments(tiny, tuple(checked))
    experiments = _experiments[field_map]
    if isinstance(experiments.tiny, Refusal):
        return tuple(
            Width((field,), reason=experiments.tiny.reason, tried=False)
            for field in field_map.values
        )
    names = tuple(map(tuple, parameter_names(model).values()))
    if names not in experiments.widths:
        widths = tuple(_width(f, experiments.tiny, field_map, model) for f in experiments.findings)
        experiments.widths[names] = widths + _bound(field_map)
    return experiments.widths[names]


def _bound(field_map: FieldMap) -> tuple[Width, ...]:
    """Return the fields of which the class takes no other value alone, as widths with a reason."""
    return tuple(
        Width(
            (field,),
            reason=f"{field_map.builder.config_class.__name__} takes no other value of it alone, "
            f"only with {' or '.join(field_name(other) for other in others)}",
            disproved=True,
        )
        for field, others in field_map.bound.items()
        if field not in field_map.values
    )


def single_positions(group: Group, field_map: FieldMap) -> bool:
    """True if single positions of a group's units are interchangeable, not just whole units.

    If a class makes an inner width four times the hidden size, a unit of the field is four
    channels of it, and a trace may cut them one by one.

    Args:
        group: a proved group of the real model; its kind is tested on the tiny model.
        field_map: the real model's, with which :func:`widths_of` has run.
    """
    done = _experiments[field_map]
    canonical = field_map.depth.canonical
    group_dims = {(canonical(member.name), member.dim) for member in group.dims}
    inputs = set() if isinstance(done.tiny, Refusal) else done.tiny.states.keys()
    for tiny in (tiny for f in done.findings if not f.disproved for tiny in f.groups):
        sizes = {dim.layout.parts * dim.layout.run for dim in tiny.dims}
        tiny_dims = {
            (field_map.depth.first(d.name), d.dim) for d in tiny.dims if d.name not in inputs
        }
        fused = len({(dim.name, dim.dim) for dim in tiny.dims}) < len(tiny.dims)
        fits = tiny.fields == group.fields and tiny_dims <= group_dims and not fused
        if isinstance(done.tiny, Refusal) or not fits or len(sizes) > 1:
            continue
        count = tiny.units * sizes.pop()
        dims = [
            TensorDim(dim.name, dim.dim, UnitLayout(offset=dim.layout.offset)) for dim in tiny.dims
        ]
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
        with one_thread():
            return TwinTest(
                done.tiny.model, done.tiny.inputs, count, watched=done.tiny.watched
            ).proves(dims, order)
    return False


def _width(finding: Finding, tiny: TinyModel, field_map: FieldMap, model: PreTrainedModel) -> Width:
    """Return a finding as a width of the real model, with a reason if it cannot be pruned."""
    if all(field_map.values.get(field) == 1 for field in finding.fields):
        return Width(finding.fields, reason="it is 1: nothing of it can go", disproved=True)
    if finding.reason is not None:
        return Width(finding.fields, reason=finding.reason, disproved=finding.disproved)
    groups = expand(finding, tiny, field_map, model)
    if isinstance(groups, str) and (finer := in_positions(tiny, finding)) is not None:
        finer_groups = expand(finer, tiny, field_map, model)
        groups = groups if isinstance(finer_groups, str) else finer_groups
    if isinstance(groups, str):
        return Width(finding.fields, reason=groups)
    if not groups:
        return Width(finding.fields, reason="the real model has no such group")
    return Width(
        fields=finding.fields,
        groups=tuple(_with_minimum(group, finding.minimum) for group in groups),
        units=groups[0].count.units // groups[0].count.per_field_unit,
        layers=len({m.name.rpartition(".")[0] for group in groups for m in group.dims}),
        parameters=_parameters_per_unit(groups, model),
        along=finding.along,
        outward=finding.outward,
        handed=finding.handed,
    )


def _with_minimum(group: Group, minimum: int) -> Group:
    """Return the group with the fewest units with which the class runs."""
    return replace(group, count=replace(group.count, minimum=minimum))


def said_along(names: Sequence[str]) -> str:
    """Return a text to append that names parameters no output depends on; empty for none."""
    if not names:
        return ""
    return f"; no output depends on {some(names)}, cut alike"


def said_handed(names: Iterable[str]) -> str:
    """Return a text to append that names inputs which have to lose the same channels."""
    return "".join(f"; {name} has to lose the same channels" for name in dict.fromkeys(names))


def _sayable(finding: Finding, field_map: FieldMap) -> Finding:
    """Return the finding, refused if less of it makes the class build what pruning cannot leave.

    The class is built with a quarter less and with half: some count may become 0, or a dimension
    that is in no group may change. If it refuses both, other unit counts are tried, up to
    ``_MOST_BUILDS`` in all; if it takes no other number, the finding is refused too.
    """
    if finding.reason is not None or not set(finding.fields) <= field_map.values.keys():
        return finding
    held = {(dim.name, dim.dim) for group in finding.groups for dim in group.dims}
    units = units_of(field_map, finding.fields)
    reason, taken = "", False
    unit_counts = dict.fromkeys((units - units // 4, units - units // 2, *range(units - 1, 0, -1)))
    for builds, units_left in enumerate(islice(unit_counts, _MOST_BUILDS)):
        if taken and builds > 1:
            break
        values = {field: field_map.values[field] // units * units_left for field in finding.fields}
        smaller = field_map.build_at(values)
        if isinstance(smaller, Refusal):
            reason = f"the class takes no other number: {smaller.reason}"
            continue
        misfit = vanishing(field_map, smaller) or straying(field_map, values, smaller, held)
        if misfit is not None:
            return Finding(finding.fields, reason=misfit, disproved=True)
        taken |= shapes(smaller) != field_map.shapes
    return finding if taken or not reason else Finding(finding.fields, reason=reason)


def _apart(finding: Finding, others: Sequence[Finding], full: FieldMap) -> Finding:
    """Return the finding, refused if an unobserved part of the model is as wide and may read it.

    Widths are compared at full size: in a tiny model, head counts equal other numbers by chance
    (Chameleon). Qwen2-VL's ``vision_config.hidden_size`` has to be the text's, which text alone
    cannot show.

    Args:
        finding: the finding to check.
        others: all findings of the model.
        full: the field map at full size.
    """
    unobserved = [field for other in others if other.unseen for field in other.fields]
    for field in unobserved:
        if field in finding.fields:
            continue  # all of it was observed, or the finding would have a reason already
        if finding.reason is None and any(
            full.values.get(field) == full.values.get(own) for own in finding.fields
        ):
            reason = (
                f"{field_name(field)} is as wide, and its part of the model was not seen to run"
            )
            return Finding(finding.fields, reason=reason)
    return finding


def _parameters_per_unit(groups: Sequence[Group], model: nn.Module) -> int:
    """Return how many parameters one field unit holds in all groups; tied ones count once."""
    total = 0
    counted: set[tuple[int, int]] = set()
    for group in groups:
        for dim in group.dims:
            parameter = tensor(model, dim.name)
            if (id(parameter), dim.dim) not in counted:
                counted.add((id(parameter), dim.dim))
                share = dim.layout.parts * dim.layout.run * group.count.per_field_unit
                total += parameter.numel() // parameter.shape[dim.dim] * share
    return total
