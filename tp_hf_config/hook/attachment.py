"""Cut what a pruner's graph recorded, all at once, as soon as a config describes the result.

Before a step that is expected to cost too much, say what would cost less, with numbers.
"""

from __future__ import annotations

import math
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from torch import nn

from ..calibration.calibrate import Calibration
from ..calibration.held_out import NOTICEABLE, TOO_MUCH, Refitting, in_words
from ..calibration.importance import CalibratedImportance, advice
from ..errors import (
    CalibrationWarning,
    ConfigSyncError,
    UnsupportedModelError,
    in_one_line,
    listed,
    warn,
)
from ..fieldmap.model_view import view_of
from ..fieldmap.solve import AGAIN
from ..graph.config_graph import ConfigGraph, kept_positions
from ..graph.cut_list import CutList, Edit, edits_of, explained
from ..graph.layer_fields import layers_listed
from ..graph.prunable import Width
from ..graph.pruner_access import arguments_of, cannot_replace_trace, replace_graph, restore_trace
from ..graph.sides import ConfigGroup
from ..model.config_json import config_json
from ..model.fill import LiveCut
from ..model.layer_class import stock_class
from ..model.layer_entries import name_in_all_layers
from ..model.shapes import Shapes, shapes
from ..model.sharded import behind
from ..planning.selection import inner_widths_of
from ..planning.settings import Target
from ..planning.trajectory import preflight
from .follow import Follower, Proof
from .ranks import Agreement, ShardedModel
from .registration import constructor_of
from .report import LayerCut, PrunedGroup, SyncReport, layers_of
from .unit_choice import UnitChoice, is_unmodified

_MOST = 0.9  # of the inner widths: removing more is no alternative


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


def _examined(hook: Any, pruner: Any) -> tuple[Follower, UnitChoice]:
    """Check a pruner's model and settings, and give the pruner the config graph."""
    follower = Follower(pruner, getattr(pruner.DG, "make_inputs", None) or hook.make_inputs)
    if hook.refit is not None:
        hook.refit.check_measures(follower.model)
    elif (better := advice(pruner.importance, follower.model)) is not None:
        warn(better, CalibrationWarning)
    with ExitStack() as undo:
        if not isinstance(pruner.DG, ConfigGraph):
            _check_replaceable(hook, pruner)
            arguments = arguments_of(pruner)
            replace_graph(pruner, hook._graph_for(arguments), arguments)
            undo.callback(restore_trace, pruner)
        choice = UnitChoice(pruner)
        target = Target.of(hook._settings.target)
        choice.preflight = preflight(pruner, follower.view, hook.strict, target)
        undo.pop_all()
    return follower, choice


def _check_replaceable(hook: Any, pruner: Any) -> None:
    """Raise if the trace that a pruner has made cannot be replaced by the config graph."""
    if hook.plan is not None:
        raise ValueError(
            "a plan sets the pruner's ratios and steps, so pass its hook to the pruner's "
            "constructor: hooks=[HFConfigSyncHook(plan=plan)]"
        )
    reason = cannot_replace_trace(pruner, constructor_of(type(pruner)))
    if reason is not None:
        name = type(pruner).__name__
        raise ValueError(
            f"this {name} has already traced its model, and the groups of that trace are not "
            "proved. They cannot be replaced by the graph made from the config: "
            f"{reason}. Pass the hook to the pruner's constructor: "
            f"{name}(model, ..., hooks=[HFConfigSyncHook()])."
        )


@dataclass(frozen=True)
class _Cut:
    """What is cut together; by default nothing, or other code cut."""

    groups: Sequence[Sequence[LayerCut]] = ()  # as numbered before the cut
    edits: Mapping[str, Edit] = field(default_factory=dict)  # of each tensor
    proof: Proof | None = None
    refitting: Refitting | None = None


class Attachment:
    """Proves, refits, cuts and syncs what a pruner records together, or touches nothing.

    A step, or a loop over an interactive step, is cut when it ends. A step other than
    Torch-Pruning's may read weights at any time, so its prunes are cut as soon as a config
    describes the result.
    """

    def __init__(self, hook: Any, pruner: Any):
        self._hook, self._pruner = hook, pruner
        sharded = behind(pruner.model) is not pruner.model
        self._agreement = Agreement(pruner, sharded, hook.distributed)
        self.sharded = ShardedModel(pruner.model, hook.shard, self._agreement) if sharded else None
        with layers_listed(pruner.model, hook.per_layer):
            self.follower, self._choice = _examined(hook, pruner)
        self._model = self.follower.model
        self._parameters = self._model.num_parameters()
        self.recorded = pruner.DG.recorded
        self.recorded.settle = self._settle
        pruner.DG.choose = self._choice.groups
        # steps taken, and sizes that ratios are relative to, before the running step; None once a
        # part of it has a report, so that it counts
        self._before: tuple[int, dict[str, int]] | None = None
        self._stepping = self._own_step = False
        self._loop: object | None = None  # the running loop over an interactive step
        self._refused = False  # True until the running step has completed
        self._reason = ""  # why the recorded prunes wait, once the user knows
        self._unfinished: tuple[LiveCut, _Cut] | None = None  # it failed twice; sync() finishes it

    @property
    def missing(self) -> tuple[str, ...]:
        """What the recorded prunes wait for; empty if nothing is recorded."""
        if not self.recorded:
            return ()
        names = self.recorded.missing()
        if self._loop is not None:
            names.append("the end of the loop over step(interactive=True)")
        return tuple(names) or (self._reason,)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Surround a call of ``step()``; if it raises, drop what it recorded."""
        self._refused = True
        self.release()
        self.follower.check_parts()
        if self.sharded is not None:
            self.sharded.before_step()
        self._agreement.on_settings()
        self._before = self._pruner.current_step, dict(self._pruner._scope_initial_channels)
        self._stepping, self._own_step = True, not is_unmodified(self._pruner)
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
        if looping and self.recorded:
            self._cut_or_wait(in_step=True)
        elif self.recorded:
            try:
                self._carry_out(in_step=True, may_wait=False)
            except BaseException:
                self._take_back()  # the step does not count
                raise
        elif self._before is not None:
            self._before = None
            self._sync(True, _Cut())

    def _settle(self) -> None:
        """Cut what is recorded, unless it is cut when the loop or step ends."""
        if self._loop is None and (self._own_step or not self._stepping):
            self._cut_or_wait(in_step=self._stepping)

    def sync(self) -> SyncReport:
        """Cut what is recorded and sync; if no config describes the result, raise and keep it."""
        if self._unfinished is not None:
            return self._cut(in_step=False)
        if not self.recorded:
            return self._sync(False, _Cut())
        result = self._carry_out(in_step=self._loop is not None)
        if isinstance(result, ConfigSyncError):
            return self._sync(False, _Cut(self._layers(self.recorded.groups())), result)
        return result

    def release(self) -> None:
        """Cut what is recorded, or drop it with a warning: a step begins, or the hook detaches."""
        looping, self._loop = self._loop is not None, None
        if self._unfinished is not None:
            self._cut(in_step=False)
        failure = self._carry_out(in_step=looping) if self.recorded else None
        if isinstance(failure, ConfigSyncError):
            missing = self.recorded.missing()
            what = (
                f"{listed(missing)} would have to be pruned too"
                if missing
                else str(failure).rstrip(". ")
            )
            self._clear()
            warn(
                "recorded groups are discarded, because no config describes the model with only "
                f"these groups pruned: {what}. The model and its config are unchanged."
            )

    def _layers(self, groups: Iterable[ConfigGroup]) -> list[list[LayerCut]]:
        return [[*layers_of(self._pruner.DG, group)] for group in groups]

    def _cut_or_wait(self, in_step: bool) -> None:
        """Cut what is recorded if a config describes the result; else warn once."""
        failure = self._carry_out(in_step)
        if not isinstance(failure, ConfigSyncError):
            return
        known, self._reason = self._reason, str(failure).removesuffix(AGAIN).rstrip()
        if known or self._stepping:
            return
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

    def _carry_out(self, in_step: bool, may_wait: bool = True) -> SyncReport | ConfigSyncError:
        """Prove, refit, cut and sync what is recorded. If it may wait, return why it has to."""
        with layers_listed(self._pruner.model, self._hook.per_layer):
            groups = self.recorded.groups()
            layers, kept = self._layers(groups), kept_positions(self._model, groups)
            try:
                proof = self.follower.prove([*chain(*layers)], kept)
            except ConfigSyncError as error:
                if may_wait:
                    return error
                failure = self._of_step(error)
                self._agreement.on_groups(layers, failure)
                raise failure from None
            self._agreement.on_groups(layers)
            refitting = self._refitting(groups, proof.shapes) if in_step else None
            edits = edits_of(self._model, refitting.edits if refitting else {}, kept)
        self._reason, self._before = "", None
        self.recorded.take()
        cut = LiveCut(self._model, CutList("", {}, {}, edits))
        self._unfinished = cut, _Cut(layers, edits, proof, refitting)
        return self._cut(in_step)

    def _refitting(self, groups: Sequence[ConfigGroup], remaining: Shapes) -> Refitting | None:
        """Return the refits for a step's groups; warn if the step costs too much."""
        calibration = self._hook.refit  # it may change between steps
        if calibration is None:
            return None
        refitting = Refitting(calibration, groups)
        self._agreement.on_refits(refitting.result)
        told = self._advice(refitting, groups, remaining)
        if told is not None:
            warn(told, CalibrationWarning)
        return refitting

    def _advice(
        self, refitting: Refitting, groups: Sequence[ConfigGroup], remaining: Shapes
    ) -> str | None:
        """Return the warning for a step; None if it costs little. ``remaining``: shapes after."""
        expected = refitting.result.expected
        if expected is None or expected <= TOO_MUCH:
            return None
        sizes = {name: parameter.numel() for name, parameter in self._model.named_parameters()}
        before, after = sum(sizes.values()), sum(math.prod(remaining[name]) for name in sizes)
        parts = [
            f"this step removes {before - after:,} of {before:,} parameters. On held-out data the "
            f"output distribution is expected to change by a KL divergence of {expected:.3g}: "
            f"{in_words(expected)}. A change below {NOTICEABLE} is hardly noticeable."
        ]
        if behind(self._model) is self._model:
            parts += self._from_inner_widths(refitting, groups, before - after)
        layers, spread = sorted(refitting.result.layers, key=lambda layer: layer.refit), ""
        if len(layers) > 1:
            ends = (f"{layer.refit:.1%} ({layer.weight})" for layer in (layers[0], layers[-1]))
            spread = f"The outputs of layers change by {' to '.join(ends)}, so "
        parts.append(
            f"{spread}allocate(model, calibration, target_params={after}) prunes most in the "
            "layers where it changes the output least (in the shell: --allocate --target-params "
            f"{after / before:.2f})"
        )
        return " ".join(parts)

    def _from_inner_widths(
        self, refitting: Refitting, groups: Sequence[ConfigGroup], gone: int
    ) -> Iterator[str]:
        """Yield what it costs to remove as much from the inner widths, if that is less."""
        try:  # the model as earlier steps left it
            view = view_of(self._model, self.follower.field_map.recipe.make_inputs)
            widths = inner_widths_of(view)
        except UnsupportedModelError:  # no config describes the last cut yet
            return
        share = gone / (sum(width.parameters * width.units for width in widths) or math.inf)
        others = {group.graph_group.fields for group in groups} - {w.fields for w in widths}
        if not others or not 0 < share <= _MOST:
            return
        cost = refitting.expected_of([*_lowest(view.model, self._hook.refit, widths, share)])
        if cost < (refitting.result.expected or 0.0):
            named = dict.fromkeys(name_in_all_layers(name) for w in widths for name in w.names)
            fields = ", ".join(f'"{name}"' for name in named)
            yield (
                "If as many parameters are removed from the inner widths only, the expected KL "
                f"divergence is {cost:.3g}: prune=({fields},), pruning_ratio={share:.2f}."
            )

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
        self, in_step: bool, done: _Cut, failure: ConfigSyncError | None = None
    ) -> SyncReport:
        """Update the config and append a report, also on failure."""
        started = time.perf_counter()
        hook, graph, reports = self._hook, self._pruner.DG, self._hook.reports
        groups = [PrunedGroup(tuple(layer for layer, _ in cuts)) for cuts in done.groups]
        report = SyncReport(len(reports) + 1, hook._graph_reason, groups)
        try:
            if failure is not None:
                raise failure
            with layers_listed(self._pruner.model, hook.per_layer):
                report = self.follower.follow(report, done.proof)
            notes = [*graph.notes, *self.follower.notes, *report.notes]
            if in_step:
                notes += self._choice.notes(bool(groups))
            report, graph.notes = replace(report, notes=notes), []  # the graph's: told once
            hook._cut_log.take(done.edits)
        except ConfigSyncError as error:
            failure = error
        before, self._parameters = self._parameters, self._model.num_parameters()
        synced = False
        try:
            if self.sharded is not None:
                self.sharded.carry_out(done.edits, failure)
            elif failure is not None:
                raise failure
            synced = True
        finally:
            importance = self._pruner.importance
            calibrated = in_step and isinstance(importance, CalibratedImportance)
            report = replace(
                report,
                ranked_by=sorted(importance.used) if calibrated else [],
                parameters=(before, self._parameters),
                seconds=time.perf_counter() - started,
                error=None if failure is None else str(failure),
                refits=None if done.refitting is None else done.refitting.finished(synced),
            )
            reports.append(report)
        return report

    def _of_step(self, failure: ConfigSyncError) -> ConfigSyncError:
        more = " more" if self._before is None else ""
        return ConfigSyncError(
            f"{type(self._pruner).__name__}: nothing{more} of step {self._pruner.current_step} is "
            "pruned, because no config would describe the result: "
            f"{str(failure).removesuffix(AGAIN).rstrip()}",
            failure.conflicts,
        )

    def _clear(self) -> None:
        self.recorded.clear()
        self._reason = ""

    def _take_back(self) -> None:
        self._clear()
        if self._before is not None:
            self._pruner.current_step, self._pruner._scope_initial_channels = self._before


class CutLog:
    """Records what a hook's pruners cut from one model."""

    def __init__(self, model: Any):
        self.model = weakref.ref(model)
        self.total: CutList | None = None  # None: nothing is cut yet, or not all cuts are known
        self._known = True

    def begin(self) -> None:
        """Note the class, config and shapes that the next cut starts from."""
        model: Any = self.model()
        name = stock_class(type(model)).__name__
        self._before = name, config_json(model.config), shapes(model)

    def take(self, edits: Mapping[str, Edit]) -> None:
        class_name, config, old_shapes = self._before
        self.begin()
        _, new_config, new_shapes = self._before
        model: Any = self.model()
        self._known &= explained(model, edits, old_shapes, new_shapes)
        if not self._known:
            self.total = None
        if not self._known or not edits:
            return
        kept = {name: Edit(edit.kept, None if edit.refits else ()) for name, edit in edits.items()}
        step = CutList(class_name, config, new_config, kept)
        self.total = step if self.total is None else self.total.followed_by(step)
