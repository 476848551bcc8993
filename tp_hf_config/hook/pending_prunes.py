"""Cut what a pruner's graph recorded, all at once, as soon as a config describes the result."""

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

# dicts that ``BasePruner._prune`` changes while it chooses (base_pruner.py, 1.6.1)
_STATE = ("num_heads", "in_channel_groups", "out_channel_groups", "_scope_initial_channels")


@dataclass
class Done:
    """What is cut, or was cut last."""

    groups: list[GroupCut] = field(default_factory=list)  # as numbered before the cut
    edits: dict[str, tuple[Edit, ...]] = field(default_factory=dict)  # of each tensor


class PendingPrunes:
    """Proves, refits, cuts and syncs what is recorded together, or touches nothing.

    A step, or a loop over an interactive step, is cut when it ends. A step other than
    Torch-Pruning's may read weights at any time, so its prunes are cut as soon as a config
    describes the result.
    """

    def __init__(
        self,
        pruner: Any,
        follower: Follower,
        agreement: Agreement,
        per_layer: bool,
        refits: StepRefits,
        sync: Callable[[bool, Done, ConfigSyncError | None], SyncReport],  # HFConfigSyncHook._sync
    ):
        self._pruner, self._follower, self._agreement = pruner, follower, agreement
        self._per_layer, self._refits, self._sync = per_layer, refits, sync
        self.recorded = pruner.DG.recorded
        self._undo_choice: Callable[[], None] = lambda: None
        self._reason = ""
        self._stepping = self._own_step = False
        self._loop: object | None = None  # the running loop over an interactive step
        self._refused = False  # True until the running step has completed
        self._told = False  # the user was warned that the recorded prunes wait
        self._synced = False  # a part of the current or last step has a report
        self._unfinished: LiveCut | None = None  # a cut that failed twice; sync() finishes it
        self._done = Done()  # cut, without a report yet

    @property
    def missing(self) -> tuple[str, ...]:
        """What the recorded prunes wait for; empty if nothing is recorded."""
        if not self.recorded:
            return ()
        names = self.recorded.missing()
        if self._loop is not None:
            names.append("the end of the loop over step(interactive=True)")
        return tuple(names) or (self._reason,)

    def groups(self) -> list[GroupCut]:
        graph = self._pruner.DG
        return [GroupCut(tuple(layers_of(graph, group))) for group in self.recorded.groups()]

    @contextmanager
    def step(self) -> Iterator[None]:
        """Surround a call of ``step()``; if it raises, drop what it recorded."""
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
        self._loop = this = object()
        try:
            yield
        finally:
            self._refused = self._loop is not this  # another step has ended this loop

    def finish(self) -> None:
        """Cut what a step or loop recorded; report why if a step pruned nothing."""
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
                self._take_back()  # the step does not count
            raise
        if isinstance(result, ConfigSyncError):
            self._wait(result)

    def settle(self) -> None:
        """Cut what is recorded if a config describes the result; else warn once."""
        if self._loop is not None or (self._stepping and not self._own_step):
            return  # it is cut when the loop or step ends
        result = self._carry_out(in_step=self._stepping, may_wait=True)
        if isinstance(result, ConfigSyncError):
            self._wait(result)

    def sync(self) -> SyncReport:
        """Cut what is recorded and sync; if no config describes the result, raise and keep it."""
        if self._unfinished is not None:
            return self._cut(in_step=False)
        if not self.recorded:
            return self._sync(False, Done(), None)
        result = self._carry_out(in_step=self._loop is not None, may_wait=True)
        if isinstance(result, ConfigSyncError):
            return self._sync(False, Done(self.groups()), result)
        return result

    def release(self) -> None:
        """Cut what is recorded, or drop it with a warning: a step begins, or the hook detaches."""
        looping, self._loop = self._loop is not None, None
        if self._unfinished is not None:
            self._cut(in_step=False)
        if not self.recorded:
            return
        failure = self._carry_out(in_step=looping, may_wait=True)
        if isinstance(failure, ConfigSyncError):
            missing = self.recorded.missing()
            what = (
                f"{listed(missing)} would have to be pruned too"
                if missing
                else str(failure).rstrip(". ")
            )
            self.recorded.clear()
            self._told = False
            warn(
                "recorded groups are discarded, because no config describes the model with only "
                f"these groups pruned: {what}. The model and its config are unchanged."
            )

    def _carry_out(self, in_step: bool, may_wait: bool) -> SyncReport | ConfigSyncError:
        """Prove, refit, cut and sync what is recorded. If it may wait, return why it has to."""
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
        """Cut the weights, also the rest of an interrupted cut, and sync."""
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
                    "weights are not cut yet, and the config is not updated. Call hook.sync() to "
                    "finish it"
                )
            else:
                self._unfinished = None
                self._sync_quietly()
            raise

    def _failure(self, pruned: Sequence[GroupCut], remaining: Shapes) -> ConfigSyncError | None:
        try:
            self._follower.check_shapes_after(pruned, remaining)
        except ConfigSyncError as error:
            return error
        return None

    def _of_step(self, failure: ConfigSyncError) -> ConfigSyncError:
        more = " more" if self._synced else ""
        return ConfigSyncError(
            f"{type(self._pruner).__name__}: nothing{more} of step {self._pruner.current_step} is "
            "pruned, because no config would describe the result: "
            f"{str(failure).removesuffix(AGAIN).rstrip()}",
            failure.conflicts,
        )

    def _wait(self, failure: ConfigSyncError) -> None:
        """Keep the reason why what is recorded has to wait, and warn once."""
        self._reason = str(failure).removesuffix(AGAIN).rstrip()
        if self._told or self._stepping:
            return
        self._told = True
        missing = self.recorded.missing()
        why = (
            f"a config describes the result only if these are pruned too: {listed(missing)} "
            "(hook.pending)"
            if missing
            else self._reason.rstrip(".")
        )
        warn(
            f"pruned groups are recorded but not cut yet: {why}. Until then the model and its "
            "config are unchanged."
        )

    def _take_back(self) -> None:
        self.recorded.clear()
        self._told = False
        if not self._synced:  # else the step counts, as a part of it was cut
            self._undo_choice()

    def _sync_quietly(self) -> None:
        """Sync while another exception is being raised; a failure here only warns."""
        try:
            self._sync(True, self._done, None)
        except Exception as error:
            warnings.warn(
                f"HFConfigSyncHook failed after an interrupted step: {error}", stacklevel=2
            )


def _undoing_choice(pruner: Any) -> Callable[[], None]:
    """Return a function that undoes what a step changes in the pruner before it prunes."""
    step = pruner.current_step
    dicts = [(getattr(pruner, name), dict(getattr(pruner, name))) for name in _STATE]

    def undo() -> None:
        pruner.current_step = step
        for current, before in dicts:
            current.clear()
            current.update(before)

    return undo


def shapes_left(model: nn.Module, kept: Mapping[Place, Tensor]) -> Shapes:
    """Return the shape of every parameter and saved buffer with only these positions kept."""
    return {
        name: tuple(len(kept.get((name, dim), range(size))) for dim, size in enumerate(shape))
        for name, shape in shapes(model).items()
    }
