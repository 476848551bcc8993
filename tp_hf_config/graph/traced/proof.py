"""Put the groups of Torch-Pruning's trace to the same proof as those made from the config.

Experiments on the tiny model have shown which tensor dims lose the same units, and where the units
stand along them.  A traced group is right if all that it cuts is whole units of proved groups, the
same units in every tensor dim of each group.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import UnsupportedModelError
from ...fieldmap.field_map import FieldMap
from ...fieldmap.solve.explain import some
from ...forward.encoder_states import states_of
from ...model.config_json import FieldPath, field_name
from ...model.tensors import parameter_names, saved_buffers
from ...twin.layout import UnitLayout
from ..full_size import Group
from ..prunable import single_positions, widths_of
from .groups import UNTOUCHED, Key, TracedGroup, traced_groups

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_traced(pruner: Any, model: PreTrainedModel, field_map: FieldMap) -> list[str]:
    """Raise if a pruner is going to prune a traced group that is wrong.

    Args:
        pruner: the pruner, after its constructor.
        model: the Hugging Face model that it prunes.
        field_map: the model's field map.

    Returns:
        Notes on groups for which no experiment could be made: they are left to the trace.

    Raises:
        UnsupportedModelError: a group is wrong, or only a part of what a field sets would be cut;
            nothing was pruned.
    """
    proof = TracedProof(model, field_map)
    unproved: dict[str, list[str]] = {}
    groups = list(traced_groups(pruner))
    for group in groups:
        reason, notes = proof.look_at(group)
        if reason is not None:
            raise UnsupportedModelError(
                f"Torch-Pruning's trace is wrong about the group that starts at {group.root}: "
                f"{reason}. Pruned like that, {type(model).__name__} would compute something else. "
                "Prune by groups that are proved, pruner_kwargs(model, graph='config'), or keep "
                "the layers of this one (ignored_layers=)."
            )
        for note in notes:
            unproved.setdefault(note, []).append(group.root)
    field, uncut = proof.left_out(groups)
    if uncut:
        raise UnsupportedModelError(
            f"Torch-Pruning's trace would cut only a part of what {field} sets: not "
            f"{some(uncut)}. No config of {type(model).__name__} could say what is left then. Keep "
            "the width: name others in pruner_kwargs(model, prune=...)."
        )
    return [f"traced, not proved: {some(roots)}: {note}" for note, roots in unproved.items()]


class TracedProof:
    """What experiments have shown about one model, asked about traced groups.

    Attributes:
        names: parameter -> the first of its names.
        widths: the model's widths.
        single: kind of group -> True if single positions of it may be cut.
        proved: proved groups, each with the unit layouts of its tensor dims.
        groups: tensor dim -> indices in ``proved`` of the groups that it is in.
    """

    def __init__(self, model: PreTrainedModel, field_map: FieldMap):
        self.model, self.field_map = model, field_map
        self.names = {parameter: names[0] for parameter, names in parameter_names(model).items()}
        self.widths = widths_of(model, field_map)
        named = dict(model.named_parameters(remove_duplicate=False))
        self.single: dict[frozenset[tuple[str, int]], bool] = {}
        self.groups: dict[Key, list[int]] = {}
        self.proved: list[tuple[Group, dict[Key, dict[UnitLayout, None]]]] = []
        # if several units go with one field unit (channels with whole heads), one traced group says
        # nothing by itself
        alone = [
            w for w in self.widths if all(group.count.per_field_unit == 1 for group in w.groups)
        ]
        for group in (group for width in alone for group in width.groups):
            layouts: dict[Key, dict[UnitLayout, None]] = {}
            for dim in (member for member in group.dims if member.name in named):  # not buffers
                layouts.setdefault((named[dim.name], dim.dim), {})[dim.layout] = None
            for key in layouts:
                self.groups.setdefault(key, []).append(len(self.proved))
            self.proved.append((group, layouts))

    def look_at(self, group: TracedGroup) -> tuple[str | None, list[str]]:
        """Judge a traced group.

        Returns:
            The reason why it is wrong, or ``None``; and notes on what of it cannot be judged.
        """
        notes = dict.fromkeys(group.notes)
        for labels in group.ways:
            cuts = {key: cut for key, cut in group.cuts(labels).items() if key[0] in self.names}
            touched = {number for key in cuts for number in self.groups.get(key, ())}
            reasons: dict[Key, str] = {}
            covered: dict[Key, Tensor] = {key: cut == UNTOUCHED for key, cut in cuts.items()}
            for number in sorted(touched):
                reason = self._fault(number, cuts, group)
                for key, layouts in self.proved[number][1].items():
                    if reason is not None:
                        reasons.setdefault(key, reason)
                    elif key in covered:
                        covered[key][
                            _table(layouts, self.proved[number][0].count.units).flatten()
                        ] = True
            for key in cuts:
                if key in self.groups and not bool(covered[key].all()):
                    name = self.names[key[0]]
                    return reasons.get(key, f"it cuts what is in no unit of {name}"), []
                if key not in self.groups:
                    reason, disproved = self._unproved(key)
                    if disproved:
                        return f"{self.names[key[0]]} follows {reason}", []
                    notes[reason] = None
        return None, list(notes)

    def left_out(self, groups: Sequence[TracedGroup]) -> tuple[str, list[str]]:
        """Return a field that is cut in only some tensor dims, and the names of the others.

        If some of them are proved, only those that read encoder states can be left out: no trace
        starts from an input.

        Returns:
            An empty field name and list if nothing is left out.
        """
        cut = {key for group in groups for key in group.pieces}
        for fields, reading in self._reading():
            proved_keys = {
                key for group, keys in self.proved if group.fields == fields for key in keys
            }
            if proved_keys & cut and not cut.intersection(reading):
                return field_name(fields[0]), [self.names[parameter] for parameter, _ in reading]
        opaque = {id(parameter) for group in groups for parameter in group.opaque}
        bare = self._bare_buffers()
        for parameter, dim in cut:
            if parameter not in self.names:
                continue
            setting = self.field_map.fields_of(self.names[parameter], dim)
            never_cut = {field: bare.get(field, []) for field in setting}
            proved = (parameter, dim) in self.groups
            uncut: dict[FieldPath, list[str]] = {
                field: [
                    name
                    for other, name in self.names.items()
                    for d in range(other.ndim)
                    if field in self.field_map.fields_of(name, d)
                    and (other, d) not in cut
                    and id(other) not in opaque
                ]
                for field in (() if proved else setting)
            }
            for missed in (never_cut, uncut):
                if missed and all(missed.values()):
                    field, names = min(missed.items(), key=lambda item: len(item[1]))
                    return field_name(field), names
        return "", []

    def _bare_buffers(self) -> dict[FieldPath, list[str]]:
        """Return field -> saved buffers in modules without parameters, which no trace ever cuts.

        The frozen batch norms of detectors have such buffers (RT-DETR, PP-DocLayout).
        """
        buffers_of: dict[FieldPath, list[str]] = {}
        for name, buffer in saved_buffers(self.model).items():
            module = self.model.get_submodule(name.rpartition(".")[0])
            if not module._parameters:
                for field in {
                    p for d in range(buffer.ndim) for p in self.field_map.fields_of(name, d)
                }:
                    buffers_of.setdefault(field, []).append(name)
        return buffers_of

    def _reading(self) -> Iterator[tuple[tuple[FieldPath, ...], list[Key]]]:
        """Yield the fields and tensor dims of each proved group that reads encoder states."""
        read = states_of(self.model, self.field_map.recipe.states)
        for group, keys in self.proved:
            members = {(dim.name, dim.dim) for dim in group.dims}
            if read is not None and (read.reader, read.dim) in members:
                yield group.fields, list(keys)

    def _fault(self, number: int, cuts: Mapping[Key, Tensor], traced: TracedGroup) -> str | None:
        """Return why what a traced group cuts is not whole units of a proved one, or None if it is.

        Args:
            number: the proved group's index in ``proved``.
            cuts: labels of all positions, as :meth:`TracedGroup.cuts` returns them.
            traced: the traced group.
        """
        group, layouts = self.proved[number]
        fields = " and ".join(field_name(field) for field in group.fields)
        opaque = {id(parameter) for parameter in traced.opaque}
        missing = [key for key in layouts if key not in cuts and id(key[0]) not in opaque]
        if missing:
            names = [self.names[parameter] for parameter, _ in missing]
            follows, is_not = ("follows", "is") if len(names) == 1 else ("follow", "are")
            return f"{some(names)} {follows} {fields} but {is_not} not in it"
        units: Tensor | None = None
        first = ""
        for key, unit_layouts in layouts.items():
            if key not in cuts:
                continue
            name = f"{self.names[key[0]]} (dimension {key[1]})"
            rows = cuts[key][_table(unit_layouts, group.count.units)]
            if bool((rows < 0).any() or (rows != rows[:, :1]).any()):
                if self._one_by_one(group, layouts, cuts):
                    return None
                return f"what it cuts together of {name} are no whole units of {fields}"
            if units is None:
                units, first = rows[:, 0], name
            elif not torch.equal(units, rows[:, 0]):
                return f"it cuts other units of {fields} from {name} than from {first}"
        if units is None or group.count.channel_groups == 1:
            return None
        by_channel_group = units.view(group.count.channel_groups, -1)
        sorted_units = by_channel_group.sort(dim=1).values
        if bool((sorted_units == sorted_units[0]).all()):
            return None
        if bool((by_channel_group != by_channel_group[:, :1]).any()):
            runs = group.count.channel_groups
            return f"it cuts different numbers of units from the {runs} runs of {fields}"
        return self._heads_fault(group, by_channel_group[:, 0], cuts)

    def _one_by_one(
        self,
        group: Group,
        layouts: Mapping[Key, Iterable[UnitLayout]],
        cuts: Mapping[Key, Tensor],
    ) -> bool:
        """True if single positions are cut, the same everywhere, and the class allows that."""
        places = {
            key: _table(unit_layouts, group.count.units).flatten()
            for key, unit_layouts in layouts.items()
        }
        rows = [cuts[key][place.sort().values] for key, place in places.items() if key in cuts]
        if any(not torch.equal(row, rows[0]) for row in rows) or bool((rows[0] < 0).any()):
            return False
        canonical = self.field_map.depth.canonical
        kind = frozenset((canonical(dim.name), dim.dim) for dim in group.dims)
        if kind not in self.single:
            self.single[kind] = single_positions(group, self.field_map)
        return self.single[kind]

    def _heads_fault(self, group: Group, heads: Tensor, cuts: Mapping[Key, Tensor]) -> str | None:
        """Return why whole heads cannot go like this, or None.

        Whole heads (all units of a channel group) have to go from every projection of an attention.

        Args:
            group: the proved group.
            heads: the label that each channel group is cut with (see :meth:`TracedGroup.cuts`).
            cuts: the labels of all positions, by parameter and dimension.
        """
        layers = {dim.name.rpartition(".")[0] for dim in group.dims}
        split = {
            name: splits
            for name, _ in self.model.named_modules()
            if (splits := self.field_map.splits_of(name))
        }
        parents = {name.rpartition(".")[0] for name in layers & split.keys()}
        if not parents:
            return f"it cuts whole runs of {field_name(group.fields[0])}"
        for name, splits in split.items():
            if name.rpartition(".")[0] not in parents:
                continue
            cut = cuts.get((self.model.get_parameter(f"{name}.weight"), 0))
            if cut is None or len(splits) > 1 or splits[0][0] != len(heads):
                same = False
            else:
                same = bool((cut.view(len(heads), -1) == heads[:, None]).all())
            if not same:
                return f"{name} does not lose the same heads as {min(layers & split.keys())}"
        return None

    def _unproved(self, key: Key) -> tuple[str, bool]:
        """Return why a tensor dim is in no proved group, and True if an experiment disproved it."""
        fields = self.field_map.fields_of(self.names[key[0]], key[1])
        fields |= {self.field_map.linked.get(field, field) for field in fields}
        refused = [w for w in self.widths if w.reason is not None and fields & set(w.fields)]
        refused.sort(key=lambda width: not width.disproved)
        if not refused:
            names = ", ".join(sorted(field_name(field) for field in fields)) or "no config field"
            return f"{names}: no experiments are made with it", False
        return f"{refused[0].name}: {refused[0].reason}", refused[0].disproved


@functools.lru_cache(maxsize=256)
def _positions(layout: UnitLayout, units: int) -> Tensor:
    """Return the positions of every unit, shape ``(units, positions per unit)``."""
    return layout.table(units)


def _table(layouts: Iterable[UnitLayout], units: int) -> Tensor:
    """Return the positions of every unit along a dimension; fused layers have a layout per part."""
    tables = [_positions(layout, units) for layout in layouts]
    return tables[0] if len(tables) == 1 else torch.cat(tables, dim=1)
