"""Carry out what a pruner's graph recorded, together, once a config describes what it leaves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigSyncError, in_one_line, listed, warn
from ..fieldmap.solve.explain import AGAIN
from ..graph.cut_list import CutList, edits_of
from ..graph.edits import Edit
from ..graph.layer_fields import layers_listed
from ..graph.recorded_prunes import Place, kept_positions
from ..model.fill import LiveCut
from ..model.shapes import Shapes, shapes
from .agreement import Agreement
from .follow import Follower
from .refits import StepRefits
from .report import GroupCut, SyncReport, layers_of
from .unit_choice import is_unmodified

_STATE = ("num_heads", "in_channel_groups", "out_channel_groups", "_scope_initial_channels")
"""The dicts that ``BasePruner._prune`` changes while it chooses (base_pruner.py, 1.6.1)."""


@dataclass
class Done:
    """What is cut, or was cut last.

    Attributes:
        groups: the groups, as they were numbered before.
        edits: what is done to each tensor.
    """

    groups: list[GroupCut] = field(default_factory=list)
    edits: dict[str, tuple[Edit, ...]] = field(default_factory=dict)


class PendingPrunes:
    """What is recorded: proved, refitted, cut and synced together, or not touched.

    A step and a loop over an interactive step are carried out when they end. A step that is not
    Torch-Pruning's own may read weights at any time: what it prunes is carried out as soon as a
    config describes it, like what is pruned outside of a step.

    Args:
        pruner: the pruner.
        follower: proves that a config describes what is left.
        agreement: compares what the ranks are about to cut.
        per_layer: whether each layer may get widths of its own.
        refits: refits what a step cuts.
        sync: makes the config follow a cut, and reports; gets True for a step, what was cut, and
            why what is recorded cannot be carried out.
    """

    def __init__(
        self,
        pruner: Any,
        follower: Follower,
        agreement: Agreement,
        per_layer: bool,
        refits: StepRefits,
        sync: Callable[[bool, Done, ConfigSyncError | None], SyncReport],
    ):
        self._pruner, self._follower, self._agreement = pruner, follower, agreement
        self._per_layer, self._refits, self._sync = per_layer, refits, sync
        self.recorded = pruner.DG.recorded
        self._undo_choice: Callable[[], None] = lambda: None
        self._reason = ""
        self._stepping = self._own_step = False
        self._loop: object | None = None  # the one that runs
        self._refused = False  # the step that runs
        self._told = False  # that what is recorded now has to wait
        self._synced = False  # something of the step that runs, or ran last, has a report
        self._unfinished: LiveCut | None = None  # a cut that was interrupted twice
        self._done = Done()  # what is cut and has no report yet

    @property
    def missing(self) -> tuple[str, ...]:
        """What is missing until what is recorded is carried out; empty if nothing is recorded."""
        if not self.recorded:
            return ()
        names = self.recorded.missing()
        if self._loop is not None:
            names.append("the end of the loop over step(interactive=True)")
        return tuple(names) or (self._reason,)

    def groups(self) -> list[GroupCut]:
        """Return what is recorded, for reports."""
        graph = self._pruner.DG
        return [GroupCut(tuple(layers_of(graph, group))) for group in self.recorded.groups()]

    @contextmanager
    def step(self) -> Iterator[None]:
        """Surround a call of ``step()``; if it raises, nothing that it recorded is cut."""
        self._refused = True
        self.release()
        self._undo_choice = _undoing_choice(self._pruner)
        self._stepping, self._synced = True, False
        self._own_step = not is_unmodified(self._pruner)
        try:
            yield
        except BaseException:
            self._take_back()
            raise
        finally:
            self._stepping = False
        self._refused = False

    @contextmanager
    def loop(self) -> Iterator[None]:
        """Surround a loop over the groups of an interactive step; another step ends it."""
        self._loop = this = object()
        try:
            yield
        finally:
            self._refused = self._loop is not this

    def finish(self) -> None:
        """Carry out what a step or loop recorded; of a step that pruned nothing, say why.

        Raises:
            ConfigSyncError: no config describes what a step would leave; the step does not count.
            TrainingError: another rank would cut something else.
        """
        refused, self._refused = self._refused, False
        if refused:
            return
        looping, self._loop = self._loop is not None, None
        if not self.recorded:
            told, self._synced = self._synced, True
            if not told:
                self._sync(True, Done(), None)
            return
        try:
            result = self._carry_out(in_step=True, may_wait=looping)
        except BaseException:
            if not looping:
                self._take_back()
            raise
        if isinstance(result, ConfigSyncError):
            self._wait(result)

    def settle(self) -> None:
        """Carry out what is recorded if a config describes it; else wait, and say so once."""
        if self._loop is not None or (self._stepping and not self._own_step):
            return  # its end comes
        result = self._carry_out(in_step=self._stepping, may_wait=True)
        if isinstance(result, ConfigSyncError):
            self._wait(result)

    def sync(self) -> SyncReport:
        """Carry out what is recorded, and sync.

        Raises:
            ConfigSyncError: no config describes it; it stays recorded.
        """
        if self._unfinished is not None:
            return self._cut(in_step=False)
        if not self.recorded:
            return self._sync(False, Done(), None)
        result = self._carry_out(in_step=self._loop is not None, may_wait=True)
        if isinstance(result, ConfigSyncError):
            return self._sync(False, Done(self.groups()), result)
        return result

    def release(self) -> None:
        """Carry out what is recorded, or drop it and say so: a step begins, or the hook goes."""
        looping, self._loop = self._loop is not None, None
        if self._unfinished is not None:
            self._cut(in_step=False)
        if not self.recorded:
            return
        failure = self._carry_out(in_step=looping, may_wait=True)
        if isinstance(failure, ConfigSyncError):
            missing = self.recorded.missing()
            what = f"{listed(missing)} was missing" if missing else str(failure).rstrip(". ")
            self.recorded.clear()
            self._told = False
            warn(
                "groups that were pruned before are dropped, because they never were complete: "
                f"{what}. The model and its config are as they were before them."
            )

    def _carry_out(self, in_step: bool, may_wait: bool) -> SyncReport | ConfigSyncError:
        """Prove, refit, cut and sync what is recorded; return why it has to wait, if it may."""
        with layers_listed(self._pruner.model, self._per_layer):
            groups, pruned = self.recorded.groups(), self.groups()
            kept = kept_positions(self._follower.model, groups)
            remaining = shapes_left(self._follower.model, kept)
            failure = self._failure(pruned, remaining)
            if failure is not None:
                if may_wait:
                    return failure
                failure = self._of_step(failure)
            self._agreement.on_groups(self._pruner, pruned, failure)
            refits = self._refits.solve(groups, remaining) if in_step else {}
            edits = edits_of(self._follower.model, refits, kept)
        self._told, self._synced = False, True
        graph = self._pruner.DG
        taken = [GroupCut(tuple(layers_of(graph, group))) for group in self.recorded.take()]
        self._done = Done(taken, edits)
        self._unfinished = LiveCut(self._follower.model, CutList("", {}, {}, edits))
        return self._cut(in_step)

    def _cut(self, in_step: bool) -> SyncReport:
        """Cut the weights, also those that an interrupted cut has left, and sync."""
        assert self._unfinished is not None  # the callers looked
        try:
            self._unfinished.carry_out()
            self._unfinished = None
            done, self._done = self._done, Done(edits=self._done.edits)  # heads are counted once
            return self._sync(in_step, done, None)
        except BaseException as error:
            if self._unfinished is not None and self._unfinished.remaining:
                warn(
                    f"the cut was interrupted ({in_one_line(error)}): {self._unfinished.remaining} "
                    "weights are still as they were, and so is the config. hook.sync() finishes it"
                )
            else:
                self._unfinished = None
                self._sync_quietly()
            raise

    def _failure(self, pruned: Sequence[GroupCut], remaining: Shapes) -> ConfigSyncError | None:
        """Return why no config describes what these groups leave, or None if one does."""
        try:
            self._follower.check_shapes_after(pruned, remaining)
        except ConfigSyncError as error:
            return error
        return None

    def _of_step(self, failure: ConfigSyncError) -> ConfigSyncError:
        """Return the error for a step that is not carried out."""
        more = " more" if self._synced else ""
        return ConfigSyncError(
            f"{type(self._pruner).__name__}: step {self._pruner.current_step} would end in this, "
            f"and nothing{more} of it is pruned: {str(failure).removesuffix(AGAIN).rstrip()}",
            failure.conflicts,
        )

    def _wait(self, failure: ConfigSyncError) -> None:
        """Note why what is recorded has to wait, and say so, once."""
        self._reason = str(failure).removesuffix(AGAIN).rstrip()
        if self._told or self._stepping:
            return
        self._told = True
        missing = self.recorded.missing()
        why = (
            f"a config describes them only together with {listed(missing)} (hook.pending)"
            if missing
            else self._reason.rstrip(".")
        )
        warn(
            f"pruned groups are recorded, and not cut yet: {why}. The model and its config stay as "
            "they were until then."
        )

    def _take_back(self) -> None:
        """Forget what a step recorded; the step does not count if nothing of it was carried out."""
        self.recorded.clear()
        self._told = False
        if not self._synced:
            self._undo_choice()

    def _sync_quietly(self) -> None:
        """Sync while another exception is raised: that one must surface, a failure here warns."""
        try:
            self._sync(True, self._done, None)
        except Exception as error:
            warnings.warn(f"HFConfigSyncHook after an interrupted step: {error}", stacklevel=2)


def _undoing_choice(pruner: Any) -> Callable[[], None]:
    """Return a function that undoes what a step changes of the pruner before it prunes."""
    step = pruner.current_step
    dicts = [(getattr(pruner, name), dict(getattr(pruner, name))) for name in _STATE]

    def undo() -> None:
        pruner.current_step = step
        for current, before in dicts:
            current.clear()
            current.update(before)

    return undo


def shapes_left(model: nn.Module, kept: Mapping[Place, Tensor]) -> Shapes:
    """Return the shape of every parameter and saved buffer of a model with these positions kept."""
    return {
        name: tuple(len(kept.get((name, dim), range(size))) for dim, size in enumerate(shape))
        for name, shape in shapes(model).items()
    }
