"""Prune on several ranks: all do the same, and a sharded model repeats what its meta copy did."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import TrainingError, UnsupportedModelError
from ..graph.cut_list import CutList, Edit
from ..graph.rebuild import empty_copy, refresh, take_modes
from ..model.config_json import OF_NO_EFFECT, changed_values, config_json
from ..model.fill import tell
from ..model.locate import find_pretrained
from ..model.sharded import agree, behind, divided_like, meta_copies, reshard, whole
from ..model.tensors import owner, select
from .apply import all_or_nothing, write_fields

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..calibration.held_out import Refits
    from .report import LayerCut

Shard = Callable[[Any], nn.Module | None]  # wraps a module with meta parameters, as the user does


class Agreement:
    """Compares what this rank is about to do with all others; raises on all if they differ.

    All ranks have to call each method at the same point.
    """

    def __init__(self, pruner: Any, sharded: bool, distributed: bool):
        self._pruner = pruner
        self._what = "The sharded model" if sharded else "The model"
        self._needed = sharded or distributed  # distributed: each rank has a copy of the model

    def on_settings(self) -> None:
        if self._needed:
            pruner = self._pruner
            data = config_json(find_pretrained(pruner.model)[1].config)
            config = {field: value for field, value in data.items() if field not in OF_NO_EFFECT}
            what = (type(pruner).__name__, type(pruner.importance).__name__, repr(config))
            step = f"step {pruner.current_step + 1}"
            self._on(f"the start of {step}", [("the settings", repr(what))])

    def on_groups(
        self, groups: Iterable[Sequence[LayerCut]], failure: Exception | None = None
    ) -> None:
        """Compare the channels to be pruned; ``failure``: why this rank cannot prune them."""
        cuts = ([(vars(layer), channels) for layer, channels in group] for group in groups if group)
        parts = [(cut[0][0]["name"], _digest(cut)) for cut in cuts]
        self._on(self._step, parts, failure)

    def on_refits(self, refits: Refits) -> None:
        used = [(layer.weight, layer.part) for layer in refits.layers if layer.used]
        parts = [("which weights are refitted", _digest(used))]
        self._on(f"the refits of {self._step}", parts)

    def on_build(self, failure: Exception | None) -> None:
        """Check that all ranks have built the pruned model; ``failure``: why this one has not."""
        self._on(f"shard= of {self._step}", (), failure)

    @property
    def _step(self) -> str:
        return f"step {self._pruner.current_step}"

    def _on(
        self, when: str, parts: Iterable[tuple[str, str]], failure: Exception | None = None
    ) -> None:
        if self._needed:
            agree(TrainingError, when, parts, failure, f". {self._what} is unchanged.")


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


class ShardedModel:
    """The model under FSDP2 whose meta copy is pruned."""

    def __init__(self, copy: PreTrainedModel, shard: Shard | None, agreement: Agreement):
        if shard is None:
            raise UnsupportedModelError(
                f"{type(copy).__name__} is under fully_shard (FSDP2). Its weights cannot be cut in "
                "place. Pass a function that makes your fully_shard calls on the pruned model: "
                "HFConfigSyncHook(shard=shard)"
            )
        self._copy, self._shard, self._agreement = copy, shard, agreement
        self.model = behind(copy)  # the current sharded model

    def before_step(self) -> None:
        """Copy the sharded model's config to the meta copy, and refresh its empty gradients."""
        refresh(self._copy)
        settings: Any = behind(self._copy).config
        changed = changed_values(config_json(self._copy.config), config_json(settings))
        with all_or_nothing() as changes:
            write_fields(changes, self._copy, [("", field, value) for field, value in changed])

    def carry_out(self, edits: Mapping[str, Edit], failure: Exception | None) -> None:
        """Build the pruned model from the meta copy's config, and fill it tensor by tensor."""
        built: tuple[PreTrainedModel, nn.Module] | None = None
        try:
            if failure is None and edits:
                built = self._wrapped()
        except Exception as error:
            failure = error
        self._agreement.on_build(failure)
        if built is not None:
            self._fill(built[0], CutList("", {}, {}, edits))
            self.model = built[1]

    def _wrapped(self) -> tuple[PreTrainedModel, nn.Module]:
        """Return the pruned model with allocated, unset parameters, and what ``shard`` returned."""
        old, new = behind(self._copy), empty_copy(self._copy)
        take_modes(new, old)
        buffers = dict(new.named_buffers())
        wrapped = self._shard(new) or new
        if any(parameter.is_meta for parameter in new.parameters()):
            new.to_empty(device=next(old.parameters()).device)
        for name, buffer in buffers.items():
            module, key = owner(new, name)
            module._buffers[key] = buffer
        return new, wrapped

    @torch.no_grad()
    def _fill(self, new: PreTrainedModel, cuts: CutList) -> None:
        """Copy all weights and gradients; one of them is in memory in full at a time."""
        old = behind(self._copy)
        reshard(old)
        for name, source in old.named_parameters():
            target, kept = new.get_parameter(name), cuts.kept(name)
            target.copy_(divided_like(cuts.of(name, whole(source)), target))
            if source.grad is not None:
                gradient = whole(source.grad)
                target.grad = divided_like(select(gradient, kept) if kept else gradient, target)  # type: ignore[assignment]
            tell(target, source, kept)
        del meta_copies[old]
        meta_copies[new] = self._copy
