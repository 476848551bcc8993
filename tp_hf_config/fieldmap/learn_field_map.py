"""Learn which config fields set which dimensions, by building the model class; once per config.

One field gets another value, and the class is built again on the meta device. Every dimension whose
size changes depends on that field. No field, layer or architecture is known by name.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import UnsupportedModelError, listed
from ..forward.run_recipe import MakeInputs, RunRecipe
from ..model.build import Builder, Refusal
from ..model.config_json import EntryOfKind, FieldPath, config_json, config_nodes, value_at
from ..model.disk_cache import class_digest, entry_key, folder, load, store
from ..model.layer_class import layer_lists
from ..model.shapes import Mismatch, compare, shapes
from ..model.surroundings import ONE_AT_A_TIME, plain_autograd, replaced, same_random_state
from .completeness import build_live, missing_parts, notes_on_layer_order
from .field_map import Depth, FieldMap, from_state, state_of
from .lower_depth import shallow
from .probe import Study
from .sensitivity import (
    all_implied,
    find_ratio_partners,
    fit_expressions,
    fit_powers,
    independent,
    let_follow,
    non_size_followers,
    sensitivities,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


# takes a builder, a config, its build and the user's inputs
Learn = Callable[[Builder, Any, nn.Module, MakeInputs | None], FieldMap]
_learned: OrderedDict[tuple[Any, ...], FieldMap] = OrderedDict()
_MOST_MAPS = 32


def map_of(
    model: PreTrainedModel,
    live: tuple[Builder, nn.Module | Refusal] | None = None,
    make_inputs: MakeInputs | None = None,
    how: Learn | None = None,
) -> FieldMap:
    """Return the field map of a live model's class around its config; learned once per config."""
    builder, full = live or build_live(model)
    full = whole_build(model, builder, full)
    field_map = _learned_once(builder, model.config, full, make_inputs, how or stored_or_learned)
    if not _says_widths(field_map):  # a timm architecture is chosen by its name
        raise UnsupportedModelError(
            f"no field of {type(model.config).__name__} sets a width of {type(model).__name__}, so "
            "no config can describe the pruned model. Prune a class whose config contains its "
            "widths."
        )
    return field_map


def _says_widths(field_map: FieldMap) -> bool:
    return bool(field_map.values or field_map.ratio_partners)


def whole_build(model: PreTrainedModel, builder: Builder, built: nn.Module | Refusal) -> nn.Module:
    """Return what the config builds, or raise if the model's tensors or layers differ."""
    if isinstance(built, Refusal):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be built from its own config: "
            f"{built.reason.rstrip('.')}. Correct model.config first."
        )
    mismatches = compare(shapes(model), shapes(built))
    if mismatches:
        raise UnsupportedModelError(_disagreement(model, mismatches))
    missing = missing_parts(model, builder, built, shapes(model))
    disagreement = missing or notes_on_layer_order(model, built)
    if isinstance(disagreement, Refusal):
        raise UnsupportedModelError(
            f"{type(model).__name__} and its config disagree before any pruning: "
            f"{disagreement.reason}"
        )
    return built


def map_at(
    builder: Builder, data: dict[str, Any], make_inputs: MakeInputs | None = None
) -> FieldMap | Refusal:
    """Return the field map of a class around a config's JSON, learned once, or its refusal."""
    full = builder.build(data)
    if isinstance(full, Refusal):
        return full
    return _learned_once(builder, builder.config(data), full, make_inputs, stored_or_learned)


def _learned_once(
    builder: Builder,
    config: PreTrainedConfig,
    full: nn.Module,
    make_inputs: MakeInputs | None,
    how: Learn,
) -> FieldMap:
    options = tuple(builder.options.items())
    data = config.to_json_string(use_diff=False)
    # the map holds the function, so that no other one gets its id
    key = (builder.model_class, data, builder.dtype, options, id(make_inputs))
    with ONE_AT_A_TIME:
        if key not in _learned:
            with same_random_state(), plain_autograd():
                _learned[key] = how(builder, config, full, make_inputs)
            while len(_learned) > _MOST_MAPS:
                _learned.popitem(last=False)
        return _learned[key]


def stored_or_learned(
    builder: Builder,
    config: PreTrainedConfig,
    full: nn.Module,
    make_inputs: MakeInputs | None,
) -> FieldMap:
    # in another process the user's function may make other inputs
    cached = folder() is not None and make_inputs is None
    digest = class_digest(builder, full) if cached else None
    if digest is None:
        return learn(builder, config, full, make_inputs=make_inputs)
    data = config_json(config, use_diff=False)
    key = entry_key(digest, "field map", str(builder.dtype), data)
    state = load(key)
    if state is not None:
        return from_state(builder, digest, {**state, "data": data})
    field_map = dataclasses.replace(learn(builder, config, full), digest=digest)
    if _says_widths(field_map):
        store(key, state_of(field_map))
    return field_map


def _disagreement(model: PreTrainedModel, mismatches: Sequence[Mismatch]) -> str:
    name = type(model).__name__
    if any("lora_" in mismatch.name or ".base_layer." in mismatch.name for mismatch in mismatches):
        advice = "It has PEFT adapters: merge them first (model.merge_and_unload())."
    else:
        advice = "Attach the hook before pruning, with the config that the model was loaded with."
    what = listed(mismatches, "; ")
    return f"{name} and its config disagree before any pruning: {what}. {advice}"


def learn(
    builder: Builder,
    config: PreTrainedConfig,
    full: nn.Module,
    tiny: bool = False,
    recipe: RunRecipe | None = None,
    make_inputs: MakeInputs | None = None,
    entries: Mapping[FieldPath, tuple[EntryOfKind, ...]] | None = None,
) -> FieldMap:
    """Learn the field map around a config; ``full`` is built from it, ``entries`` are Depth's."""
    data = config_json(config, use_diff=False)
    every_layer = tiny or bool(layer_lists(builder.model_class))  # each has fields of its own
    kept = Depth(data, entries=entries or {})
    depth = kept if every_layer else shallow(builder, data, full)
    declared, unset = candidates(builder, depth.data)
    declared = depth.by_kinds(declared)
    study = Study(builder, depth, {}, recipe, make_inputs)
    implied = independent(study, {} if tiny else all_implied(study, unset), declared)
    study = Study(builder, depth, implied, study.recipe)
    values = {**declared, **implied}
    probes, must_equal = sensitivities(study, values)
    ratio_partners = find_ratio_partners(study, values)
    probes |= let_follow(study, ratio_partners, values)
    in_proportion = {
        field for follower, rule in study.ratio_rules.items() for field in (follower, *rule.fields)
    }
    expressions = fit_expressions(study, values, probes)
    moving = {field for expression in expressions.values() for field in expression.fields}
    powers, unfitted = fit_powers(study, values, probes, expressions)
    must_equal |= non_size_followers(study, values, moving)
    with_effect = probes.keys() | must_equal.keys() | in_proportion
    return FieldMap(
        builder=builder,
        data=data,
        values={
            p: value for p, value in values.items() if p in moving | in_proportion | set(must_equal)
        },
        unset=frozenset(field for field in implied if field in moving),
        expressions=expressions,
        depth=depth,
        splits=study.splits,
        must_equal=must_equal,
        ratio_partners=ratio_partners,
        ratio_rules=study.ratio_rules,
        sizes={field: value for field, value in values.items() if field in with_effect},
        non_size_fields={
            field: value for field, value in declared.items() if field not in with_effect
        },
        powers=powers,
        unfitted=unfitted,
        recipe=study.recipe,
    )


_FEW = 64  # a dictionary in a config with more entries holds no widths


def candidates(
    builder: Builder, data: dict[str, Any]
) -> tuple[dict[FieldPath, int], list[FieldPath]]:
    """Return the whole numbers above 0 that the class reads, with values, and the unset fields."""
    # also undeclared ones: ``getattr(config, "head_dim", None)``
    declared: dict[FieldPath, int] = {}
    unset: list[FieldPath] = []
    config = builder.config(data)
    for config_class, field, value in _fields_read(data, config, lambda: builder.build(data)):
        declared.update(_whole_numbers(value, field))
        name = str(field[-1])
        own = not name.startswith("_") and not _is_machinery(name)
        if value is None and own and _takes_numbers(config_class, name):
            unset.append(field)
    return declared, sorted(unset, key=lambda field: str(field[-1]))  # same names side by side


def numbers_read(
    builder: Builder, data: dict[str, Any], run: Callable[[nn.Module], Any]
) -> dict[FieldPath, int]:
    """Return the whole numbers above 0 that the class reads while ``run`` runs its model."""
    model: Any = builder.build(data)
    if isinstance(model, Refusal):
        return {}
    read = _fields_read(data, model.config, lambda: run(model))
    return {
        key: number
        for _, field, value in read
        for key, number in _whole_numbers(value, field).items()
    }


def _fields_read(
    data: dict[str, Any], config: Any, act: Callable[[], Any]
) -> Iterator[tuple[type, FieldPath, Any]]:
    """Yield what ``act`` reads of a config and those inside it: config class, field, value."""
    nodes = dict(config_nodes(config))
    with _recording_reads({type(node) for node in nodes.values()}) as reads:
        act()
    for nested, node in nodes.items():
        part = value_at(data, nested)
        for name in sorted(reads[type(node)]):
            if (*nested, name) not in nodes:
                value = part.get(name) if isinstance(part, dict) else None
                yield type(node), (*nested, name), value


def _whole_numbers(value: Any, field: FieldPath) -> dict[FieldPath, int]:
    return {key: n for key, n in _entries(value, field) if type(n) is int and n > 0}


def _takes_numbers(config_class: type, name: str) -> bool:
    """True if a field's annotation allows whole numbers, or if the field is not declared."""
    declared = getattr(config_class, "__dataclass_fields__", {}).get(name)
    return declared is None or any(word in str(declared.type) for word in ("int", "Any"))


def _entries(value: Any, field: FieldPath) -> Iterator[tuple[FieldPath, Any]]:
    if isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _entries(entry, (*field, index))
    elif isinstance(value, dict):  # a large one holds label names
        for key, entry in value.items() if len(value) <= _FEW else ():
            yield from _entries(entry, (*field, key))
    else:
        yield field, value


def _is_machinery(name: str) -> bool:
    """True if every config has this method or constant; ``num_labels`` is neither."""
    from transformers import PretrainedConfig

    attribute = getattr(PretrainedConfig, name, None)
    if isinstance(attribute, property):
        return attribute.fset is None
    return hasattr(PretrainedConfig, name)


@contextmanager
def _recording_reads(classes: set[type]) -> Iterator[dict[type, set[str]]]:
    """Record which attributes this thread reads from configs of these classes."""
    # a config is read while it is constructed, too, so only its class can record that
    reads: dict[type, set[str]] = {cls: set() for cls in classes}

    def recorder(cls: type, inherited: Any) -> Any:
        def __getattribute__(self: Any, key: str) -> Any:
            if not key.startswith("__"):
                reads[cls].add(inherited(self, "attribute_map").get(key, key))
            return inherited(self, key)

        return __getattribute__

    with ExitStack() as stack:
        for cls in classes:
            recording = recorder(cls, cls.__getattribute__)
            stack.enter_context(replaced(cls, "__getattribute__", recording))
        yield reads
