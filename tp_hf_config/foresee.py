"""Tell from a pruner's settings that they cannot end in a loadable model, before it prunes.

What each step will leave is what :mod:`tp_hf_config.amounts` says, from the pruner's own ratios,
scopes, rounding and ignored layers.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch_pruning import ops

from .amounts import Amount
from .course import Course, Move
from .errors import ConfigSyncError, PrunerSettingsWarning
from .explain import some
from .foresee_traced import ranked_together, traced_problems
from .graph import ConfigGraph
from .plan_table import adjusted_line, refusal_lines
from .planning import planned_refusal
from .reference import FieldPath, field_name
from .shortfall import shortfalls
from .steer import given_ratios
from .views import Coupled
from .widths import WidthView

_LISTED = 3


@dataclass(frozen=True)
class Foreseen:
    """What a pruner on the config graph is going to leave.

    Attributes:
        course: the way of all widths.
        kinds: group -> its width's fields, and which kind of its groups it is.
    """

    course: Course
    kinds: dict[int, tuple[tuple[FieldPath, ...], int]]

    def notes(self, step: int) -> list[str]:
        """What a step does instead of what is asked for; the last, what all of them do not."""
        lines = [adjusted_line(one) for one in self.course.adjusted if one.step == step]
        last = step == len(self.course.walk)
        return lines + (shortfalls(self.course) if last else [])

    def units_left(self, coupled: Coupled, step: int) -> int | None:
        """What a step leaves of a group; ``None`` where it did not come to it as foreseen."""
        walk, kind = self.course.walk, self.kinds.get(id(coupled))
        if kind is None or not 1 <= step <= len(walk):
            return None
        fields, number = kind
        move = next(move for move in self.course.moves if move.fields == fields)
        before = walk[step - 2][fields][number] if step > 1 else move.amounts[number].units
        return walk[step - 1][fields][number] if before == coupled.units.count else None


def foresee(pruner: Any, view: WidthView, strict: bool) -> Foreseen | None:
    """What a pruner will leave.

    A pruner that has begun is left alone: what it did already is not known.

    Raises:
        ConfigSyncError: no config will say it; with ``strict``, also where the class does not take
            what is asked for, and the nearest would be done.
    """
    if pruner.current_step:
        return None
    foreseen: Foreseen | None = None
    if isinstance(pruner.DG, ConfigGraph):
        foreseen, problem = _foreseen(pruner, view)
    else:
        problem = next(traced_problems(pruner, view), None)
    if problem is None and strict and foreseen is not None and foreseen.course.adjusted:
        lines = "; ".join(map(adjusted_line, foreseen.course.adjusted))
        problem = f"{lines}. HFConfigSyncHook() does the nearest; strict=True does not."
    if problem is None:
        return foreseen
    raise ConfigSyncError(
        f"{type(pruner).__name__} of {type(view.model).__name__}: {problem} Nothing is pruned yet. "
        "tp_hf_config.plan(model, ...) shows what settings give."
    )


def check_config_is_own(pruner: Any, model: Any, sharers: Sequence[str], strict: bool) -> None:
    """Warn, or raise, where the config that is going to change is another live model's too.

    Args:
        pruner: of the model.
        model: whose config it is.
        sharers: the classes of the other models; see ``around.Surroundings``.
        strict: raise.

    Raises:
        ConfigSyncError: there are others, and ``strict``.
    """
    if sharers:
        name = type(model).__name__
        tell(
            f"{type(pruner).__name__} of {name}: another model that is alive ({some(sharers)}) "
            "holds the same config object, so its config would change too, and its weights not. "
            f"Build the other one from copy.deepcopy(config), or prune copy.deepcopy(model). "
            "Nothing is pruned yet.",
            strict,
        )


def tell(message: str, strict: bool) -> None:
    """Warn of what cannot end well; where ``strict``, raise it."""
    if strict:
        raise ConfigSyncError(message)
    warnings.warn(message, PrunerSettingsWarning, stacklevel=_frames_inside() + 1)


def _frames_inside() -> int:
    """How many frames of this package stand above its caller."""
    package, depth = __name__.partition(".")[0], 0
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(f"{package}."):
        depth, frame = depth + 1, frame.f_back  # type: ignore[assignment]
    return depth


@dataclass(frozen=True)
class _Going:
    """One group that the pruner is going to prune.

    Attributes:
        coupled: the group.
        layer: one of its layers, for messages.
        scope: what the pruner ranks its units with.
        ratios: for each step, the share of its units that shall be gone.
        amount: its numbers.
    """

    coupled: Coupled
    layer: str
    scope: str
    ratios: tuple[float, ...]
    amount: Amount


def _foreseen(pruner: Any, view: WidthView) -> tuple[Foreseen | None, str | None]:
    """The course of a pruner on the config graph, and what is wrong with it.

    Without a course: importances decide how much of a field goes.
    """
    by_fields: dict[tuple[FieldPath, ...], list[_Going]] = {}
    scopes: Counter[str] = Counter()
    for group in _going(pruner):
        by_fields.setdefault(group.coupled.fields, []).append(group)
        scopes[group.scope] += max(group.ratios, default=0) > 0
    ranked = {
        fields: groups
        for fields, groups in by_fields.items()
        if any(scopes[group.scope] > 1 for group in groups)
    }
    problem = _ranked_apart(ranked) or _first_apart(pruner, by_fields, ranked)
    if ranked or problem is not None:
        return None, problem
    moves: list[Move] = []
    kinds: dict[int, tuple[tuple[FieldPath, ...], int]] = {}
    for fields, groups in by_fields.items():
        amounts = list(dict.fromkeys(group.amount for group in groups))
        kinds |= {id(one.coupled): (fields, amounts.index(one.amount)) for one in groups}
        moves.append(
            Move(
                fields,
                tuple(amounts),
                groups[0].ratios[-1] if groups[0].ratios else 0.0,
                ratios=groups[0].ratios,
                counts=bool(set(fields) & view.known.count_fields()),
            )
        )
    course = Course(
        view.known,
        tuple(moves),
        lambda ratio: pruner.iterative_pruning_ratio_scheduler(ratio, pruner.iterative_steps),
        pruner.round_to,
        pruner.max_pruning_ratio,
    )
    foreseen = Foreseen(course, kinds) if pruner.round_to else None
    refusal = planned_refusal(course)
    if refusal is None:
        return foreseen, None
    words = " ".join(line.strip() for line in refusal_lines(refusal))
    return foreseen, f"the class will not take the widths. {words}"


_Groups = dict[tuple[FieldPath, ...], list[_Going]]


def _ranked_apart(ranked: _Groups) -> str | None:
    """Groups of one field that are ranked with others: how much of each goes, importances say."""
    several = {_names(fields): len(groups) for fields, groups in ranked.items() if len(groups) > 1}
    if not several:
        return None
    alone = [_names(fields) for fields, groups in ranked.items() if len(groups) == 1]
    return ranked_together(several, alone)


def _first_apart(pruner: Any, by_fields: _Groups, ranked: _Groups) -> str | None:
    """What is wrong with the first field whose groups do not end at the same number."""
    for fields, groups in by_fields.items():
        staying = sum(one.fields == fields for one in pruner.DG.coupled) - len(groups)
        if fields not in ranked:
            problem = _apart(pruner, _names(fields), groups, staying)
        else:
            problem = _held(_names(fields), groups, staying, "lose some") if staying else None
        if problem is not None:
            return problem
    return None


def _names(fields: tuple[FieldPath, ...]) -> str:
    return " + ".join(map(field_name, fields))


def _apart(pruner: Any, name: str, groups: Sequence[_Going], staying: int) -> str | None:
    """Groups of one field that do not end at the same number."""
    ends: dict[tuple[int, ...], list[str]] = {}
    for group in groups:
        amount = group.amount
        left = amount.after(group.ratios, pruner.round_to, pruner.max_pruning_ratio)
        ends.setdefault(tuple(n // amount.grain for n in left), []).append(group.layer)
    start = groups[0].amount.units // groups[0].amount.grain
    if staying and set(ends) != {(start,) * len(groups[0].ratios)}:
        return _held(name, groups, staying, f"go to {min(ends)[-1]}")
    if len(ends) < 2:
        return None
    parts = "; ".join(
        f"{' -> '.join(map(str, left))} in {', '.join(layers[:_LISTED])}"
        + (f" and {len(layers) - _LISTED} more" if len(layers) > _LISTED else "")
        for left, layers in sorted(ends.items())
    )
    return (
        f"the groups of {name} will have different numbers of units: {parts}. One config field "
        "cannot say that: give all of them one ratio (ratios= of pruner_kwargs)."
    )


def _held(name: str, groups: Sequence[_Going], staying: int, end: str) -> str:
    """Some groups of a field stay, the others do not."""
    start = groups[0].amount.units // groups[0].amount.grain
    return (
        f"{staying} of {staying + len(groups)} groups of {name} stay at {start} "
        f"(ignored_layers), the others {end}, and one config field cannot say that. Ignore a layer "
        "of every group, or of none (prune= of pruner_kwargs leaves a field out)."
    )


def _going(pruner: Any) -> Iterator[_Going]:
    """The groups that take part, as the pruner will look at them."""
    graph: ConfigGraph = pruner.DG
    sides: dict[Any, int] = {}
    found: list[tuple[Coupled, Any, list[Any]]] = []
    for coupled in graph.taking_part(pruner.ignored_layers):
        group = graph.group_at(coupled, [0])  # its layers in the order that the pruner sees
        keys = []
        for item in group:
            module, out = item.dep.target.module, graph.is_out_channel_pruning_fn(item.dep.handler)
            if item.dep.target.type == ops.OPTYPE.PARAMETER:
                continue
            key = (coupled.fields, module, out)
            sides[key] = sides.get(key, 0) + len(item.idxs)
            keys.append(key)
        found.append((coupled, group, keys))
    for coupled, group, keys in found:
        layers = {
            (
                graph.get_out_channels(key[1]) if key[2] else graph.get_in_channels(key[1]),
                sides[key],
            )
            for key in keys
        }
        scope, ratios = _scope(pruner, group)
        yield _Going(
            coupled,
            graph._module2name.get(group[-1].dep.target.module, ""),
            scope,
            ratios,
            Amount(
                coupled.units.count,
                coupled.classes,
                coupled.multiple,
                tuple(sorted(layer for layer in layers if layer[0] is not None)),
                coupled.grain,
                coupled.least,
                coupled.run,
            ),
        )


def _scope(pruner: Any, group: Any) -> tuple[str, tuple[float, ...]]:
    """What a group is ranked with, and its ratios, as ``BasePruner._prune`` finds them (1.6.1)."""
    graph = pruner.DG
    given = given_ratios(pruner, group)
    if given is not None:
        return given[0], tuple(min(ratio, pruner.max_pruning_ratio) for ratio in given[1][1:])
    ratios = tuple(pruner.per_step_pruning_ratio[1:])
    if pruner.isomorphic:
        kinds = (
            f"{type(item.dep.source.module).__name__} {type(item.dep.target.module).__name__} "
            f"{graph.is_out_channel_pruning_fn(item.dep.handler)}"
            for item in group
        )
        return "isomorphic: " + ", ".join(kinds), ratios
    if pruner.global_pruning:
        return "global", ratios
    return graph._module2name[group[0].dep.source.module], ratios
