"""Run the experiments on a class and config once, and store the findings on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from ..errors import UnsupportedModelError
from ..fieldmap.field_map import FieldMap, count_at_zero, from_state, state_of, ungrouped_change
from ..fieldmap.learn_field_map import learn
from ..fieldmap.model_view import LayerFields, layer_map, uniform_map
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
from ..twin.layout import Finding, TinyGroup
from ..twin.tiny.tiny_model import (
    TinyModel,
    built_tiny_model,
    once,
    stored_tiny_model,
    tiny_model,
)
from .full_size import instances

_MOST_BUILDS = 64  # unit counts tried at full size
_GROUPS = "groups"  # key in the disk cache for the findings on a tiny model
_Fields = tuple[FieldPath, ...]


@dataclass(frozen=True)
class Experiments:
    """What the experiments on one class and config found."""

    tiny: TinyModel | Refusal  # or the class's refusal to run at tiny widths
    # groups of each width in the tiny model, or why it cannot be pruned
    findings: tuple[Finding, ...]
    fields: _Fields = ()  # that were pruned alone for ``findings``; empty: findings of all fields
    cached: bool = False  # read from the disk cache
    # names of the model's parameters (they show its ties) -> findings carried over to full size
    widths: dict[Any, Any] = dataclasses.field(default_factory=dict)


def experiments_of(
    field_map: FieldMap,
    tiny: TinyModel | None = None,  # the model itself if it is tiny
    fields: _Fields = (),  # if each can be pruned alone, other findings may be missing
) -> Experiments:
    """Return the experiments on a class and config, which run once; raise if no inputs work."""
    with ONE_AT_A_TIME:
        result = _remembered(field_map, tiny, fields)
    if isinstance(result.tiny, InputsRefusal):
        raise UnsupportedModelError(result.tiny.reason)
    return result


def _remembered(field_map: FieldMap, tiny: TinyModel | None, fields: _Fields) -> Experiments:
    by_fields: dict[_Fields, Experiments] = field_map.remembered.setdefault(Experiments, {})
    generated = bool(layer_lists(field_map.builder.model_class))
    fields = () if generated else fields
    result = by_fields.get(()) or by_fields.get(fields)
    if result is not None:
        return result
    cache = nullcontext() if tiny is None else suspended()
    with one_thread(), same_random_state(), plain_autograd(), cache:
        result = _from_disk(field_map) or (_from_disk(field_map, fields) if fields else None)
        if result is None and generated and tiny is None:
            result = _with_own_layers(field_map)
        if result is None:
            known = (other.tiny for other in by_fields.values() if not other.cached)
            small = next(known, None) or _with_fewest_layers(field_map, tiny)
            result = _alone(field_map, small, fields) or _every(field_map, small)
    by_fields[result.fields] = result
    return result


def _with_own_layers(field_map: FieldMap) -> Experiments:
    """Carry the experiments of the stock class over to the generated class."""
    uniform = uniform_map(field_map.builder, field_map.data, field_map.recipe.make_inputs)
    stock = experiments_of(uniform)
    if isinstance(stock.tiny, Refusal):
        return stock
    layers = LayerFindings(field_map, uniform, stock.tiny)
    findings = tuple(chain.from_iterable(map(layers.carried_over, stock.findings)))
    return Experiments(layers.tiny_model(), findings, cached=stock.cached)


def _with_fewest_layers(field_map: FieldMap, tiny: TinyModel | None) -> TinyModel | Refusal:
    """Return a tiny model with no more layers than the field map covers."""
    if tiny is None:
        return tiny_model(field_map)
    if not field_map.depth.steps:
        return tiny
    built = built_tiny_model(field_map, field_map.depth.data)
    if isinstance(built, Refusal) or built.partial > tiny.partial:
        built = tiny_model(field_map)
    if isinstance(built, Refusal):
        return built
    # its widths are tiny already: compare at the full size that ``tiny`` was made from
    return replace(built, full_field_map=tiny.full_field_map)


def _every(field_map: FieldMap, tiny: TinyModel | Refusal) -> Experiments:
    """Run the experiments on all fields, and store the findings on disk."""
    if isinstance(tiny, Refusal):
        return _stored(field_map, tiny)
    pairs = sorted(sorted(map(field_name, pair)) for pair in tiny.equal_by_chance)
    entries = tiny.field_map.depth.entry_names
    # models of many sizes share a tiny config, and so its findings
    key = (_GROUPS, tiny.field_map.data, repr(tiny.recipe), pairs, entries)
    findings = _load(field_map, *key)
    if findings is None:
        findings = _found_once(tiny.equal_by_chance, tiny)
        _store(field_map, *key, entry=findings)
    at_full_size = (_checked_at_full_size(finding, field_map) for finding in findings)
    full = tiny.full_field_map
    checked = tuple(_unless_shared(finding, findings, full) for finding in at_full_size)
    return _stored(field_map, tiny, checked)


@once
def _found_once(_: Any, tiny: TinyModel) -> list[Finding]:
    """Find the groups, once per set of field pairs that are equal only by chance."""
    return find_groups(tiny)


def _alone(field_map: FieldMap, tiny: TinyModel | Refusal, fields: _Fields) -> Experiments | None:
    """Run the experiments on some fields alone; None if all fields have to be examined."""
    if isinstance(tiny, Refusal):
        return None
    # only all fields show whether an unobserved part has this width too (_unless_shared)
    full = tiny.full_field_map.values
    equals = {f for own in fields for f, n in full.items() if f != own and n == full.get(own)}
    if any(may_be_unobserved(tiny, field) for field in equals):
        return None
    findings = []
    for field in fields:
        finding = find_alone(tiny, field)  # None: not proved alone
        if finding is None or _checked_at_full_size(finding, field_map).reason is not None:
            return None
        findings.append(finding)
    return _stored(field_map, tiny, tuple(findings), fields) if fields else None


def _stored(
    field_map: FieldMap,
    tiny: TinyModel | Refusal,
    findings: tuple[Finding, ...] = (),
    fields: _Fields = (),
) -> Experiments:
    entry: dict[str, Any]
    if isinstance(tiny, Refusal):
        entry = {"reason": tiny.reason}
    else:
        entry = {"findings": findings, "tiny": state_of(tiny.field_map)}
    _store(field_map, *_at_full_size(field_map, fields), entry=entry)
    return Experiments(tiny, findings, fields)


def _from_disk(field_map: FieldMap, fields: _Fields = ()) -> Experiments | None:
    entry = _load(field_map, *_at_full_size(field_map, fields))
    if entry is None:
        return None
    if "reason" in entry:
        return Experiments(Refusal(entry["reason"]), (), cached=True)
    tiny_map = from_state(field_map.builder, field_map.digest, entry["tiny"])
    tiny = stored_tiny_model(tiny_map, field_map)
    return Experiments(tiny, entry["findings"], fields, cached=True)


def _at_full_size(field_map: FieldMap, fields: _Fields = ()) -> tuple[Any, ...]:
    return ("widths", str(field_map.builder.dtype), field_map.data, fields)


def _load(field_map: FieldMap, *key: Any) -> Any:
    return None if field_map.digest is None else load(entry_key(field_map.digest, *key))


def _store(field_map: FieldMap, *key: Any, entry: Any) -> None:
    if field_map.digest is not None:
        store(entry_key(field_map.digest, *key), entry)


def _checked_at_full_size(finding: Finding, field_map: FieldMap) -> Finding:
    """Refuse a finding if the class, built with fewer units, differs from what pruning leaves."""
    if finding.reason is not None or not set(finding.fields) <= field_map.values.keys():
        return finding
    held = {dim.place for group in finding.groups for dim in group.dims}
    units = units_of(field_map, finding.fields)
    reason, taken = "", False
    # a quarter less and half; if the class refuses both, other counts
    unit_counts = dict.fromkeys((units - units // 4, units - units // 2, *range(units - 1, 0, -1)))
    for builds, units_left in enumerate(islice(unit_counts, _MOST_BUILDS)):
        if taken and builds > 1:
            break
        values = {field: field_map.values[field] // units * units_left for field in finding.fields}
        smaller = field_map.build_at(values)
        if isinstance(smaller, Refusal):
            reason = f"the class accepts no smaller number: {smaller.reason}"
            continue
        # a count became 0, or a dimension outside the groups changed
        misfit = count_at_zero(field_map, smaller) or ungrouped_change(
            field_map, values, smaller, held
        )
        if misfit is not None:
            return Finding(finding.fields, reason=misfit.reason, disproved=True)
        taken |= shapes(smaller) != field_map.shapes
    return finding if taken or not reason else Finding(finding.fields, reason=reason)


def _unless_shared(finding: Finding, others: Sequence[Finding], full: FieldMap) -> Finding:
    """Refuse a finding if an unobserved part of the model is as wide and may read it."""
    # Qwen2-VL's vision_config.hidden_size has to equal the text's, which text alone cannot show.
    # Compared at full size: tiny head counts equal other numbers by chance (Chameleon).
    if finding.reason is not None:
        return finding
    widths = {full.values.get(own) for own in finding.fields}
    for field in (field for other in others if other.unobserved for field in other.fields):
        # of its own fields all was observed, or the finding would have a reason already
        if field not in finding.fields and full.values.get(field) in widths:
            reason = "has the same width, and its part of the model did not run"
            return Finding(finding.fields, reason=f"{field_name(field)} {reason}")
    return finding


class LayerFindings:
    """Carries findings of a stock class over to the generated class with per-layer fields."""

    def __init__(self, field_map: FieldMap, uniform: FieldMap, tiny: TinyModel):
        self.field_map, self.uniform, self.stock_tiny = field_map, uniform, tiny
        self._layers = LayerFields(field_map.builder, field_map.data)
        self._own = self._layers.own

    def tiny_model(self) -> TinyModel:
        """Build the generated class with all layers, at the stock class's tiny widths, or raise."""
        field_map, tiny_data = self.field_map, self.stock_tiny.field_map.data
        shallow = self.uniform.depth.data
        of_depth = {field for field, _ in changed_values(shallow, self.uniform.data)}
        values: dict[FieldPath, Any] = {
            field: value
            for field, value in changed_values(shallow, tiny_data)
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
                f"{builder.model_class.__name__} cannot be built at tiny widths: {full.reason}"
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
        """Return the layer of the stock class's tiny model that corresponds to a layer."""
        names = (name for name in self.field_map.shapes if self._layers.layer_of(name) == number)
        return self._layers.layer_of(self.uniform.depth.canonical(next(names, "")))

    def carried_over(self, finding: Finding) -> Iterator[Finding]:
        """Yield one finding per layer if layers have own fields for the width; else one."""
        shared = [field for field in finding.fields if field in self._layers.shared]
        if not shared:
            groups = tuple(group for group, _ in self._groups(finding))
            yield replace(finding, groups=groups)
        elif len(shared) < len(finding.fields):
            yield Finding(
                finding.fields, reason="some of these fields are set for each layer, others are not"
            )
        else:
            by_layer: dict[int | None, list[TinyGroup]] = {}
            for group, layer in self._groups(finding):
                by_layer.setdefault(layer, []).append(group)
            for number in sorted(n for field, n in self._own if field == finding.fields[0]):
                own = {field: self._own[field, number] for field in finding.fields}
                groups = tuple(
                    replace(
                        group,
                        fields=tuple(own[field] for field in group.fields),
                        sources=tuple(source and own[source] for source in group.sources),
                    )
                    for group in by_layer.get(number, ())
                )
                if groups or finding.reason is not None:
                    yield replace(finding, fields=tuple(own.values()), groups=groups)

    def _groups(self, finding: Finding) -> Iterator[tuple[TinyGroup, int | None]]:
        """Yield each group at full depth, with its layer; None if it spans several."""
        for group in finding.groups:
            sources = dict(zip(group.dims, group.sources, strict=True))
            for instance in instances(group, self.uniform, self.field_map.shapes):
                dims = tuple(replace(dim, name=name) for name, dim in instance)
                of_dims = tuple(sources[dim] for _, dim in instance)
                layers = {self._layers.layer_of(name) for name, _ in instance}
                alone = layers.pop() if len(layers) == 1 else None
                yield replace(group, dims=dims, sources=of_dims), alone
