"""Run the experiments with a class and config once, and keep what they find on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from ..errors import UnsupportedModelError
from ..fieldmap.field_map import FieldMap, count_at_zero, from_state, state_of, ungrouped_change
from ..fieldmap.layer_map import LayerFields, layer_map, uniform_map
from ..fieldmap.learn_field_map import learn
from ..fieldmap.unit_shares import units_of
from ..forward.coverage import InputsRefusal
from ..model.build import Refusal
from ..model.config_json import (
    FieldPath,
    changed_values,
    config_json,
    field_name,
    value_at,
    with_values,
)
from ..model.disk_cache import entry_key, load, store, suspended
from ..model.layer_class import layer_lists
from ..model.layer_entries import KEY
from ..model.shapes import shapes
from ..model.surroundings import ONE_AT_A_TIME, one_thread, plain_autograd, same_random_state
from ..twin.find_groups import find_alone, find_groups, may_be_unobserved
from ..twin.group import Finding, TinyGroup
from ..twin.layout import TensorDim
from ..twin.tiny.tiny_model import (
    TinyModel,
    built_tiny_model,
    once,
    stored_tiny_model,
    tiny_model,
)
from .full_size import instances

_MOST_BUILDS = 64
_GROUPS = "groups"
"""The key of all findings with a tiny model in the cache on disk."""
_Fields = tuple[FieldPath, ...]


@dataclass(frozen=True)
class Experiments:
    """What experiments with one class and config found.

    Attributes:
        tiny: the tiny model, or the class's refusal to run at tiny widths.
        findings: the groups of each width in the tiny model, or why it cannot be pruned.
        fields: the fields whose findings these are, each pruned alone; none: all that there are.
        cached: True if they were read from the cache on disk.
        widths: the findings carried over to full size, by the names of the model's parameters
            (they show its ties).
    """

    tiny: TinyModel | Refusal
    findings: tuple[Finding, ...]
    fields: _Fields = ()
    cached: bool = False
    widths: dict[Any, Any] = dataclasses.field(default_factory=dict)


@dataclass
class _Memory:
    """What experiments with a class and config found in this process, by the fields asked about."""

    tiny: TinyModel | Refusal | None = None
    by_fields: dict[_Fields, Experiments] = dataclasses.field(default_factory=dict)


def experiments_of(
    field_map: FieldMap, tiny: TinyModel | None = None, fields: _Fields = ()
) -> Experiments:
    """Return what experiments with a class and config found; they run once.

    If each of the ``fields`` that are asked about can be pruned alone, the findings may be those of
    these fields only. Default: all fields. If ``tiny``, the tiny model whose own the config is, has
    more layers than the field map looks at, another is built.

    Raises:
        UnsupportedModelError: the class does not run with what the user's ``make_inputs=`` makes.
    """
    with ONE_AT_A_TIME:
        result = _remembered(field_map, tiny, fields)
    if isinstance(result.tiny, InputsRefusal):
        raise UnsupportedModelError(result.tiny.reason)
    return result


def _remembered(field_map: FieldMap, tiny: TinyModel | None, fields: _Fields) -> Experiments:
    """Return the experiments from memory or from the cache on disk, or run them."""
    memory = field_map.remembered.setdefault(_Memory, _Memory())
    if layer_lists(field_map.builder.model_class):
        fields = ()
    result: Experiments | None = memory.by_fields.get(()) or memory.by_fields.get(fields)
    if result is None:
        cache = nullcontext() if tiny is None else suspended()
        with one_thread(), same_random_state(), plain_autograd(), cache:
            result = _from_disk(field_map) or (_from_disk(field_map, fields) if fields else None)
            if result is None:
                result = _experimented(field_map, memory, tiny, fields)
        memory.by_fields[result.fields] = result
    return result


def _experimented(
    field_map: FieldMap, memory: _Memory, tiny: TinyModel | None, fields: _Fields
) -> Experiments:
    """Run the experiments; those with a generated class are the ones with its stock class."""
    if tiny is None and layer_lists(field_map.builder.model_class):
        return _with_own_layers(field_map)
    memory.tiny = memory.tiny or _with_fewest_layers(field_map, tiny)
    return _alone(field_map, memory.tiny, fields) or _every(field_map, memory.tiny)


def _with_own_layers(field_map: FieldMap) -> Experiments:
    """Return the experiments with a class whose layers have fields of their own."""
    uniform = uniform_map(field_map.builder, field_map.data, field_map.recipe.make_inputs)
    stock = experiments_of(uniform)
    if isinstance(stock.tiny, Refusal):
        return stock
    layers = LayerFindings(field_map, uniform, stock.tiny)
    findings = tuple(chain.from_iterable(map(layers.carried_over, stock.findings)))
    return Experiments(layers.tiny_model(), findings, cached=stock.cached)


def _with_fewest_layers(field_map: FieldMap, tiny: TinyModel | None) -> TinyModel | Refusal:
    """Return a tiny model with no more layers than the field map looks at.

    A tiny model that is given may have more, if the field map is around its own config. Then its
    widths are tiny already, and are compared at the full size that it was made from.
    """
    if tiny is None:
        return tiny_model(field_map)
    if not field_map.depth.steps:
        return tiny
    built = built_tiny_model(field_map, field_map.depth.data)
    if isinstance(built, Refusal) or built.partial > tiny.partial:
        built = tiny_model(field_map)
    if isinstance(built, Refusal):
        return built
    return dataclasses.replace(built, full_field_map=tiny.full_field_map)


def _every(field_map: FieldMap, tiny: TinyModel | Refusal) -> Experiments:
    """Run the experiments with the tiny model of a class, and keep what they find on disk.

    What is found in the tiny model is kept by the tiny config and how the class is run with it,
    which models of many sizes share; what comes of it at full size by the full config.
    """
    if isinstance(tiny, Refusal):
        _store(field_map, *_at_full_size(field_map), entry={"reason": tiny.reason})
        return Experiments(tiny, ())
    pairs = sorted(sorted(map(field_name, pair)) for pair in tiny.equal_by_chance)
    entries = tiny.field_map.depth.entry_names
    key = (_GROUPS, tiny.field_map.data, repr(tiny.recipe), pairs, entries)
    findings = _load(field_map, *key)
    if findings is None:
        findings = _found_once(tiny.equal_by_chance, tiny)
        _store(field_map, *key, entry=findings)
    at_full_size = (_checked_at_full_size(finding, field_map) for finding in findings)
    full = tiny.full_field_map
    checked = tuple(_unless_shared(finding, findings, full) for finding in at_full_size)
    return _stored_experiments(field_map, tiny, checked)


@once
def _found_once(_: Any, tiny: TinyModel) -> list[Finding]:
    """Return the findings with a tiny model, by the pairs that they leave out as chance."""
    return find_groups(tiny)


def _alone(field_map: FieldMap, tiny: TinyModel | Refusal, fields: _Fields) -> Experiments | None:
    """Run the experiments with some fields alone; ``None`` if only those with all fields tell.

    Those tell what has to be pruned with what, and which parts of a model no output shows where
    another field has the same value (see :func:`_unless_shared`).
    """
    if isinstance(tiny, Refusal):
        return None
    full = tiny.full_field_map.values
    equals = {f for own in fields for f, n in full.items() if f != own and n == full.get(own)}
    if any(may_be_unobserved(tiny, field) for field in equals):
        return None
    findings = []
    for field in fields:
        finding = find_alone(tiny, field)
        if finding is None or _checked_at_full_size(finding, field_map).reason is not None:
            return None
        findings.append(finding)
    return _stored_experiments(field_map, tiny, tuple(findings), fields) if fields else None


def _stored_experiments(
    field_map: FieldMap, tiny: TinyModel, findings: tuple[Finding, ...], fields: _Fields = ()
) -> Experiments:
    """Return the experiments with these findings, after keeping them in the cache on disk."""
    entry = {"findings": findings, "tiny": state_of(tiny.field_map)}
    _store(field_map, *_at_full_size(field_map, fields), entry=entry)
    return Experiments(tiny, findings, fields)


def _from_disk(field_map: FieldMap, fields: _Fields = ()) -> Experiments | None:
    """Return the experiments with a class and config from the cache on disk; None if none is."""
    entry = _load(field_map, *_at_full_size(field_map, fields))
    if entry is None:
        return None
    if "reason" in entry:
        return Experiments(Refusal(entry["reason"]), (), cached=True)
    tiny_map = from_state(field_map.builder, field_map.digest, entry["tiny"])
    tiny = stored_tiny_model(tiny_map, field_map)
    return Experiments(tiny, entry["findings"], fields, cached=True)


def _at_full_size(field_map: FieldMap, fields: _Fields = ()) -> tuple[Any, ...]:
    """Return the key in the cache on disk of what is found at full size, with some fields alone."""
    return ("widths", str(field_map.builder.dtype), field_map.data, fields)


def _load(field_map: FieldMap, *key: Any) -> Any:
    """Return what the cache on disk has of a class under a key; None if it has nothing."""
    return None if field_map.digest is None else load(entry_key(field_map.digest, *key))


def _store(field_map: FieldMap, *key: Any, entry: Any) -> None:
    """Put what was found of a class into the cache on disk."""
    if field_map.digest is not None:
        store(entry_key(field_map.digest, *key), entry)


def _checked_at_full_size(finding: Finding, field_map: FieldMap) -> Finding:
    """Return the finding, refused if less of it makes the class build what pruning cannot leave.

    The class is built with a quarter less and with half: some count may become 0, or a dimension
    that is in no group may change. If it refuses both, other unit counts are tried, up to
    ``_MOST_BUILDS`` in all; if it takes no other number, the finding is refused too.
    """
    if finding.reason is not None or not set(finding.fields) <= field_map.values.keys():
        return finding
    held = {dim.place for group in finding.groups for dim in group.dims}
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
        misfit = count_at_zero(field_map, smaller) or ungrouped_change(
            field_map, values, smaller, held
        )
        if misfit is not None:
            return Finding(finding.fields, reason=misfit.reason, disproved=True)
        taken |= shapes(smaller) != field_map.shapes
    return finding if taken or not reason else Finding(finding.fields, reason=reason)


def _unless_shared(finding: Finding, others: Sequence[Finding], full: FieldMap) -> Finding:
    """Return the finding, refused if an unobserved part of the model is as wide and may read it.

    Widths are compared at full size: in a tiny model, head counts equal other numbers by chance
    (Chameleon). Qwen2-VL's ``vision_config.hidden_size`` has to be the text's, which text alone
    cannot show.
    """
    unobserved = [field for other in others if other.unobserved for field in other.fields]
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


class LayerFindings:
    """What is found of a class whose layers have fields of their own.

    Args:
        field_map: the field map of the generated class.
        uniform: that of the stock class, with all layers alike.
        tiny: the tiny model of the stock class.
    """

    def __init__(self, field_map: FieldMap, uniform: FieldMap, tiny: TinyModel):
        self.field_map, self.uniform, self.stock_tiny = field_map, uniform, tiny
        self._layers = LayerFields(field_map.builder, field_map.data)
        self._own = self._layers.own
        self._names = {name: [name] for name in field_map.shapes}

    def tiny_model(self) -> TinyModel:
        """Return the generated class at the stock class's tiny widths, with all its layers.

        Raises:
            UnsupportedModelError: the class does not build it.
        """
        field_map, tiny_data = self.field_map, self.stock_tiny.field_map.data
        of_depth = {
            field for field, _ in changed_values(self.uniform.depth.data, self.uniform.data)
        }
        values: dict[FieldPath, Any] = {
            field: value
            for field, value in changed_values(self.uniform.depth.data, tiny_data)
            if field not in of_depth and KEY not in field
        }
        for (shared, number), field in self._own.items():
            value = self.stock_tiny.field_map.values.get(shared, value_at(tiny_data, shared))
            values[shared] = value
            # the stock class may have entries of its own (Gemma 4)
            entries = value_at(tiny_data, (*shared[:-1], KEY)) or {}
            like = self._like(number)
            of_layer: dict[Any, Any] = next((e for n, e in entries.items() if int(n) == like), {})
            values[field] = of_layer.get(shared[-1], value)
        data = with_values(field_map.data, values)
        recipe = self.stock_tiny.recipe
        builder = field_map.builder.with_attention(recipe.attention)
        full = builder.build(data)
        if isinstance(full, Refusal):
            raise UnsupportedModelError(
                f"{builder.model_class.__name__} does not build at tiny widths: {full.reason}"
            )
        data = config_json(builder.config(data), use_diff=False)
        alike = replace(self.stock_tiny.field_map, recipe=recipe)
        tiny_map = layer_map(builder, data, alike, self.uniform.depth)
        if tiny_map is None:
            tiny_map = learn(builder, builder.config(data), full, tiny=True, recipe=recipe)

        def build() -> Any:
            tiny = built_tiny_model(field_map, data)
            assert isinstance(tiny, TinyModel)  # the stock class runs with these values
            return tiny.run

        return TinyModel(lambda: tiny_map, field_map, build)

    def _like(self, number: int) -> int | None:
        """Return the layer of the stock class's tiny model that a layer is like."""
        names = (name for name in self.field_map.shapes if self._layers.layer_of(name) == number)
        return self._layers.layer_of(self.uniform.depth.canonical(next(names, "")))

    def carried_over(self, finding: Finding) -> Iterator[Finding]:
        """Yield what is found of a width in a class whose layers have own fields.

        One finding for each layer if they have fields of their own for it; else one for all.
        """
        own = [field for field in finding.fields if field in self._layers.shared]
        if not own:
            groups = tuple(group for group, _ in self._groups(finding))
            yield replace(finding, groups=groups)
        elif len(own) < len(finding.fields):
            yield Finding(
                finding.fields, reason="some of them are set for each layer, others are not"
            )
        else:
            by_layer: dict[int | None, list[TinyGroup]] = {}
            for group, layer in self._groups(finding):
                by_layer.setdefault(layer, []).append(group)
            for number in sorted(n for shared, n in self._own if shared == finding.fields[0]):
                fields = tuple(self._own[shared, number] for shared in finding.fields)
                groups = tuple(
                    _with_fields(group, dict(zip(finding.fields, fields, strict=True)))
                    for group in by_layer.get(number, ())
                )
                if groups or finding.reason is not None:
                    yield replace(finding, fields=fields, groups=groups)

    def _groups(self, finding: Finding) -> Iterator[tuple[TinyGroup, int | None]]:
        """Yield each group at full depth, and the layer that it lies in; ``None``: in several."""
        for group in finding.groups:
            sources = dict(zip(group.dims, group.sources, strict=True))
            for instance in instances(group, self.uniform, self._names):
                pairs = [
                    (TensorDim(key.rpartition("#")[0], dim.dim, dim.layout), sources[dim])
                    for key, dim in instance.items()
                ]
                dims, of_dims = zip(*pairs, strict=True)
                layers = {self._layers.layer_of(dim.name) for dim in dims}
                alone = layers.pop() if len(layers) == 1 else None
                yield replace(group, dims=dims, sources=of_dims), alone


def _with_fields(group: TinyGroup, own: dict[FieldPath, FieldPath]) -> TinyGroup:
    """Return a group with other fields, by the fields that it has."""
    return replace(
        group,
        fields=tuple(own[field] for field in group.fields),
        sources=tuple(None if source is None else own[source] for source in group.sources),
    )
