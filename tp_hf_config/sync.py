"""Follow one model through its prunes: shapes now, solve, prove, apply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .apply import (
    Changes,
    Difference,
    all_or_nothing,
    changed_values,
    difference,
    write_attributes,
    write_buffers,
    write_fields,
    write_ties,
)
from .around import surroundings_of
from .beside import Beside
from .errors import ConfigSyncError, UnsupportedModelError
from .explain import (
    explain_conflict,
    explain_mismatch,
    explain_refusal,
    explain_vanished,
    some,
)
from .fit import build_as, fit, value_at
from .graph import ConfigGraph
from .heads import counts_of, heads_of, splits_after
from .history import PrunedGroup
from .learn import map_of
from .limits import accepts
from .locate import check_followable, find_pretrained
from .mirrors import mirrored
from .reference import (
    FieldPath,
    Refusal,
    config_json,
    field_name,
    shapes,
    vanished_counts,
)
from .solve import Conflict, Observable
from .states import states_of
from .ties import Tie, channels_apart, shapes_apart, ties_of
from .whole import build_live, order_of_layers, parts_beyond, said_options, unbuilt_parts
from .widths import WidthView

_ROWS = ".weight#0"
"""How a history names the outputs of a projection that is no ``nn.Linear`` (I-BERT's)."""


class Follower:
    """Knows one pruner's model: what its config builds, and how its heads stand.

    Raises:
        UnsupportedModelError: the model cannot be followed, or its config does not build it.
    """

    def __init__(self, pruner: Any):
        self.pruner = pruner
        self.prefix, self.model = find_pretrained(pruner.model)
        check_followable(self.model)
        builder, built = build_live(self.model, buffers=True)
        self.known = map_of(self.model, (builder, built))  # refuses where nothing was built
        self.view = WidthView(self.model, self.known)
        assert not isinstance(built, Refusal)
        self.reference: nn.Module = built
        self.notes = said_options(self.model, builder) + order_of_layers(self.model, built)[1]
        around = surroundings_of(self.model)
        self.sharers = around.sharers
        self.beside = Beside(self.model, pruner.model, around.holders)
        self.ties = ties_of(self.model)
        self._check_traced()
        self.tensors = shapes(self.model).keys()
        self.values = dict(self.known.values)
        self.heads_went = False
        self.inputs: dict[str, tuple[int, ...]] = {}
        self.splits: dict[str, tuple[tuple[int, ...], ...] | None] = {
            name: splits
            for name, _ in self.model.named_modules()
            if (splits := self.known.splits_of(name))
        }

    def accepts_heads(self, now: int, then: int) -> bool:
        """Whether the class takes ``then`` heads where it has ``now``.

        Where heads go together with the hidden size (BERT), the ratios see to it.
        """
        going = [path for path in self.known.count_fields() if self.values[path] == now]
        if not all(self.known.moves_shapes(path) for path in going):
            return True
        return accepts(self.known, {**self.values, **dict.fromkeys(going, then)}) is None

    def check_parts(self) -> None:
        """Refuse a step of a model that gained or lost parts: the pruner's groups are of others.

        Raises:
            UnsupportedModelError: it did since the hook was attached.
        """
        now, then = shapes(self.model), dict.fromkeys(self.tensors, ())
        for parts, what in ((parts_beyond(then, now), "lost"), (parts_beyond(now, then), "gained")):
            if parts:
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} has {what} {some(parts)} since the hook was "
                    "attached, and the pruner's groups are those of before. Make a new pruner of "
                    "the model as it is now. Nothing was pruned by this step."
                )

    def _check_traced(self) -> None:
        """Every layer whose width is going to be pruned is in the pruner's graph."""
        if isinstance(self.pruner.DG, ConfigGraph):
            return
        traced, ignored = self.pruner.DG.module2node, self.pruner.ignored_layers
        tied = {name for tie in self.ties for name in tie.names}
        producers = list(self.view.producers())
        going = {
            path
            for _, module, fields in producers
            if module in traced and module not in ignored
            for path in fields
        }
        for name, module, fields in producers:
            weight = f"{name}.weight"
            follows = (fields | self.known.fields_of(weight, 1)) & going
            if module not in traced and weight not in tied and follows:
                raise UnsupportedModelError(
                    f"{name} is as wide as {field_name(min(follows))} says, but the outputs that "
                    "were traced do not depend on it, so Torch-Pruning would leave it as it is. "
                    "Build the model without it (BERT: add_pooling_layer=False), return what it "
                    "computes, or keep the width: pruner_kwargs(model, prune=...)."
                )

    def follow(self, groups: Sequence[PrunedGroup]) -> dict[str, Any]:
        """Bring config, attributes, buffers and ties in step; all of it or nothing.

        Returns:
            The fields of a :class:`~tp_hf_config.SyncReport` that say what was done.

        Raises:
            ConfigSyncError: no config says what the weights are.
        """
        self._follow_inputs(groups)
        notes = self._count_heads(groups)
        live = self._live_shapes(groups)
        values, data, built, untold = self._proved(live)
        change = difference(self.model, self.reference, built)
        old = config_json(self.model.config, use_diff=False)
        moved = {path: (value_at(old, path), new) for name, path, new in change.fields if not name}
        numbers = self.beside.numbers(moved)
        with all_or_nothing() as changes:
            outcome = self._write(changes, change)
            self._check_written(data, built)
            written, outside = self.beside.follow(changes, numbers, moved)
        new = config_json(self.model.config, use_diff=False)
        self.reference, self.values = built, values
        self._tell_heads()
        self.ties = ties_of(self.model)
        outcome["fields"] = {
            field_name(path): (value_at(old, path), value)
            for path, value in changed_values(old, new)
        }
        outcome["proof"] = (
            f"proved: {len(live)} tensors are as {type(self.model).__name__} builds them "
            "from the new config.json"
        )
        outcome["inputs"] = dict(self.inputs)
        outcome["attributes"] += written
        outcome["notes"] = [*self.notes, *notes, *untold, *outside]
        return outcome

    def foretell(self, groups: Sequence[PrunedGroup], left: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse what a step is going to leave, where no config would say it.

        Args:
            groups: what the step prunes.
            left: the shapes of all tensors without that, tied ones under each of their names.

        Raises:
            ConfigSyncError: no config says that.
        """
        splits, went, then = dict(self.splits), self.heads_went, dict(left)
        try:
            self._count_heads(groups)
            for tie in self.ties:
                then.update(self._tied_then(tie, groups, left))
            self._proved(then)
        finally:
            self.splits, self.heads_went = splits, went

    def _tied_then(
        self, tie: Tie, groups: Sequence[PrunedGroup], left: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]]:
        """The shape that a tied weight is going to have, by its names."""
        lost = self._lost(groups)
        cut = [name for name in tie.names if name.rpartition(".")[0] in lost]
        conflict = shapes_apart({name: left[name] for name in cut or tie.names})
        channels = [sorted(lost[name.rpartition(".")[0]]) for name in cut]
        other = next((n for n, one in zip(cut, channels, strict=True) if one != channels[0]), None)
        if conflict is None and other is not None:
            conflict = channels_apart(cut[0], other)
        if conflict is not None:
            raise self._untied(conflict)
        return dict.fromkeys(tie.names, left[(cut or tie.names)[0]])

    def _proved(
        self, shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[dict[FieldPath, int], dict[str, Any], nn.Module, list[str]]:
        """The fields' values at which the class has these shapes, the JSON, and what it builds.

        Last, what is to be said of fields that mirror others.
        """
        values = self._solve(shapes)
        data, built, untold = mirrored(
            self.known.builder, config_json(self.model.config), *self._prove(shapes, values)
        )
        vanished = vanished_counts(self.reference, built)
        if vanished:
            raise explain_vanished(self.model, vanished)
        return values, data, built, untold

    def _follow_inputs(self, groups: Sequence[PrunedGroup]) -> None:
        """Keep in mind which channels of the states of an encoder are still read."""
        read = states_of(self.model)
        for layer in (layer for group in groups for layer in group.layers):
            if read is not None and not layer.out and self._own_name(layer.name) == read.layer:
                left = self.inputs.get(read.argument, tuple(range(layer.before)))
                gone = set(layer.removed)
                self.inputs[read.argument] = tuple(
                    channel for place, channel in enumerate(left) if place not in gone
                )

    def _count_heads(self, groups: Sequence[PrunedGroup]) -> list[str]:
        """Follow how projections are split into heads, from the channels that were pruned."""
        for group in groups:
            lost: dict[str, set[int]] = {}  # a fused layer is in a group once for each piece
            for layer in group.layers:
                name = (self._own_name(layer.name) or "").removesuffix(_ROWS)
                if name in self.splits and layer.out:
                    lost.setdefault(name, set()).update(layer.removed)
            for name, removed in lost.items():
                split = self.splits[name]
                self.splits[name] = None if split is None else splits_after(split, removed)
        if isinstance(self.pruner.DG, ConfigGraph):
            return []
        wanted = getattr(self.pruner, "prune_num_heads", False) and (
            getattr(self.pruner, "head_pruning_ratio", 0)
            or getattr(self.pruner, "head_pruning_ratio_dict", None)
        )
        touched = {
            self._own_name(layer.name) for group in groups for layer in group.layers if layer.out
        }
        self.heads_went |= bool(touched & self.splits.keys())
        if wanted and not self.heads_went:
            return [
                "head_pruning_ratio asks for fewer heads, but Torch-Pruning pruned none: its trace "
                "finds no group of heads here, the class takes no number of heads in between, or "
                "pruning_ratio is 0 (it then skips heads too)"
            ]
        return []

    def _tell_heads(self) -> None:
        """``pruner.num_heads`` and the channel groups made of it say what the layers have now."""
        for name, module, count in self.view.head_layers(self.values):
            splits = self.splits.get(name)
            if splits and not self.known.fields_of(name, heads_of(0)):
                count = splits[0][0]  # a layer that no experiment reached (behind experts)
            for counts in (self.pruner.num_heads, self.pruner.out_channel_groups):
                if module in self.pruner.num_heads and module in counts:
                    counts[module] = count

    def _own_name(self, name: str) -> str | None:
        """A name in the pruner's model as a name in the Hugging Face model inside it."""
        if not self.prefix:
            return name
        inside = name.startswith(f"{self.prefix}.")
        return name.removeprefix(f"{self.prefix}.") if inside else None

    def _live_shapes(self, groups: Sequence[PrunedGroup]) -> dict[str, tuple[int, ...]]:
        """The shapes that the model has once tied weights are one again."""
        live = shapes(self.model)
        lost = self._lost(groups)
        for tie in self.ties:
            cuts = [lost.get(name.rpartition(".")[0], []) for name in tie.pruned(self.model)]
            alike = bool(cuts and cuts[0]) and all(cut == cuts[0] for cut in cuts)
            conflict = tie.conflict(self.model, alike)
            if conflict is not None:
                raise self._untied(conflict)
            live.update(dict.fromkeys(tie.names, live[tie.keeper(self.model)]))
        return live

    def _lost(self, groups: Sequence[PrunedGroup]) -> dict[str | None, list[tuple[int, ...]]]:
        """Layer -> the channels that it loses in each group."""
        lost: dict[str | None, list[tuple[int, ...]]] = {}
        for layer in (layer for group in groups for layer in group.layers):
            lost.setdefault(self._own_name(layer.name), []).append(layer.removed)
        return lost

    def _untied(self, conflict: str) -> ConfigSyncError:
        return ConfigSyncError(
            f"{conflict}. {type(self.model).__name__} stores them once, so a reload would "
            "change one of them. Prune them in one group, keep them (ignored_layers=), or "
            "untie them before pruning (config.tie_word_embeddings=False)."
        )

    def _targets(self, live: Mapping[str, tuple[int, ...]]) -> dict[Observable, int]:
        """What the weights and the heads are now, in full names."""
        targets: dict[Observable, int] = {
            (name, dim): size for name, shape in live.items() for dim, size in enumerate(shape)
        }
        for name, splits in self.splits.items():
            if splits is None:
                raise ConfigSyncError(
                    f"{name}: its heads lost different numbers of dimensions, so what is left "
                    "cannot be told apart into equal heads. Tell the pruner about the heads "
                    "(num_heads=, as pruner_kwargs(model) does), or keep the layer "
                    "(ignored_layers=)."
                )
            targets.update({(name, which): count for which, count in counts_of(splits).items()})
        return targets

    def _solve(self, live: Mapping[str, tuple[int, ...]]) -> dict[FieldPath, int]:
        graph = self.pruner.DG
        counted = graph.fields if isinstance(graph, ConfigGraph) else [tuple(self.known.values)]
        going = {path for fields in counted for path in fields}
        hold = [path for path in self.known.values if path not in going]
        result = fit(self.known, self._targets(live), hold=hold)
        if isinstance(result, Conflict):
            raise explain_conflict(self.model, self.known, result)
        return result

    def _prove(
        self, live: Mapping[str, tuple[int, ...]], values: dict[FieldPath, int]
    ) -> tuple[dict[str, Any], nn.Module]:
        """The new config's JSON and what it builds; unset fields stay unset where that suffices."""
        proof = build_as(self.known, config_json(self.model.config), live, values, buffers=True)
        if isinstance(proof, tuple):
            beyond = unbuilt_parts(self.model, self.known.builder, proof[1], live)
            if beyond is None:
                return proof
            raise ConfigSyncError(
                f"{type(self.model).__name__} and its config disagree: {beyond} Nothing was "
                "written; go on pruning and sync again."
            )
        if isinstance(proof, Refusal):
            raise explain_refusal(self.model, self.known, values, proof)
        raise explain_mismatch(self.model, proof)

    def _write(self, changes: Changes, change: Difference) -> dict[str, Any]:
        write_fields(changes, self.model, change.fields)
        return {
            "attributes": write_attributes(changes, self.model, change.attributes),
            "buffers": write_buffers(changes, self.model, change.buffers),
            "ties": write_ties(changes, self.model, self.ties),
        }

    def _check_written(self, data: dict[str, Any], built: nn.Module) -> None:
        """The live config now says what was proved.

        The class may set a field itself (Swin's hidden_size), or its model (LeViT's down_ops).
        """
        proved = config_json(self.known.builder.config(data))
        after = config_json(built.config)  # type: ignore[arg-type]
        wrong = [
            (path, value)
            for path, value in changed_values(data, config_json(self.model.config))
            if value not in (value_at(proved, path), value_at(after, path))
        ]
        if wrong:
            names = ", ".join(field_name(path) for path, _ in wrong)
            raise ConfigSyncError(f"the config does not take the values proved for {names}")
