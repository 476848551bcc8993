"""What pruning settings will give, before any weight is touched: ``tp_hf_config.plan``."""

from __future__ import annotations

import inspect
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from torch_pruning.pruner.algorithms.scheduler import linear_scheduler

from .choice import Gqa, check_gqa, check_share, heads_asked, names_in
from .chosen import Chosen, Wanted, amounts_of, check_ratios, choose, multiples_of
from .course import Course, Move
from .errors import UnsupportedModelError
from .learn import ConfigMap, map_of
from .offers import Width, widths_of
from .plan_table import adjusted_line
from .plans import Plan, PlannedRefusal, PlannedWidth, Scheduler, Settings
from .reference import FieldPath, Refusal, field_name
from .shortfall import shortfalls
from .sizes import ParameterCount, Size, size_of
from .target import course_to, why_not_exactly
from .unbuilt import model_of
from .widths import WidthView

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_KERNELS, _RANKS, _ASKED = (64, 128, 256), (2, 4, 8), 64


def plan(
    model_or_config: nn.Module | PreTrainedConfig,
    *,
    pruning_ratio: float | None = None,
    ratios: Mapping[str, float] | None = None,
    prune: str | Iterable[str] | None = None,
    head_pruning_ratio: float = 0.0,
    prune_num_heads: bool | None = None,
    gqa: Gqa | None = None,
    iterative_steps: int = 1,
    round_to: int | None = None,
    max_pruning_ratio: float = 1.0,
    iterative_pruning_ratio_scheduler: Scheduler | None = None,
    target_params: float | None = None,
    model_class: type[PreTrainedModel] | None = None,
) -> Plan:
    """Say what pruning with these settings will give, without pruning and without weights.

    The arguments that a pruner has too are named and mean what they do there; ``prune`` and
    ``ratios`` are those of ``pruner_kwargs``, with the graph made from the config.

    Args:
        model_or_config: a model, on the meta device too, or a config.
        pruning_ratio: for every width to prune that ``ratios`` does not name; default: 0.5.
        ratios: ratio per config field.
        prune: config fields to prune; default: those that ``ratios`` names, without it every width
            inside the model but attention heads; of widths that share a dimension, the one that
            holds most of the model.
        head_pruning_ratio: the share of attention heads to prune as well.
        prune_num_heads: whether heads are pruned; default: where ``head_pruning_ratio`` is not 0.
        gqa: ``"query"``: query heads out of every key/value group; ``"group"``: whole key/value
            groups; default: query heads where a group has several.
        iterative_steps: the number of steps.
        round_to: a multiple that widths shall have besides what the class asks for.
        max_pruning_ratio: the share of a layer's channels that may go.
        iterative_pruning_ratio_scheduler: the ratios of the steps; default: linear.
        target_params: how many parameters shall be left at most: a share of them (up to 1), or a
            number. One ratio is then sought for all widths that ``ratios`` does not name, and for
            heads that are pruned where ``head_pruning_ratio`` is 0.
        model_class: the class of a config; default: the one it names, else a causal or other
            language model, a classifier, a base model, whichever there is.

    Raises:
        UnsupportedModelError: no single Hugging Face model, or a field that cannot be pruned.
        ValueError: a ratio outside 0 to 1 or one that no width follows, an unknown ``gqa``, or a
            target that cannot be reached.
    """
    check_gqa(gqa)  # before anything is built
    model = model_of(model_or_config, model_class)
    known = map_of(model)
    view = WidthView(model, known)
    fixed = dict(ratios or {})
    names = None if prune is None and not fixed else names_in(prune or fixed)
    heads = heads_asked(prune_num_heads, gqa, head_pruning_ratio)
    common = 0.5 if pruning_ratio is None else pruning_ratio
    _check_ratios({"pruning_ratio": common, "head_pruning_ratio": head_pruning_ratio})
    _check_ratios(fixed)
    settings = Settings(
        prune=names,
        pruning_ratio=common,
        ratios=fixed,
        prune_num_heads=heads,
        gqa=gqa,
        head_pruning_ratio=head_pruning_ratio,
        iterative_steps=iterative_steps,
        round_to=round_to,
        max_pruning_ratio=max_pruning_ratio,
        scheduler=iterative_pruning_ratio_scheduler,
    )
    wrapped = isinstance(model_or_config, nn.Module) and model_or_config is not model
    chosen = choose(view, Wanted(names, heads, gqa, wrapped=wrapped), must=True)
    assert not isinstance(chosen, str)  # that it must
    course = _course(view, chosen, settings)
    if pruning_ratio:
        _check_followed(course, settings, target_params, listed=prune is not None)
    return _plan(model_or_config, view, chosen, course, settings, target_params)


def _check_ratios(ratios: Mapping[str, float]) -> None:
    for name, ratio in ratios.items():
        check_share(name, ratio)


def _check_followed(
    course: Course, settings: Settings, target_params: float | None, listed: bool
) -> None:
    """A common ratio that decides nothing was meant otherwise, but where widths are listed."""
    ratio = settings.pruning_ratio
    if target_params is not None:
        raise ValueError(
            f"pruning_ratio={ratio}: target_params= finds the ratio by itself. Leave one of them "
            "out"
        )
    if not listed and course.moves and all(move.clamped for move in course.moves):
        raise ValueError(
            f"pruning_ratio={ratio}: every width that is pruned has a ratio of its own (ratios=, "
            "head_pruning_ratio=). Name the fields that it is for in prune= too, or leave it out"
        )


def _course(view: WidthView, chosen: Chosen, settings: Settings) -> Course:
    known = view.known
    check_ratios(chosen, settings.ratios)
    multiples = multiples_of(view, chosen)
    moves = []
    for width in chosen.widths:
        named = [settings.ratios[name] for name in width.names if name in settings.ratios]
        ratio = named[-1] if named else settings.pruning_ratio
        if width in chosen.heads:
            ratio = settings.head_pruning_ratio
        moves.append(
            Move(
                width.fields,
                amounts_of(width, multiples[width.fields], view.model),
                ratio,
                clamped=bool(named) or width in chosen.heads,
                counts=bool(set(width.fields) & known.count_fields()),
            )
        )
    schedule = settings.scheduler or linear_scheduler
    return Course(
        known,
        tuple(moves),
        partial(_scheduled, schedule, settings.iterative_steps),
        settings.round_to or 1,
        settings.max_pruning_ratio,
    )


def _scheduled(schedule: Scheduler, steps: int, ratio: float) -> Sequence[float]:
    return schedule(ratio, steps)


def _plan(
    source: Any,
    view: WidthView,
    chosen: Chosen,
    course: Course,
    settings: Settings,
    target_params: float | None,
) -> Plan:
    known = view.known
    full, before, notes = _sized(known, {})
    if full is None or before is None:
        raise UnsupportedModelError("the class does not build its own config")  # map_of has
    target, fewer = None, None
    if target_params is not None:
        target = int(target_params * (before.parameters if target_params <= 1 else 1))
        count = ParameterCount(known, full)
        heads = {width.fields for width in chosen.heads if not settings.head_pruning_ratio}
        free = [m for m in course.moves if not m.clamped or m.fields in heads]
        course = course_to(course, free, count, target)
        fewer = why_not_exactly(course, free, count, target)
        settings = _settings_of(course, settings, heads)
    values = course.steps()[-1]
    _, after, _ = _sized(known, values)
    names = {width.name for width in chosen.widths}
    offered = widths_of(view.model, view.known)
    live = isinstance(source, nn.Module) and view.model.device.type != "meta"
    return Plan(
        model=type(view.model).__name__,
        settings=settings,
        widths=tuple(
            _width(width, move, course, offered)
            for width, move in zip(chosen.widths, course.moves, strict=True)
        ),
        kept={
            w.name: w.reason or chosen.left.get(w.name, "not chosen")
            for w in offered
            if w.name not in names
        },
        before=before,
        after=after,
        refusal=planned_refusal(course),
        adjusted=(*map(adjusted_line, course.adjusted), *shortfalls(course)),
        target=target,
        why_not_exactly=fewer,
        tokens="input_ids" in inspect.signature(view.model.forward).parameters,
        notes=(*notes, *_handed(chosen), *_heads_stay(chosen, settings)),
        _live=weakref.ref(source) if live else lambda: None,
        _fields=dict(known.values),
    )


def _handed(chosen: Chosen) -> Iterator[str]:
    """What whoever gives the model its inputs has to know."""
    for width in chosen.widths:
        for name in width.handed:
            yield f"{name} has to lose channels with {width.name}: the report of a step says which"


def _heads_stay(chosen: Chosen, settings: Settings) -> Iterator[str]:
    """That heads were asked for, and no share of them."""
    if chosen.heads and not settings.head_pruning_ratio:
        names = ", ".join(width.name for width in chosen.heads)
        yield f"{names} stays: head_pruning_ratio= says what share of the heads goes, and is 0"


def _sized(
    known: ConfigMap, values: Mapping[FieldPath, int]
) -> tuple[nn.Module | None, Size | None, tuple[str, ...]]:
    """The class without data at some values, what it weighs, and what is not known of that."""
    full = known.builder.build(known.config_at(values, shallow=False))
    shallow = known.build_at(values)
    if isinstance(full, Refusal) or isinstance(shallow, Refusal):
        return None, None, ()
    cast("PreTrainedModel", full).tie_weights()  # building without data leaves it out
    size, unknown = size_of(known, full, shallow)
    return full, size, () if unknown is None else (unknown,)


def _width(width: Width, move: Move, course: Course, offered: Sequence[Width]) -> PlannedWidth:
    known = course.known
    states = [course.values_of(state) for state in course.walk]
    values = states[-1]
    units = course.walk[-1][move.fields][0] // move.amounts[0].grain
    share = units / move.units
    return PlannedWidth(
        name=width.name,
        before=_named({path: known.values[path] for path in move.fields}),
        steps=tuple(_named({path: one[path] for path in move.fields}) for one in states),
        asked=move.ratio,
        reached=1 - share,
        reachable=_reachable(course, move),
        multiples=_divisors(
            _KERNELS,
            {
                units * group.grain * member.layout.run
                for group in width.groups
                for member in group.members
            },
        ),
        ranks=_divisors(
            _RANKS,
            {values.get(f, known.values[f]) for f in _beside(width, offered, known.count_fields())},
        ),
        parameters=width.parameters,
    )


def _settings_of(
    course: Course, settings: Settings, heads: Collection[tuple[FieldPath, ...]]
) -> Settings:
    """The settings that lead where a course does: one ratio, and the exceptions."""
    free = [move for move in course.moves if not move.clamped]
    common = Counter(move.ratio for move in free).most_common(1)
    ratio = common[0][0] if common else settings.pruning_ratio
    others = {field_name(move.fields[0]): move.ratio for move in free if move.ratio != ratio}
    of_heads = [move.ratio for move in course.moves if move.fields in heads]
    return replace(
        settings,
        pruning_ratio=ratio,
        ratios={**settings.ratios, **others},
        head_pruning_ratio=of_heads[0] if of_heads else settings.head_pruning_ratio,
    )


def _named(values: Mapping[FieldPath, int]) -> dict[str, int]:
    return {field_name(path): value for path, value in values.items()}


def _divisors(candidates: Sequence[int], sizes: Iterable[int]) -> tuple[int, ...]:
    """Those that divide all of the sizes."""
    every = list(sizes)
    return tuple(n for n in candidates if all(size % n == 0 for size in every))


def _reachable(course: Course, move: Move) -> Sequence[int]:
    """The values that a width's first field can reach with all others as they are."""
    known, units, start = course.known, course.reachable(move), move.amounts[0].units
    value = known.values[move.fields[0]]
    if not move.counts or len(units) > _ASKED:
        first, last, grid = (n * value // start for n in (units[0], units[-1], units.step))
        return range(first, last + 1, grid)
    every = {n: {path: known.values[path] * n // start for path in move.fields} for n in units}
    return tuple(n * value // start for n in units if course.refuses(every[n]) is None)


def _beside(width: Width, offered: Sequence[Width], counts: frozenset[FieldPath]) -> set[FieldPath]:
    """The fields of a width, and those that count the heads beside its own."""
    related = {
        path
        for other in offered
        if set(other.fields) <= counts and set(other.fields) & set(width.fields)
        for path in other.fields
    }
    return set(width.fields) | related


def planned_refusal(course: Course) -> PlannedRefusal | None:
    """What the class refuses of a course, and what it takes near it."""
    refused = course.refusal()
    if refused is None:
        return None
    nearest = [
        (
            {field_name(move.fields[0]): move.ratio for move in other.moves},
            _named(other.steps()[-1]),
        )
        for other in course.nearest()
    ]
    return PlannedRefusal(refused.step, _named(refused.values), refused.reason, tuple(nearest))
