"""Cut what a pruner's graph recorded, all at once, as soon as a config describes the result.

Before a step that is expected to cost too much, say what would cost less, with numbers.
"""

from __future__ import annotations

import math
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..calibration.calibrate import Calibration
from ..calibration.held_out import NOTICEABLE, TOO_MUCH, Refitting, in_words
from ..calibration.importance import CalibratedImportance
from ..errors import (
    CalibrationWarning,
    ConfigSyncError,
    UnsupportedModelError,
    in_one_line,
    listed,
    warn,
)
from ..fieldmap.model_view import ModelView, view_of
from ..fieldmap.solve.fit import AGAIN
from ..graph.config_graph import ConfigGraph, kept_positions
from ..graph.cut_list import CutList, Edit, NotKept, RefitInPlace, edits_of, explained
from ..graph.layer_fields import layers_listed
from ..graph.prunable import Width
from ..graph.sides import ConfigGroup
from ..model.config_json import config_json
from ..model.fill import LiveCut
from ..model.layer_class import stock_class
from ..model.layer_entries import name_in_all_layers
from ..model.shapes import Shapes, shapes
from ..model.sharded import behind
from ..planning.selection import inner_widths_of
from .follow import Follower, Proof
from .ranks import Agreement, ShardedModel
from .report import GroupCut, SyncReport, layers_of
from .unit_choice import UnitChoice, is_unmodified

_MOST = 0.9  # of the inner widths: removing more is no alternative


def _advice_before(
    view: ModelView,
    calibration: Calibration,
    refitting: Refitting,
    groups: Sequence[ConfigGroup],
    remaining: Shapes,
) -> str | None:
    """Return the warning for a step; None if it costs little. ``remaining``: shapes after it."""
    expected = refitting.result.expected
    if expected is None or expected <= TOO_MUCH:
        return None
    sizes = {name: parameter.numel() for name, parameter in view.model.named_parameters()}
    before, after = sum(sizes.values()), sum(math.prod(remaining[name]) for name in sizes)
    parts = [
        f"this step removes {before - after:,} of {before:,} parameters. On held-out data the "
        f"output distribution is expected to change by a KL divergence of {expected:.3g}: "
        f"{in_words(expected)}. A change below {NOTICEABLE} is hardly noticeable."
    ]
    if behind(view.model) is view.model:
        parts += _from_inner_widths(view, calibration, refitting, groups, before - after)
    parts.append(
        f"{_spread(refitting)}allocate(model, calibration, target_params={after}) prunes most in "
        "the layers where it changes the output least (in the shell: --allocate --target-params "
        f"{after / before:.2f})"
    )
    return " ".join(parts)


def _from_inner_widths(
    view: ModelView,
    calibration: Calibration,
    refitting: Refitting,
    groups: Sequence[ConfigGroup],
    gone: int,
) -> Iterator[str]:
    """Yield what it costs to remove as many parameters from the inner widths, if that is less."""
    try:  # the model as earlier steps left it
        view = view_of(view.model, view.field_map.recipe.make_inputs)
        widths = inner_widths_of(view)
    except UnsupportedModelError:  # no config describes the last cut yet
        return
    share = gone / (sum(width.parameters * width.units for width in widths) or math.inf)
    others = {group.graph_group.fields for group in groups} - {width.fields for width in widths}
    if not others or not 0 < share <= _MOST:
        return
    cost = refitting.expected_of([*_lowest(view.model, calibration, widths, share)])
    if cost < (refitting.result.expected or 0.0):
        named = dict.fromkeys(name_in_all_layers(name) for w in widths for name in w.names)
        fields = ", ".join(f'"{name}"' for name in named)
        yield (
            "If as many parameters are removed from the inner widths only, the expected KL "
            f"divergence is {cost:.3g}: prune=({fields},), pruning_ratio={share:.2f}."
        )


def _lowest(
    model: nn.Module, calibration: Calibration, widths: Sequence[Width], share: float
) -> Iterator[ConfigGroup]:
    """Yield pruning groups of the lowest-ranked units of some widths, a share of each."""
    graph = ConfigGraph(model, [group for width in widths for group in width.groups])
    graph.build_dependency(model)
    importance = calibration.importance()
    for graph_group in graph.graph_groups:
        whole = graph.group_at(graph_group, range(graph_group.units.count))
        values = graph.importance_of(whole, importance)
        order = values.argsort()[: int(share * graph_group.units.count)]
        yield graph.group_at(graph_group, order.tolist())


def _spread(refitting: Refitting) -> str:
    """Return how much outputs change, least to most, as a sentence's beginning; or ``""``."""
    layers = sorted(refitting.result.layers, key=lambda layer: layer.refit)
    if len(layers) < 2:
        return ""
    least, most = layers[0], layers[-1]
    return (
        f"The outputs of layers change by {least.refit:.1%} ({least.weight}) to {most.refit:.1%} "
        f"({most.weight}), so "
    )


@dataclass(frozen=True)
class _Done:
    """What is cut, or was cut last."""

    groups: Sequence[GroupCut] = ()  # as numbered before the cut
    edits: Mapping[str, tuple[Edit, ...]] = field(default_factory=dict)  # of each tensor
    proof: Proof | None = None  # None: nothing was cut, or other code cut


class Attachment:
    """Proves, refits, cuts and syncs what a pruner records together, or touches nothing.

    A step, or a loop over an interactive step, is cut when it ends. A step other than
    Torch-Pruning's may read weights at any time, so its prunes are cut as soon as a config
    describes the result.
    """

    def __init__(
        self,
        choice: UnitChoice,
        follower: Follower,
        agreement: Agreement,
        sharded: ShardedModel | None,
        cut_log: CutLog,
        per_layer: bool,
        graph_reason: str,
        refit: Callable[[], Calibration | None],  # it may change between steps
        reports: list[SyncReport],  # the hook's
    ):
        self.follower, self._pruner, self._model = follower, follower.pruner, follower.model
        self._choice, self._agreement, self._sharded = choice, agreement, sharded
        self._cut_log, self._per_layer, self._graph_reason = cut_log, per_layer, graph_reason
        self._refit, self._reports = refit, reports
        self._first = len(reports)  # the first report on this pruner
        self._parameters = follower.model.num_parameters()
        self._refitting: Refitting | None = None  # of the current step
        self.recorded = self._pruner.DG.recorded
        self.recorded.settle = self._settle
        self._pruner.DG.choose = choice.groups
        # steps taken, and sizes that ratios are relative to, before the running step
        self._before: tuple[int, dict[str, int]] = (0, {})
        self._reason = ""
        self._stepping = self._own_step = False
        self._loop: object | None = None  # the running loop over an interactive step
        self._refused = False  # True until the running step has completed
        self._told = False  # the user was warned that the recorded prunes wait
        self._synced = False  # a part of the current or last step has a report
        # a cut that failed twice; sync() finishes it
        self._unfinished: tuple[LiveCut, _Done] | None = None

    @property
    def missing(self) -> tuple[str, ...]:
        """What the recorded prunes wait for; empty if nothing is recorded."""
        if not self.recorded:
            return ()
        names = self.recorded.missing()
        if self._loop is not None:
            names.append("the end of the loop over step(interactive=True)")
        return tuple(names) or (self._reason,)

    def _groups(self) -> list[GroupCut]:
        graph = self._pruner.DG
        return [GroupCut(tuple(layers_of(graph, group))) for group in self.recorded.groups()]

    @contextmanager
    def step(self) -> Iterator[None]:
        """Surround a call of ``step()``; if it raises, drop what it recorded."""
        self._refused = True
        self.release()
        self.follower.check_parts()
        if self._sharded is not None:
            self._sharded.before_step()
        self._agreement.on_settings(self._pruner)
        self._before = self._pruner.current_step, dict(self._pruner._scope_initial_channels)
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
                self._sync(True, _Done())
            return
        try:
            result = self._carry_out(in_step=True, may_wait=looping)
        except BaseException:
            if not looping:
                self._take_back()  # the step does not count
            raise
        if isinstance(result, ConfigSyncError):
            self._wait(result)

    def _settle(self) -> None:
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
            return self._sync(False, _Done())
        result = self._carry_out(in_step=self._loop is not None, may_wait=True)
        if isinstance(result, ConfigSyncError):
            return self._sync(False, _Done(self._groups()), result)
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
            groups, pruned = self.recorded.groups(), self._groups()
            kept = kept_positions(self._model, groups)
            proof: Proof | None = None
            failure: ConfigSyncError | None = None
            try:
                proof = self.follower.prove(pruned, kept)
            except ConfigSyncError as error:
                if may_wait:
                    return error
                failure = self._of_step(error)
            self._agreement.on_groups(self._pruner, pruned, failure)  # raises a failure
            assert proof is not None
            refits = self._solve_refits(groups, proof.shapes) if in_step else {}
            edits = edits_of(self._model, refits, kept)
        self._told, self._synced = False, True
        self.recorded.take()
        cut = LiveCut(self._model, CutList("", {}, {}, edits))
        self._unfinished = cut, _Done(pruned, edits, proof)
        return self._cut(in_step)

    def _solve_refits(
        self, groups: Sequence[ConfigGroup], remaining: Shapes
    ) -> dict[str, list[RefitInPlace]]:
        """Return each weight's refits for a step's groups; warn if the step costs too much."""
        calibration = self._refit()
        if calibration is None:
            return {}
        refitting = Refitting(calibration, groups)
        self._agreement.on_refits(self._pruner, refitting.result)
        self._refitting = refitting
        told = _advice_before(self.follower.view, calibration, refitting, groups, remaining)
        if told is not None:
            warn(told, CalibrationWarning)
        return refitting.edits

    def _cut(self, in_step: bool) -> SyncReport:
        """Cut the weights, also the rest of an interrupted cut, and sync."""
        assert self._unfinished is not None  # the callers looked
        cut, done = self._unfinished
        try:
            cut.carry_out()
            self._unfinished = None
            return self._sync(in_step, done)
        except BaseException as error:
            if cut.remaining:
                warn(
                    f"the cut was interrupted ({in_one_line(error)}): {cut.remaining} weights are "
                    "not cut yet, and the config is not updated. Call hook.sync() to finish it"
                )
            else:
                self._unfinished = None
                try:
                    self._sync(True, done)
                except Exception as other:  # ``error`` is the exception that has to surface
                    warnings.warn(
                        f"HFConfigSyncHook failed after an interrupted step: {other}", stacklevel=2
                    )
            raise

    def _sync(
        self, in_step: bool, done: _Done, failure: ConfigSyncError | None = None
    ) -> SyncReport:
        """Update the config and append a report, also on failure."""
        started = time.perf_counter()
        report = SyncReport(
            len(self._reports) + 1, self._graph_reason, [group.counted() for group in done.groups]
        )
        try:
            if failure is not None:
                raise failure
            with layers_listed(self._pruner.model, self._per_layer):
                report = self.follower.follow(report, done.proof)
            notes = [*self.follower.notes, *report.notes]
            if len(self._reports) == self._first:
                notes = [*self._pruner.DG.notes, *notes]
            if in_step:
                notes += self._choice.notes(bool(report.groups))
            report = replace(report, notes=notes)
        except ConfigSyncError as error:
            failure = error
        before, self._parameters = self._parameters, self._model.num_parameters()
        if failure is None:
            self._cut_log.take(done.edits)
        synced = False
        try:
            if self._sharded is not None:
                self._sharded.carry_out(self._pruner, done.edits, failure)
            elif failure is not None:
                raise failure
            synced = True
        finally:
            refitting, self._refitting = self._refitting, None
            importance = self._pruner.importance
            calibrated = in_step and isinstance(importance, CalibratedImportance)
            report = replace(
                report,
                ranked_by=sorted(importance.used) if calibrated else [],
                parameters=(before, self._parameters),
                seconds=time.perf_counter() - started,
                error=None if failure is None else str(failure),
                refits=None if refitting is None else refitting.finished(synced),
            )
            self._reports.append(report)
        return report

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
            self._pruner.current_step, self._pruner._scope_initial_channels = self._before


@dataclass(frozen=True)
class _State:
    """A model between two syncs: class name, config as JSON, shapes."""

    model: str
    config: dict[str, Any]
    shapes: Shapes

    @classmethod
    def of(cls, model: Any) -> _State:
        name = stock_class(type(model)).__name__
        return cls(name, config_json(model.config), shapes(model))


class CutLog:
    """Records what a hook's pruners cut from one model."""

    def __init__(self, model: Any):
        self.model = weakref.ref(model)
        self.total: CutList | None = None  # None: nothing is cut yet, or not all cuts are known
        self._known = True

    def begin(self) -> None:
        self._before = _State.of(self.model())

    def take(self, edits: Mapping[str, tuple[Edit, ...]]) -> None:
        model: Any = self.model()
        before, self._before = self._before, _State.of(model)
        self._known &= explained(model, edits, before.shapes, self._before.shapes)
        if not self._known:
            self.total = None
        if not self._known or not edits:
            return
        kept = {
            name: tuple(NotKept() if isinstance(edit, RefitInPlace) else edit for edit in done)
            for name, done in edits.items()
        }
        step = CutList(before.model, before.config, self._before.config, kept)
        self.total = step if self.total is None else self.total.followed_by(step)
