"""Learn which config fields set which dimensions, by asking the model class itself.

One field is changed, the class is built again without data, and every dimension that moved belongs
to that field.  No field, layer or architecture is known by name.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import nn

from . import lines
from .depth import Depth, shallow
from .dry_pass import dry_pass
from .errors import UnsupportedModelError
from .fields import candidates
from .heads import Layout
from .proportion import let_follow, partners
from .reference import (
    Builder,
    FieldPath,
    Mismatch,
    Refusal,
    compare,
    config_json,
    listed,
    shapes,
    with_values,
)
from .solve import Expression, Observable, Power, followed
from .study import Study
from .whole import build_live, order_of_layers, unbuilt_parts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, eq=False)
class ConfigMap:
    """What a class builds from its config, as far as widths go.

    Attributes:
        builder: builds the class.
        data: the config's JSON when it was learned, with every default.
        values: the fields that set something, with the value that ``data`` has or implies.
        unset: those of them that ``data`` leaves to a default (``None`` or absent).
        expressions: how the fields make each observable of the shallow model.
        depth: the shallow config, and how names map onto it.
        layout: how the forward pass takes the shallow model's projections apart.
        linked: field -> the field whose value it has to have too (OPT's ``word_embed_proj_dim``
            and ``hidden_size``: apart, the class builds other layers).
        bound: widths that the class takes no other value of alone, and the fields that would have
            to move with each (Mamba 2: hidden size times ``expand`` is heads times head dim).
        follows: one field of each such proportion, and how it follows from the others.
        sizes: ``values``, and fields that set dimensions along no straight line (an image's size).
        powers: dimensions along no straight line that are powers of fields (hidden over heads).
        loose: dimensions that follow no such rule (rounded ones), and the fields that move them.
        silent: other whole numbers that the class reads, and that set no dimension.
    """

    builder: Builder
    data: dict[str, Any]
    values: dict[FieldPath, int]
    unset: frozenset[FieldPath]
    expressions: dict[Observable, Expression]
    depth: Depth
    layout: Layout
    linked: dict[FieldPath, FieldPath] = field(default_factory=dict)
    bound: dict[FieldPath, tuple[FieldPath, ...]] = field(default_factory=dict)
    follows: dict[FieldPath, Power] = field(default_factory=dict)
    sizes: dict[FieldPath, int] = field(default_factory=dict)
    powers: dict[Observable, Power] = field(default_factory=dict)
    loose: dict[Observable, frozenset[FieldPath]] = field(default_factory=dict)
    silent: dict[FieldPath, int] = field(default_factory=dict)

    def count_fields(self) -> frozenset[FieldPath]:
        """The fields that set into how many heads a projection's output is split."""
        return frozenset(
            path
            for (_, which), expression in self.expressions.items()
            if isinstance(which, str)
            for path in expression.fields
        )

    def moves_shapes(self, path: FieldPath) -> bool:
        """Whether a field is to be seen in some tensor's shape."""
        return any(
            isinstance(which, int) and path in expression.fields
            for (_, which), expression in self.expressions.items()
        )

    def config_at(self, values: Mapping[FieldPath, int], shallow: bool = True) -> dict[str, Any]:
        """The config with some fields at other values; what is linked or in proportion follows.

        Unset fields are set to what they imply, so that they do not follow others.
        """
        full: dict[FieldPath, int | None] = {path: self.values[path] for path in self.unset}
        full.update({**values, **followed(self.follows, values)})
        for follower, leader in self.linked.items():
            if leader in values:
                full[follower] = values[leader]
        return with_values(self.depth.data if shallow else self.data, full)

    def build_at(self, values: Mapping[FieldPath, int]) -> nn.Module | Refusal:
        """The shallow model with some fields at other values, on the meta device."""
        return self.builder.build(self.config_at(values))

    @cached_property
    def unpruned(self) -> nn.Module | Refusal:
        """The shallow model as it was learned."""
        return self.build_at({})

    @cached_property
    def runs(self) -> bool:
        """Whether the shallow model makes a pass without data, in float32."""
        model = self.build_at({})
        return not isinstance(model, Refusal) and not isinstance(dry_pass(model.float()), Refusal)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the shallow model."""
        return {} if isinstance(self.unpruned, Refusal) else shapes(self.unpruned)

    def splits_of(self, name: str) -> tuple[tuple[int, ...], ...] | None:
        """How a layer of the full model, by its name, has its output split into heads."""
        return self.layout.heads.get(self.depth.canonical(name))

    def fields_of(self, name: str, which: int | str) -> frozenset[FieldPath]:
        """The fields that set one observable of the full model."""
        expression = self.expressions.get((self.depth.canonical(name), which))
        return expression.fields if expression else frozenset()


_known: OrderedDict[tuple[Any, ...], ConfigMap] = OrderedDict()
_KEPT = 32


def map_of(
    model: PreTrainedModel, live: tuple[Builder, nn.Module | Refusal] | None = None
) -> ConfigMap:
    """The map of a live model's class around its config; learned once per config.

    Args:
        model: the live model.
        live: what ``build_live`` gives of it, where that was done already.

    Raises:
        UnsupportedModelError: the config does not build the model that it belongs to, or no field
            of it sets a width (a timm architecture goes by its name).
    """
    builder, full = live or build_live(model)
    if isinstance(full, Refusal):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be built from its own config: "
            f"{full.reason.rstrip('.')}. Mend model.config first."
        )
    mismatches = compare(shapes(model), shapes(full))
    if mismatches:
        raise UnsupportedModelError(_disagreement(model, mismatches))
    beyond = unbuilt_parts(model, builder, full, shapes(model)) or order_of_layers(model, full)[0]
    if beyond is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} and its config disagree before any pruning: {beyond}"
        )
    options = tuple(builder.options.items())
    key = (type(model), model.config.to_json_string(use_diff=False), builder.dtype, options)
    if key not in _known:
        with _old_objects_aside():
            _known[key] = learn(builder, model.config, full)
        while len(_known) > _KEPT:
            _known.popitem(last=False)
    known = _known[key]
    if not known.values and not known.bound:
        raise UnsupportedModelError(
            f"no field of {type(model.config).__name__} sets a width of {type(model).__name__}, so "
            "no config can say what is pruned of it. Prune a class whose config holds its widths."
        )
    return known


@contextmanager
def _old_objects_aside() -> Iterator[None]:
    """Spare the garbage collector what was there before: hundreds of builds wake it often."""
    if gc.get_freeze_count():  # somebody else's
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _disagreement(model: PreTrainedModel, mismatches: Sequence[Mismatch]) -> str:
    name = type(model).__name__
    if any("lora_" in mismatch.name or ".base_layer." in mismatch.name for mismatch in mismatches):
        advice = "It has PEFT adapters: merge them first (model.merge_and_unload())."
    else:
        advice = "Attach the hook before pruning, with the config that the model was loaded with."
    return f"{name} and its config disagree before any pruning: {listed(mismatches)}. {advice}"


def learn(
    builder: Builder, config: PreTrainedConfig, full: nn.Module, tiny: bool = False
) -> ConfigMap:
    """Learn the map of one model class around one config.

    Args:
        builder: builds the class.
        config: the config to learn around.
        full: the class built from that config, without data.
        tiny: of a tiny copy, whose layers all count and of which no width is left to a default.
    """
    data = config_json(config, use_diff=False)
    depth = Depth(data) if tiny else shallow(builder, data, full)
    declared, unset = candidates(builder, config, depth.data)
    study = Study(builder, depth, {})
    implied = study.free({} if tiny else study.all_implied(unset), declared)
    study = Study(builder, depth, implied)
    values = {**declared, **implied}
    moves, linked = study.moves(values)
    bound = partners(study, values)
    moves |= let_follow(study, bound, values)
    together = {
        path for follower, rule in study.follows.items() for path in (follower, *rule.fields)
    }
    expressions = lines.expressions(study, values, moves)
    moving = {path for expression in expressions.values() for path in expression.fields}
    powers, loose = lines.powers(study, values, moves, expressions)
    linked |= study.dragged(values, moving)
    sized = moves.keys() | linked.keys() | together
    return ConfigMap(
        builder=builder,
        data=data,
        values={p: value for p, value in values.items() if p in moving | together | set(linked)},
        unset=frozenset(path for path in implied if path in moving),
        expressions=expressions,
        depth=depth,
        layout=study.layout,
        linked=linked,
        bound=bound,
        follows=study.follows,
        sizes={path: value for path, value in values.items() if path in sized},
        silent={path: value for path, value in declared.items() if path not in sized},
        powers=powers,
        loose=loose,
    )
