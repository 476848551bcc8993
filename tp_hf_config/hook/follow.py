"""Find and prove the config of a pruned model, and write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigSyncError, UnsupportedModelError, listed
from ..fieldmap.field_map import Quantity
from ..fieldmap.layer_kinds import names_in_code
from ..fieldmap.learn_field_map import (
    missing_parts,
    notes_on_layer_order,
    notes_on_options,
    parts_beyond,
)
from ..fieldmap.lower_depth import of_every_config
from ..fieldmap.model_view import view_of
from ..fieldmap.solve import (
    Conflict,
    build_with_shapes,
    explain_conflict,
    explain_mismatch,
    explain_refusal,
    explain_unfilled,
    explain_vanished,
    fit,
)
from ..forward.head_splits import counts_of, heads_of, splits_after
from ..forward.run_recipe import MakeInputs, encoder_states_of
from ..graph.config_graph import Place
from ..model.build import Builder, Refusal
from ..model.config_json import (
    FieldPath,
    changed_values,
    config_json,
    field_name,
    is_own,
    plain_fields,
    value_at,
    with_values,
    without_field,
)
from ..model.shapes import Shapes, shapes, vanished_counts
from ..model.tensors import ties_of
from .apply import Changes, Difference, all_or_nothing, difference, write, write_ties
from .report import LayerCut, SyncReport

# suffix in a history of the outputs of a projection other than ``nn.Linear`` (I-BERT's)
_ROWS = ".weight#0"

Splits = dict[str, tuple[tuple[int, ...], ...] | None]  # layer -> its head splits


@dataclass(frozen=True)
class Proof:
    """A config that describes a pruned model, and what else the pruned model changes."""

    shapes: Shapes  # tied weights under all their names
    splits: Splits
    inputs: dict[str, tuple[int, ...]]  # encoder states -> channels still read
    values: dict[FieldPath, int]
    data: dict[str, Any]  # the config's JSON
    build: nn.Module  # the class, built from it
    change: Difference  # from the build that was proved last
    notes: list[str]


class Follower:
    """Keeps the config of one pruner's model correct; raises if the model is not supported."""

    def __init__(self, pruner: Any, make_inputs: MakeInputs | None = None):
        self.pruner = pruner
        self.view = view_of(pruner.model, make_inputs)
        self.model, self.field_map = self.view.model, self.view.field_map
        self.reference = self.view.reference  # build from the config that was proved last
        order = notes_on_layer_order(self.model, self.reference)
        self.notes = [
            *notes_on_options(self.model, self.field_map.builder),
            *([] if isinstance(order, Refusal) else order),
        ]
        self.ties = ties_of(self.model)
        self.tensors = shapes(self.model).keys()
        self.values = dict(self.field_map.values)  # its fields
        self.inputs: dict[str, tuple[int, ...]] = {}  # encoder states -> channels still read
        self.splits: Splits = {
            name: splits
            for name, _ in self.model.named_modules()
            if (splits := self.field_map.splits_of(name))
        }

    def check_parts(self) -> None:
        """Raise if the model gained or lost parts: the pruner's groups are then out of date."""
        now, then = shapes(self.model), dict.fromkeys(self.tensors, ())
        for parts, what in ((parts_beyond(then, now), "lost"), (parts_beyond(now, then), "gained")):
            if parts:
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} has {what} {listed(parts)} since the hook was "
                    "attached, so the pruner's groups are out of date. Make a new pruner for this "
                    "model. This step pruned nothing."
                )

    def prove(
        self, cuts: Sequence[LayerCut] = (), kept: Mapping[Place, Tensor] | None = None
    ) -> Proof:
        """Return the config of the model, or of what a cut of it leaves; raise if there is none.

        Nothing is changed. ``cuts``: what is to be cut; ``kept``: the positions that then remain.
        """
        after, splits = self._shapes_after(kept or {}), self._splits_after(cuts)
        values = self._solve(after, splits)
        data, built, notes = with_mirrored_fields(
            self.field_map.builder, config_json(self.model.config), *self._build(after, values)
        )
        vanished = vanished_counts(self.reference, built)  # counts that would become 0
        if vanished:
            raise explain_vanished(self.model, vanished)
        change = difference(self.model, self.reference, built)
        if change.unfilled:
            raise explain_unfilled(self.model, change.unfilled)
        inputs = self._inputs_after(cuts)
        proof = Proof(after, splits, inputs, values, data, built, change, notes)
        with all_or_nothing() as changes:
            self._write(changes, proof)  # a user's setter may raise anything
            changes.roll_back()
        return proof

    def follow(self, report: SyncReport, proof: Proof | None) -> SyncReport:
        """Update config, attributes, buffers and ties to match the weights: all or nothing."""
        if proof is None or self._shapes_after({}) != proof.shapes:  # other code cut layers
            proof = self.prove()
        with all_or_nothing() as changes:
            written = self._write(changes, proof)
            ties = write_ties(changes, self.model, self.ties)
        self.reference, self.values = proof.build, proof.values
        self.splits, self.inputs = proof.splits, proof.inputs
        self._set_head_counts()
        self.ties = ties_of(self.model)
        name = type(self.model).__name__
        return replace(
            report,
            **written,
            ties=ties,
            proof=f"proved: {len(proof.shapes)} tensors have the shapes that {name} builds from "
            "the new config.json",
            inputs=dict(self.inputs),
        )

    def _write(self, changes: Changes, proof: Proof) -> dict[str, Any]:
        """Write a proved config, except ties; return what the report says of it."""
        old = config_json(self.model.config, use_diff=False)
        written = write(changes, self.model, proof.change)
        self._check_written(proof)
        new = config_json(self.model.config, use_diff=False)
        changed = {
            field: (value_at(old, field), value) for field, value in changed_values(old, new)
        }
        around, notes = _write_around(changes, self.model, self.pruner.model, changed)
        return {
            "fields": {field_name(field): values for field, values in changed.items()},
            "attributes": [one.name for one in written if not torch.is_tensor(one.value)] + around,
            "buffers": [one.name for one in written if torch.is_tensor(one.value)],
            "notes": [*proof.notes, *notes],
        }

    def _shapes_after(self, kept: Mapping[Place, Tensor]) -> Shapes:
        """Return the shapes that a cut leaves; raise if tied weights would differ."""
        live = dict(shapes(self.model))
        for tie in self.ties:
            conflict = tie.conflict(self.model)
            if conflict is not None:
                raise ConfigSyncError(
                    f"{conflict.reason}. {type(self.model).__name__} saves tied weights once, so a "
                    "reload would change one of them. Prune them in one group, keep them "
                    "(ignored_layers=), or untie them before pruning "
                    "(config.tie_word_embeddings=False)."
                )
            live.update(dict.fromkeys(tie.names, live[tie.keeper(self.model)]))
        after: dict[str, tuple[int, ...]] = {
            name: tuple(len(kept.get((name, dim), range(size))) for dim, size in enumerate(shape))
            for name, shape in live.items()
        }
        for tie in self.ties:
            # a name of a layer that the pruner does not see (T5's shared) is cut with the others
            size = tuple(map(min, *(after[name] for name in tie.names)))
            after.update(dict.fromkeys(tie.names, size))
        return after

    def _inputs_after(self, cuts: Sequence[LayerCut]) -> dict[str, tuple[int, ...]]:
        """Return which channels of the encoder states are still read."""
        read = encoder_states_of(self.model, self.field_map.recipe.encoder_states)
        if read is None:
            return self.inputs
        cut = [c for c in cuts if not c[0].out and self._own_name(c[0].name) == read.layer]
        if not cut:
            return self.inputs
        removed = {channel for _, channels in cut for channel in channels}
        remaining = self.inputs.get(read.argument, tuple(range(cut[0][0].before)))
        left = (channel for index, channel in enumerate(remaining) if index not in removed)
        return {**self.inputs, read.argument: tuple(left)}

    def _splits_after(self, cuts: Sequence[LayerCut]) -> Splits:
        """Return the head splits; None if a layer's heads lose different numbers of dimensions."""
        lost: dict[str, set[int]] = {}  # several groups may cut one layer, and a fused layer's
        for layer, channels in cuts:
            if layer.out:
                name = self._own_name(layer.name).removesuffix(_ROWS)
                lost.setdefault(name, set()).update(channels)
        return {
            name: splits and splits_after(splits, lost[name]) if name in lost else splits
            for name, splits in self.splits.items()
        }

    def _set_head_counts(self) -> None:
        """Set ``pruner.num_heads`` and its channel groups to the current head counts."""
        for name, module, count in self.view.head_layers(self.values):
            splits = self.splits.get(name)
            if splits and not self.field_map.fields_of(name, heads_of(0)):
                count = splits[0][0]  # no probe reached this layer (behind experts)
            for counts in (self.pruner.num_heads, self.pruner.out_channel_groups):
                if module in self.pruner.num_heads and module in counts:
                    counts[module] = count

    def _own_name(self, name: str) -> str:
        """Return a layer's name inside the Hugging Face model; groups cut only layers there."""
        return name.removeprefix(f"{self.view.prefix}." if self.view.prefix else "")

    def _solve(self, live: Shapes, splits: Splits) -> dict[FieldPath, int]:
        """Return the fields' values; raise if heads lost different numbers of dimensions."""
        targets: dict[Quantity, int] = {
            (name, dim): size for name, shape in live.items() for dim, size in enumerate(shape)
        }
        for name, of_layer in splits.items():
            if of_layer is None:
                raise ConfigSyncError(
                    f"{name}: its attention heads lost different numbers of dimensions, so the "
                    "remaining channels are not equal heads. Pass the number of heads to the "
                    "pruner (num_heads={layer: heads}), or keep the layer (ignored_layers=)."
                )
            targets.update({(name, which): count for which, count in counts_of(of_layer).items()})
        pruned = {field for fields in self.pruner.DG.fields for field in fields}
        hold = [field for field in self.field_map.values if field not in pruned]
        result = fit(self.field_map, targets, hold=hold)
        if isinstance(result, Conflict):
            raise explain_conflict(self.model, self.field_map, result)
        return result

    def _build(
        self, live: Shapes, values: dict[FieldPath, int]
    ) -> tuple[dict[str, Any], nn.Module]:
        """Return the new config's JSON and its build; raise if the shapes differ."""
        data = config_json(self.model.config)
        # unset fields remain unset if possible
        proof = build_with_shapes(self.field_map, data, live, values, buffers=True)
        if isinstance(proof, tuple):
            missing = missing_parts(self.model, self.field_map.builder, proof[1], live)
            if missing is None:
                return proof
            raise ConfigSyncError(
                f"{type(self.model).__name__} and its config disagree: {missing.reason} Nothing "
                "was written. Continue to prune, then call hook.sync()."
            )
        if isinstance(proof, Refusal):
            raise explain_refusal(self.model, self.field_map, values, proof)
        raise explain_mismatch(self.model, proof)

    def _check_written(self, proof: Proof) -> None:
        proved = config_json(self.field_map.builder.config(proof.data))
        after = config_json(proof.build.config)  # type: ignore[arg-type]
        # the config class may set a field (Swin's hidden_size), as may the model (LeViT's down_ops)
        wrong = [
            (field, value)
            for field, value in changed_values(proof.data, config_json(self.model.config))
            if value not in (value_at(proved, field), value_at(after, field))
        ]
        if wrong:
            names = ", ".join(field_name(field) for field, _ in wrong)
            raise ConfigSyncError(
                f"{type(self.model.config).__name__} changes the proved values when they are "
                f"written to it: {names}"
            )


# sentence-transformers' names of the width that its Pooling reads
_READ = ("embedding_dimension", "word_embedding_dimension")
_POOLED = (*_READ, "pooling_output_dimension")


def _write_around(
    changes: Changes,
    model: nn.Module,
    pruned: nn.Module,  # the user's module, which contains ``model``
    changed: Mapping[FieldPath, tuple[Any, Any]],  # (old value, new value)
) -> tuple[list[str], list[str]]:  # names of written attributes, notes
    """Update sentence-transformers' pooling around a model; note other numbers to check."""
    fields = {old: f for f, (old, _) in reversed([*changed.items()]) if type(old) is int}
    inside = {id(module) for module in model.modules()}
    written: list[str] = []
    notes: list[str] = []
    for name, module in pruned.named_modules():
        own = {} if id(module) in inside else dict(vars(module))
        width = next((own[key] for key in _READ if key in own), 0)
        pooling = type(module).__module__.startswith("sentence_transformers.") and width in fields
        for key, value in own.items():
            full = f"{name}.{key}".lstrip(".")
            if pooling and key in _POOLED:
                changes.set(module, key, value * changed[fields[width]][1] // width)
                written.append(full)
            elif type(value) is int and value in fields and is_own(key):
                notes.append(
                    f"{full} ({type(module).__name__}) is still {value}, the old value of "
                    f"{field_name(fields[value])}. It is outside the Hugging Face model, so "
                    "nothing proves that it means the same. If it does, set it to "
                    f"{changed[fields[value]][1]}"
                )
    return written, notes


def with_mirrored_fields(
    builder: Builder, old: dict[str, Any], new: dict[str, Any], built: nn.Module
) -> tuple[dict[str, Any], nn.Module, list[str]]:  # config JSON, its build, notes
    """Update the fields of a new config that repeat a changed field, and note possible others."""
    before, after = (_every_default(builder, data) for data in (old, new))
    changed = [(value_at(before, p), value) for p, value in changed_values(before, after)]
    pairs = {was: now for was, now in reversed(changed) if type(was) is type(now) is int}
    notes: list[str] = []
    for field, value in plain_fields(after) if pairs else ():
        if type(value) is not int or value not in pairs or value_at(before, field) != value:
            continue
        # probes have covered every field that is read
        if of_every_config() & set(field) or field[-1] in names_in_code(built):
            continue
        without = (_every_default(builder, without_field(data, field)) for data in (old, new))
        # derived from the changed field by default; the class has to build the same with it
        if {value_at(data, field) for data in without} == {value, pairs[value]}:
            candidate = with_values(new, {field: pairs[value]})
            candidate_build = builder.build(candidate, buffers=True)
            if not isinstance(candidate_build, Refusal):
                change = difference(built, built, candidate_build)
                if not change.attributes:
                    new, built = candidate, candidate_build
                    continue
        source = next(field_name(p) for p, v in changed_values(before, after) if v == pairs[value])
        notes.append(
            f"config.{field_name(field)} is still {value}, the old value of {source}. No code of "
            f"the class reads it. If it means the same, set it to {pairs[value]}"
        )
    return new, built, notes


def _every_default(builder: Builder, data: dict[str, Any]) -> dict[str, Any]:
    """Return a config's JSON with every default; empty if the class refuses the config."""
    try:
        return config_json(builder.config(data), use_diff=False)
    except Exception:  # as in Builder.build
        return {}
