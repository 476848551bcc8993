"""Learn which config fields set which dimensions, by building the model class; once per config.

One field gets another value, and the class is built again on the meta device. Every dimension whose
size changes depends on that field. No field, layer or architecture is known by name.

Before, the config has to build exactly the modules and tensors of the live model (at the end).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate, product
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import UnsupportedModelError, listed
from ..forward.run_recipe import MakeInputs, RunRecipe
from ..model.build import Builder, Refusal
from ..model.config_json import (
    EntryOfKind,
    FieldPath,
    config_json,
    config_nodes,
    field_name,
    is_own,
    is_plain,
    value_at,
)
from ..model.disk_cache import class_digest, entry_key, folder, load, store
from ..model.layer_class import layer_lists
from ..model.shapes import Mismatch, Shapes, compare, named_modules, shapes
from ..model.surroundings import ONE_AT_A_TIME, plain_autograd, replaced, same_random_state
from .fewer_layers import settings_of_left
from .field_map import Depth, FieldMap, from_state, state_of
from .layer_kinds import lists_of
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
    builder: Builder, config: PreTrainedConfig, full: nn.Module, make_inputs: MakeInputs | None
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
    values = {**declared, **implied}
    study = Study(builder, depth, implied, study.recipe, values=values)
    probes, must_equal = sensitivities(study)
    ratio_partners = find_ratio_partners(study)
    probes |= let_follow(study, ratio_partners)
    in_proportion = {
        field for follower, rule in study.ratio_rules.items() for field in (follower, *rule.fields)
    }
    expressions = fit_expressions(study, probes)
    moving = {field for expression in expressions.values() for field in expression.fields}
    powers, unfitted = fit_powers(study, probes, expressions)
    must_equal |= non_size_followers(study, moving)
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


_MOST = 16  # combinations of constructor arguments to try; classes of Transformers have two


def build_live(
    model: PreTrainedModel, buffers: bool = False
) -> tuple[Builder, nn.Module | Refusal]:
    """Return a builder for a live model, and what it builds from the model's config.

    The builder gets the constructor arguments that no config holds (BERT's ``add_pooling_layer``),
    if some build the model's tensors. With ``buffers``, buffers have values, on the CPU.
    """
    builder, data = Builder(model), config_json(model.config)
    built = builder.build(data, buffers=buffers)
    if isinstance(built, Refusal):
        return builder, built
    live = shapes(model)
    if not _differ(live, shapes(built)):
        return builder, built
    for options in _options(builder.model_class):
        candidate = Builder(model, options)
        candidate_model = candidate.build(data, buffers=buffers)
        if not isinstance(candidate_model, Refusal) and not _differ(live, shapes(candidate_model)):
            return candidate, candidate_model
    return builder, built


def _differ(live: Shapes, built: Shapes) -> bool:
    return bool(compare(live, built)) or live.keys() != built.keys()


def _options(model_class: type[nn.Module]) -> Iterator[dict[str, bool]]:
    """Yield constructor arguments to try: booleans unlike their defaults, fewest first."""
    switches = {
        name: parameter.default
        for name, parameter in inspect.signature(model_class.__init__).parameters.items()
        if isinstance(parameter.default, bool)
    }
    combinations = sorted(product((False, True), repeat=len(switches)), key=sum)
    for switched in combinations[1:_MOST]:
        chosen = zip(switches.items(), switched, strict=True)
        yield {name: not default for (name, default), flip in chosen if flip}


def notes_on_options(model: PreTrainedModel, builder: Builder) -> list[str]:
    if not builder.options:
        return []
    name = type(model).__name__
    given = ", ".join(f"{key}={value}" for key, value in builder.options.items())
    plain = Builder(model).shapes_at(config_json(model.config))
    other: Shapes = {} if isinstance(plain, Refusal) else plain
    added, left_out = parts_beyond(other, shapes(model)), parts_beyond(shapes(model), other)
    without = [f"{listed(added)} added with random values"] * bool(added)
    without += [f"{listed(left_out)} left out"] * bool(left_out)
    return [
        f"{name} was built with {given}, which no config stores. Load it with "
        f"{name}.from_pretrained(folder, {given}); otherwise you get {' and '.join(without)}"
    ]


def missing_parts(
    model: PreTrainedModel, builder: Builder, built: nn.Module, live: Shapes
) -> Refusal | None:
    """Return which parts the config builds that the model lacks, with advice; None if none."""
    parts = parts_beyond(shapes(built), live)
    if not parts:
        return None
    return Refusal(
        f"the config builds {listed(parts)}, which the model does not have, so a reload would add "
        f"{'it' if len(parts) == 1 else 'them'} with random values. "
        + _advice(model, builder, built, live)
    )


def _advice(model: PreTrainedModel, builder: Builder, built: nn.Module, live: Shapes) -> str:
    from transformers import PreTrainedModel

    data = config_json(model.config, use_diff=False)
    changes = settings_of_left(builder, data, built, live)
    if changes:
        settings = [
            f"config.{field_name(field)} "
            + (
                f"= {value}"
                if type(value) is int
                else f"to the entries of the {len(value)} layers that remain"
            )
            for field, value in changes.items()
        ]
        return f"Set {' and '.join(settings)}."
    inside = (name for name, part in model.named_modules() if isinstance(part, PreTrainedModel))
    inner = next(filter(None, inside), None)
    advice = (
        f"No number of layers in {type(model.config).__name__} describes this model: put the "
        "missing part back"
    )
    if inner is None:
        return f"{advice}."
    kind = type(model.get_submodule(inner)).__name__
    return f"{advice}, or prune only the {kind} inside (model.{inner})."


def notes_on_layer_order(model: nn.Module, built: nn.Module) -> list[str] | Refusal:
    """Return notes on layers that were moved, or why the config does not build the new order."""
    notes: list[str] = []
    live = dict(named_modules(model))
    for name, layers in lists_of(built).items():
        names = [f"{name}.{place}" for place in range(len(layers))]
        live_layers = [live[one] for one in names if one in live]
        if not len(live_layers) == len(layers) > 1:
            continue
        # a class stores a layer's number when it builds the layer (``layer_idx``)
        built_facts, live_facts = [[_facts(one) for one in each] for each in (layers, live_layers)]
        numbering = [
            key for key in built_facts[0] if _counts_up([one.get(key) for one in built_facts])
        ]
        moved = [
            place
            for place, facts in enumerate(live_facts)
            if any(facts.get(key) != built_facts[place][key] for key in numbering)
        ]
        if not moved:
            continue
        for key in (one for one in built_facts[0] if one not in numbering):
            for place in moved if _varies(key, built_facts) or _varies(key, live_facts) else ():
                if live_facts[place].get(key) != built_facts[place].get(key):
                    what = ".".join(filter(None, (name, str(place), *key)))
                    return Refusal(
                        f"the layers of {name} are in another order than they were built in: "
                        f"{what} is {live_facts[place].get(key)!r}, but the config builds "
                        f"{built_facts[place].get(key)!r} in this place. Put the config's entries "
                        "for single layers into the same order."
                    )
        notes += [
            f"the layers of {name} are not in their original order ({numbering[0][1]} says "
            f"{', '.join(str(one.get(numbering[0])) for one in live_facts)}). A reload numbers "
            "them again"
        ]
    return notes


def _facts(layer: nn.Module) -> dict[tuple[str, str], Any]:
    facts: dict[tuple[str, str], Any] = {}
    for name, module in named_modules(layer):
        facts[name, "class"] = type(module).__name__
        for key, value in vars(module).items():
            # a float may be a rate that is scheduled by depth
            if is_own(key) and is_plain(value) and not isinstance(value, float):
                facts[name, key] = value
    return facts


def _counts_up(values: Sequence[Any]) -> bool:
    first = values[0]
    return type(first) is int and list(values) == list(range(first, first + len(values)))


def _varies(key: tuple[str, str], layers: Sequence[Mapping[tuple[str, str], Any]]) -> bool:
    return any(facts.get(key) != layers[0].get(key) for facts in layers)


def parts_beyond(names: Shapes, others: Shapes) -> list[str]:
    """Return the outermost modules and tensors of ``names`` that ``others`` has no part of."""

    def prefixes(name: str) -> Iterator[str]:
        return accumulate(name.split("."), "{}.{}".format)

    present = {prefix for name in others for prefix in prefixes(name)}
    beyond = (
        next((part for part in prefixes(name) if part not in present), None) for name in names
    )
    return list(dict.fromkeys(part for part in beyond if part is not None))
