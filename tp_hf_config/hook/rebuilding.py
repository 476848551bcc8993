"""Carry out on a sharded model what a pruner did to its stand-in: build the class anew, fill it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..graph.cut_list import CutList
from ..graph.rebuild import empty_copy, take_modes
from ..graph.standin import StandIn
from ..model.config_json import changed_values, config_json
from ..model.fill import note, note_successor
from ..model.lazy_tensor import values_of
from ..model.sharded import divided_like, reshard
from ..model.tensors import owner
from .agreement import Agreement, step
from .apply import all_or_nothing, write_fields

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .report import GroupCut

Shard = Callable[[Any], nn.Module | None]


class Rebuilding:
    """Carries out on a sharded model what a pruner does to its stand-in, on every rank.

    Args:
        standin: the stand-in that is pruned.
        shard: wraps a new module, whose parameters are on the meta device, as the user does.
        agreement: compares what the ranks do.

    Attributes:
        model: the sharded model as it is now.

    Raises:
        UnsupportedModelError: there is no function that wraps.
    """

    def __init__(self, standin: StandIn, shard: Shard | None, agreement: Agreement):
        if shard is None:
            raise UnsupportedModelError(
                f"{type(standin.model).__name__} is under fully_shard (FSDP2). Its weights cannot "
                "be cut in place: pass a function that makes your fully_shard calls on the pruned "
                "model, HFConfigSyncHook(shard=shard)"
            )
        self._standin, self._shard = standin, shard
        self.model: nn.Module = standin.sharded
        self._agreement = agreement

    def before_step(self) -> None:
        """Take over gradients and settings of the sharded model."""
        sharded, standin = self._standin.sharded, self._standin.model
        self._standin.refresh()
        settings = config_json(sharded.config)
        changed = changed_values(config_json(standin.config), settings)
        with all_or_nothing() as changes:
            write_fields(changes, standin, [("", field, value) for field, value in changed])

    def carry_out(
        self,
        pruner: Any,
        groups: Sequence[GroupCut],
        cuts: CutList | None,
        failure: Exception | None,
    ) -> None:
        """Build the pruned model from the stand-in's config, and fill it parameter by parameter.

        Args:
            pruner: the pruner.
            groups: what it has pruned of the stand-in.
            cuts: which positions are left of every tensor; without, no optimizer can follow.
            failure: why the stand-in's config does not follow; nothing is carried out then.

        Raises:
            TrainingError: the ranks pruned different things, or one could not build or wrap.
        """
        try:
            self._agreement.on_groups(pruner, groups, failure)
            if not groups:
                return
            reshard(self._standin.sharded)
            new, wrapped = self._wrapped(pruner)
            self._fill(new, cuts)
        except BaseException as error:
            if error is not failure:
                self._standin.forget()
            raise
        self._standin.read_from(new)
        self.model = wrapped

    def _wrapped(self, pruner: Any) -> tuple[PreTrainedModel, nn.Module]:
        """Return the pruned model with real but empty parameters, and what the user made of it."""
        old = self._standin.sharded
        failure: Exception | None = None
        new = empty_copy(self._standin.model)
        wrapped: nn.Module = new
        take_modes(new, old)
        buffers = dict(new.named_buffers())
        device = next(old.parameters()).device
        try:
            wrapped = self._shard(new) or new
            if any(parameter.is_meta for parameter in new.parameters()):
                new.to_empty(device=device)
        except Exception as error:
            failure = error
        self._agreement.on(f"shard= of {step(pruner)}", failure=failure)
        for name, buffer in buffers.items():
            module, key = owner(new, name)
            module._buffers[key] = buffer
        return new, wrapped

    @torch.no_grad()
    def _fill(self, new: PreTrainedModel, cuts: CutList | None) -> None:
        """Move all weights and gradients, one in memory at a time."""
        old = self._standin.sharded
        for name, parameter in self._standin.model.named_parameters():
            target = new.get_parameter(name)
            target.copy_(divided_like(values_of(parameter.detach()), target))
            if parameter.grad is not None:
                target.grad = divided_like(values_of(parameter.grad), target)
            if cuts is not None:
                note(target, old.get_parameter(name), cuts.kept(name))  # type: ignore[arg-type]
        if cuts is not None:
            note_successor(old, new)
