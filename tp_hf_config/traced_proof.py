"""Put the groups of Torch-Pruning's trace to the same proof as those made from the config.

Experiments on the tiny copy have shown which dimensions lose the same units, and where the units
stand (``offers``).  A traced group is right where all that it cuts is whole units of proved groups,
the same ones in every dimension of each.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import UnsupportedModelError
from .expand import WidthGroup
from .explain import some
from .learn import ConfigMap
from .offers import single_positions, widths_of
from .reference import FieldPath, field_name
from .states import states_of
from .ties import parameter_names, saved_buffers
from .traced_groups import UNTOUCHED, Key, TracedGroup, traced_groups
from .twins import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_traced(pruner: Any, model: PreTrainedModel, known: ConfigMap) -> list[str]:
    """Refuse a pruner that is going to prune a traced group which is not proved.

    Returns:
        Notes on groups for which no experiment could be made: they are left to the trace.

    Raises:
        UnsupportedModelError: a group is wrong; nothing was pruned.
    """
    proof = TracedProof(model, known)
    unproved: dict[str, list[str]] = {}
    groups = list(traced_groups(pruner))
    for group in groups:
        wrong, notes = proof.look_at(group)
        if wrong is not None:
            raise UnsupportedModelError(
                f"Torch-Pruning's trace is wrong about the group that starts at {group.root}: "
                f"{wrong}. Pruned like that, {type(model).__name__} would compute something else. "
                "Prune by groups that are proved, pruner_kwargs(model, graph='config'), or keep "
                "the layers of this one (ignored_layers=)."
            )
        for note in notes:
            unproved.setdefault(note, []).append(group.root)
    field, left = proof.left_out(groups)
    if left:
        raise UnsupportedModelError(
            f"Torch-Pruning's trace would cut only a part of what {field} sets: not "
            f"{some(left)}. No config of {type(model).__name__} could say what is left then. Keep "
            "the width: name others in pruner_kwargs(model, prune=...)."
        )
    return [f"traced, not proved: {some(roots)}: {note}" for note, roots in unproved.items()]


class TracedProof:
    """What experiments have shown about one model, asked about traced groups."""

    def __init__(self, model: PreTrainedModel, known: ConfigMap):
        self.model, self.known = model, known
        self.names = {parameter: names[0] for parameter, names in parameter_names(model).items()}
        self.widths = widths_of(model, known)
        named = dict(model.named_parameters(remove_duplicate=False))
        self.single: dict[frozenset[tuple[str, int]], bool] = {}  # kinds of groups: one by one
        self.groups: dict[Key, list[int]] = {}  # the proved groups that a dimension is in
        self.proved: list[tuple[WidthGroup, dict[Key, dict[Layout, None]]]] = []
        # where units go with others of another grain (channels with whole heads), one traced group
        # alone says nothing
        alone = [w for w in self.widths if all(group.grain == 1 for group in w.groups)]
        for group in (group for width in alone for group in width.groups):
            layouts: dict[Key, dict[Layout, None]] = {}
            for member in (one for one in group.members if one.name in named):  # not buffers
                layouts.setdefault((named[member.name], member.dim), {})[member.layout] = None
            for key in layouts:
                self.groups.setdefault(key, []).append(len(self.proved))
            self.proved.append((group, layouts))

    def look_at(self, group: TracedGroup) -> tuple[str | None, list[str]]:
        """What is wrong with a traced group, and what of it cannot be judged."""
        notes = dict.fromkeys(group.notes)
        for together in group.ways:
            cuts = {key: cut for key, cut in group.cuts(together).items() if key[0] in self.names}
            touched = {number for key in cuts for number in self.groups.get(key, ())}
            wrong: dict[Key, str] = {}
            covered: dict[Key, Tensor] = {key: cut == UNTOUCHED for key, cut in cuts.items()}
            for number in sorted(touched):
                reason = self._fault(number, cuts, group)
                for key, layouts in self.proved[number][1].items():
                    if reason is not None:
                        wrong.setdefault(key, reason)
                    elif key in covered:
                        covered[key][_table(layouts, self.proved[number][0].units).flatten()] = True
            for key in cuts:
                if key in self.groups and not bool(covered[key].all()):
                    name = self.names[key[0]]
                    return wrong.get(key, f"it cuts what is in no unit of {name}"), []
                if key not in self.groups:
                    reason, disproved = self._unproved(key)
                    if disproved:
                        return f"{self.names[key[0]]} follows {reason}", []
                    notes[reason] = None
        return None, list(notes)

    def left_out(self, groups: Sequence[TracedGroup]) -> tuple[str, list[str]]:
        """A field that is cut in some dimensions, and those that are not.

        Where some of them are proved, only what reads states of an encoder can be left out: no
        trace starts from an input.
        """
        cut = {key for group in groups for key in group.pieces}
        for fields, reading in self._reading():
            alike = {key for group, keys in self.proved if group.fields == fields for key in keys}
            if alike & cut and not cut.intersection(reading):
                return field_name(fields[0]), [self.names[parameter] for parameter, _ in reading]
        opaque = {id(parameter) for group in groups for parameter in group.opaque}
        bare = self._bare_buffers()
        for parameter, dim in cut:
            if parameter not in self.names:
                continue
            setting = self.known.fields_of(self.names[parameter], dim)
            never = {path: bare.get(path, []) for path in setting}
            proved = (parameter, dim) in self.groups
            left: dict[FieldPath, list[str]] = {
                path: [
                    name
                    for other, name in self.names.items()
                    for d in range(other.ndim)
                    if path in self.known.fields_of(name, d)
                    and (other, d) not in cut
                    and id(other) not in opaque
                ]
                for path in (() if proved else setting)
            }
            for missed in (never, left):
                if missed and all(missed.values()):
                    path, names = min(missed.items(), key=lambda one: len(one[1]))
                    return field_name(path), names
        return "", []

    def _bare_buffers(self) -> dict[FieldPath, list[str]]:
        """By field, the saved buffers of modules without parameters, which no trace ever cuts.

        The frozen batch norms of detectors (RT-DETR, PP-DocLayout).
        """
        found: dict[FieldPath, list[str]] = {}
        for name, buffer in saved_buffers(self.model).items():
            module = self.model.get_submodule(name.rpartition(".")[0])
            if not module._parameters:
                for path in {p for d in range(buffer.ndim) for p in self.known.fields_of(name, d)}:
                    found.setdefault(path, []).append(name)
        return found

    def _reading(self) -> Iterator[tuple[tuple[FieldPath, ...], list[Key]]]:
        """The dimensions that lose channels of states, by the fields that set those."""
        read = states_of(self.model)
        for group, keys in self.proved:
            members = {(member.name, member.dim) for member in group.members}
            if read is not None and (read.reader, read.dim) in members:
                yield group.fields, list(keys)

    def _fault(self, number: int, cuts: Mapping[Key, Tensor], traced: TracedGroup) -> str | None:
        """Why what a traced group cuts is not whole units of a proved one; None: it is."""
        group, layouts = self.proved[number]
        fields = " and ".join(field_name(path) for path in group.fields)
        hidden = {id(parameter) for parameter in traced.opaque}
        missing = [key for key in layouts if key not in cuts and id(key[0]) not in hidden]
        if missing:
            names = [self.names[parameter] for parameter, _ in missing]
            follows, is_not = ("follows", "is") if len(names) == 1 else ("follow", "are")
            return f"{some(names)} {follows} {fields} but {is_not} not in it"
        units: Tensor | None = None
        first = ""
        for key, styles in layouts.items():
            if key not in cuts:
                continue
            name = f"{self.names[key[0]]} (dimension {key[1]})"
            rows = cuts[key][_table(styles, group.units)]
            if bool((rows < 0).any() or (rows != rows[:, :1]).any()):
                if self._one_by_one(group, layouts, cuts):
                    return None
                return f"what it cuts together of {name} are no whole units of {fields}"
            if units is None:
                units, first = rows[:, 0], name
            elif not torch.equal(units, rows[:, 0]):
                return f"it cuts other units of {fields} from {name} than from {first}"
        if units is None or group.classes == 1:
            return None
        by_class = units.view(group.classes, -1)
        alike = by_class.sort(dim=1).values
        if bool((alike == alike[0]).all()):
            return None
        if bool((by_class != by_class[:, :1]).any()):
            return f"it cuts different numbers of units from the {group.classes} runs of {fields}"
        return self._heads_fault(group, by_class[:, 0], cuts)

    def _one_by_one(
        self, group: WidthGroup, layouts: Mapping[Key, Iterable[Layout]], cuts: Mapping[Key, Tensor]
    ) -> bool:
        """Whether single positions, the same everywhere, are cut where the class allows that."""
        places = {key: _table(styles, group.units).flatten() for key, styles in layouts.items()}
        along = [cuts[key][place.sort().values] for key, place in places.items() if key in cuts]
        if any(not torch.equal(one, along[0]) for one in along) or bool((along[0] < 0).any()):
            return False
        canonical = self.known.depth.canonical
        kind = frozenset((canonical(member.name), member.dim) for member in group.members)
        if kind not in self.single:
            self.single[kind] = single_positions(group, self.known)
        return self.single[kind]

    def _heads_fault(
        self, group: WidthGroup, heads: Tensor, cuts: Mapping[Key, Tensor]
    ) -> str | None:
        """Whole heads (all units of a class) have to go from every projection of an attention."""
        layers = {member.name.rpartition(".")[0] for member in group.members}
        split = {
            name: splits
            for name, _ in self.model.named_modules()
            if (splits := self.known.splits_of(name))
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
        """Why a dimension is in no proved group, and whether an experiment disproved it."""
        fields = self.known.fields_of(self.names[key[0]], key[1])
        fields |= {self.known.linked.get(path, path) for path in fields}
        found = [w for w in self.widths if w.reason is not None and fields & set(w.fields)]
        found.sort(key=lambda width: not width.disproved)
        if not found:
            names = ", ".join(sorted(field_name(path) for path in fields)) or "no config field"
            return f"{names}: no experiments are made with it", False
        return f"{found[0].name}: {found[0].reason}", found[0].disproved


@functools.lru_cache(maxsize=256)
def _positions(layout: Layout, units: int) -> Tensor:
    return layout.table(units)


def _table(layouts: Iterable[Layout], units: int) -> Tensor:
    """Where the units stand along a dimension; fused layers have a layout for each part."""
    tables = [_positions(layout, units) for layout in layouts]
    return tables[0] if len(tables) == 1 else torch.cat(tables, dim=1)
