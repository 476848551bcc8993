"""What can be pruned in a model: per config field its proved groups, or why there are none."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .directions import units_of
from .expand import WidthGroup, expand
from .explain import some
from .groups import find_groups, in_positions
from .learn import ConfigMap, map_of
from .limits import straying, vanishing
from .miniature import Miniature, miniature
from .notebook import page, short, table
from .proofs import Finding
from .reference import FieldPath, Refusal, field_name, shapes
from .schema import dated
from .ties import parameter_names, tensor
from .twins import Dim, Layout, TwinTest
from .unbuilt import model_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_MOST_BUILDS = 64
_HEAD = ("config field", "units", "groups", "layers", "parameters a unit", "proof")


@dataclass(frozen=True)
class Width:
    """One config field, or several that only go together, and its groups.

    Attributes:
        fields: the fields.
        groups: the groups of coupled dimensions, proved on a tiny copy and carried over.
        units: how many units the width has; 0 where it cannot be pruned.
        layers: how many layers of the model have a part in it.
        parameters: how many parameters one unit holds in all of its groups.
        reason: why it cannot be pruned; ``None`` where it can.
        disproved: an experiment showed that its units are not interchangeable; no other way of
            finding groups would be right either.
        tried: experiments were made with the class; else its tiny copy does not run.
        along: parameters that no output depends on; they lose the same channels as the residual
            stream, which no experiment can show.
        outward: an output of the model is as wide, so that what reads it has to follow.
        handed: inputs that lose the same channels, states of an encoder outside of the model; what
            makes them has to follow.
    """

    fields: tuple[FieldPath, ...]
    groups: tuple[WidthGroup, ...] = ()
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
        """The fields as people write them."""
        return tuple(field_name(path) for path in self.fields)

    @property
    def name(self) -> str:
        """The fields in one text."""
        return " + ".join(self.names)

    def __repr__(self) -> str:
        groups = f"{len(self.groups)} group{'' if len(self.groups) == 1 else 's'}"
        proved = f"{self.units:,} units in {groups}, proved"
        return short(self, f"{self.name}: {self.reason or proved}")

    def _repr_html_(self) -> str:
        return table(_HEAD, [_row(self)])

    def to_dict(self) -> dict[str, Any]:
        """The width for ``json.dumps``."""
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
    """The width under the table's head."""
    numbers = (width.units, len(width.groups), width.layers, width.parameters)
    shown = [f"{n:,}" if width.reason is None else "" for n in numbers]
    proved = "units permuted: same outputs" + said_along(width.along)
    return (width.name, *shown, width.reason or proved + said_handed(width.handed))


@dataclass(frozen=True)
class _Experiments:
    """What experiments with one class and config found.

    ``widths``: the same at full size, per names of the model's parameters (they show its ties).
    """

    mini: Miniature | Refusal
    findings: tuple[Finding, ...]
    widths: dict[Any, tuple[Width, ...]] = field(default_factory=dict)


_experiments: weakref.WeakKeyDictionary[ConfigMap, _Experiments] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Prunable:
    """The widths of one model; printed as a table."""

    model: str
    widths: tuple[Width, ...]

    def _rows(self) -> list[tuple[str, ...]]:
        """A head, and one row for each width."""
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
        """The table for ``json.dumps``."""
        return dated({"model": self.model, "widths": [width.to_dict() for width in self.widths]})


def prunable(
    model_or_config: nn.Module | PreTrainedConfig,
    *,
    model_class: type[PreTrainedModel] | None = None,
) -> Prunable:
    """What can be pruned in this model through the graph made from its config.

    Experiments run on a tiny copy of the class with random weights (see
    :mod:`tp_hf_config.twins`), so the cost does not grow with the model.

    Args:
        model_or_config: a model, on the meta device too, or a config.
        model_class: the class of a config; default: as in :func:`~tp_hf_config.plan`.

    Raises:
        UnsupportedModelError: no single followable Hugging Face model, or a config that builds
            none.
        TypeError: neither a module nor a config.
    """
    model = model_of(model_or_config, model_class)
    return Prunable(type(model).__name__, widths_of(model))


def widths_of(
    model: PreTrainedModel, known: ConfigMap | None = None, tiny: Miniature | None = None
) -> tuple[Width, ...]:
    """The widths of a model, from experiments that are done once per class and config.

    Args:
        model: the live model.
        known: its map, where that was looked up already.
        tiny: its tiny copy, where the model is one itself; else it is made.
    """
    known = known or map_of(model)
    if known not in _experiments:
        with one_thread():
            mini = tiny or miniature(known)
            found = [] if isinstance(mini, Refusal) else find_groups(mini)
            full = known if isinstance(mini, Refusal) else mini.full
            sayable = (_apart(_sayable(finding, known), found, full) for finding in found)
            _experiments[known] = _Experiments(mini, tuple(sayable))
    done = _experiments[known]
    if isinstance(done.mini, Refusal):
        return tuple(Width((path,), reason=done.mini.reason, tried=False) for path in known.values)
    names = tuple(map(tuple, parameter_names(model).values()))
    if names not in done.widths:
        widths = tuple(_width(f, done.mini, known, model) for f in done.findings)
        done.widths[names] = widths + _bound(known)
    return done.widths[names]


def _bound(known: ConfigMap) -> tuple[Width, ...]:
    """The widths that the class takes no other value of alone."""
    return tuple(
        Width(
            (path,),
            reason=f"{known.builder.config_class.__name__} takes no other value of it alone, only "
            f"with {' or '.join(field_name(other) for other in others)}",
            disproved=True,
        )
        for path, others in known.bound.items()
        if path not in known.values
    )


def single_positions(group: WidthGroup, known: ConfigMap) -> bool:
    """Whether a group's units fall into smaller ones: every position is interchangeable.

    Where a class makes an inner width four times the hidden size, a unit of the field is four
    channels of it, and a trace may cut them one by one.
    """
    done = _experiments[known]
    canonical = known.depth.canonical
    mine = {(canonical(member.name), member.dim) for member in group.members}
    inputs = set() if isinstance(done.mini, Refusal) else done.mini.states.keys()
    for tiny in (tiny for f in done.findings if not f.disproved for tiny in f.groups):
        sizes = {dim.layout.parts * dim.layout.run for dim in tiny.dims}
        places = {(known.depth.first(d.name), d.dim) for d in tiny.dims if d.name not in inputs}
        fused = len({(dim.name, dim.dim) for dim in tiny.dims}) < len(tiny.dims)
        fits = tiny.fields == group.fields and places <= mine and not fused
        if isinstance(done.mini, Refusal) or not fits or len(sizes) > 1:
            continue
        count = tiny.units * sizes.pop()
        dims = [Dim(dim.name, dim.dim, Layout(offset=dim.layout.offset)) for dim in tiny.dims]
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
        with one_thread():
            return TwinTest(
                done.mini.model, done.mini.inputs, count, watched=done.mini.watched
            ).proves(dims, order)
    return False


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny tensors: several threads would only wait for each other."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def _width(finding: Finding, mini: Miniature, known: ConfigMap, model: PreTrainedModel) -> Width:
    if all(known.values.get(path) == 1 for path in finding.fields):
        return Width(finding.fields, reason="it is 1: nothing of it can go", disproved=True)
    if finding.reason is not None:
        return Width(finding.fields, reason=finding.reason, disproved=finding.disproved)
    groups = expand(finding, mini, known, model)
    if isinstance(groups, str) and (finer := in_positions(mini, finding)) is not None:
        found = expand(finer, mini, known, model)
        groups = groups if isinstance(found, str) else found
    if isinstance(groups, str):
        return Width(finding.fields, reason=groups)
    if not groups:
        return Width(finding.fields, reason="the real model has no such group")
    return Width(
        fields=finding.fields,
        groups=tuple(replace(group, least=finding.least) for group in groups),
        units=groups[0].units // groups[0].grain,
        layers=len({m.name.rpartition(".")[0] for group in groups for m in group.members}),
        parameters=_parameters_per_unit(groups, model),
        along=finding.along,
        outward=finding.outward,
        handed=finding.handed,
    )


def said_along(names: Sequence[str]) -> str:
    """That parameters go along that no output depends on, behind another text."""
    if not names:
        return ""
    return f"; no output depends on {some(names)}, cut alike"


def said_handed(names: Iterable[str]) -> str:
    """That inputs have to lose the same channels, behind another text."""
    return "".join(f"; {name} has to lose the same channels" for name in dict.fromkeys(names))


def _sayable(finding: Finding, known: ConfigMap) -> Finding:
    """The finding, refused where less of the width makes the class build what nobody can prune to.

    A quarter less, and half: some count becomes 0, or a dimension that no group holds moves. Where
    it refuses both, other numbers are tried; a width that it takes no other number of stays.
    """
    if finding.reason is not None or not set(finding.fields) <= known.values.keys():
        return finding
    held = {(dim.name, dim.dim) for group in finding.groups for dim in group.dims}
    units = units_of(known, finding.fields)
    reason, taken = "", False
    several = dict.fromkeys((units - units // 4, units - units // 2, *range(units - 1, 0, -1)))
    for tried, left in enumerate(islice(several, _MOST_BUILDS)):
        if taken and tried > 1:
            break
        less = {path: known.values[path] // units * left for path in finding.fields}
        new = known.build_at(less)
        if isinstance(new, Refusal):
            reason = f"the class takes no other number: {new.reason}"
            continue
        wrong = vanishing(known, new) or straying(known, less, new, held)
        if wrong is not None:
            return Finding(finding.fields, reason=wrong, disproved=True)
        taken |= shapes(new) != known.shapes
    return finding if taken or not reason else Finding(finding.fields, reason=reason)


def _apart(finding: Finding, others: Sequence[Finding], full: ConfigMap) -> Finding:
    """The finding, refused where a part that was not seen to run is as wide and may read it.

    At full size: in a tiny copy, numbers of heads are as large as others by chance (Chameleon).

    Qwen2-VL's ``vision_config.hidden_size`` has to be the text's, which text alone cannot show.
    """
    unseen = [path for other in others if other.unseen for path in other.fields]
    for path in unseen:
        if path in finding.fields:
            continue  # of that width all was seen, or it would have a reason of its own
        if finding.reason is None and any(
            full.values.get(path) == full.values.get(own) for own in finding.fields
        ):
            reason = f"{field_name(path)} is as wide, and its part of the model was not seen to run"
            return Finding(finding.fields, reason=reason)
    return finding


def _parameters_per_unit(groups: Sequence[WidthGroup], model: nn.Module) -> int:
    total = 0
    counted: set[tuple[int, int]] = set()
    for group in groups:
        for member in group.members:
            parameter = tensor(model, member.name)
            if (id(parameter), member.dim) not in counted:
                counted.add((id(parameter), member.dim))
                share = member.layout.parts * member.layout.run * group.grain
                total += parameter.numel() // parameter.shape[member.dim] * share
    return total
