"""The hook that keeps a config in step with the weights after every pruning step."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import nn

from ..arguments import Share, check_arguments
from ..errors import CalibrationWarning, ConfigSyncError, warn
from ..planning.settings import INNER, Gqa, PruneSettings
from . import registration
from .report import SyncReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..calibration.calibrate import Calibration
    from ..forward.run_recipe import MakeInputs
    from ..graph.cut_list import CutList
    from ..planning.allocate import Allocation
    from ..planning.plan import Plan
    from .agreement import Agreement
    from .cut_log import CutLog
    from .follow import Follower
    from .pending_prunes import Done, PendingPrunes
    from .refits import StepRefits
    from .sharded_model import Shard, ShardedModel
    from .unit_choice import UnitChoice


class HFConfigSyncHook:
    """Keeps ``model.config`` true to the weights while a Torch-Pruning pruner prunes.

    Pass it to a pruner's constructor, ``hooks=[HFConfigSyncHook()]``, or attach it to an existing
    pruner, ``HFConfigSyncHook().register(pruner)``. One hook follows one pruner.

    Torch-Pruning's own arguments, given to the pruner, mean what they mean there: ratios, steps,
    ``prune_num_heads``, ``round_to``, ``ignored_layers``, ``pruning_ratio_dict``, ... Example
    inputs are not needed: ``example_inputs=None``.

    Args:
        prune: what to prune: a config field (``"intermediate_size"``), several, or ``"inner"``: the
            inner widths of feed-forward layers and experts, which cost least (of a class without
            any, every width). Default: the fields that ``ratios`` names; without ``ratios``, every
            width inside the model, as in Torch-Pruning, but for numbers of experts, and if the
            model is inside another module, for the width of what it returns. Of widths that share a
            dimension, only the one that holds most of the model is pruned then; the first report's
            notes name the others.
        ratios: config field -> its own ratio. Fields of ``prune`` that are not here get the
            pruner's ``pruning_ratio``.
        gqa: how grouped-query heads are pruned, by the pruner's ``head_pruning_ratio``.
            ``"query"``: the same number of query heads from every key/value group, key/value heads
            stay; ``"group"``: whole key/value groups. Default: with ``prune_num_heads=True``, query
            heads if a group has several.
        per_layer: each layer may have widths of its own, as global and isomorphic ranking,
            ``pruning_ratio_dict`` and ignored layers leave them; the config gets
            ``per_layer_config``, the model the class that builds its layers from it (saved with the
            model, loaded with ``trust_remote_code=True``), and both go again once all layers agree.
        refit: what :func:`~tp_hf_config.calibrate` measured of the pruner's model: before every cut
            the weights that read pruned channels are refitted by least squares, where held-out data
            says that it helps. The report says by how much.
        plan: what :func:`~tp_hf_config.plan` or :func:`~tp_hf_config.allocate` returned for this
            model, in the place of ``prune``, ``ratios``, ``gqa``, ``per_layer`` and
            ``make_inputs``. The pruner gets the plan's ratios and steps.
        strict: do exactly what the settings ask for, or raise when the hook is attached, where the
            class does not accept it. By default the hook does the nearest that the class accepts
            and says so in the report. Settings that no config could describe raise in either case,
            before any weight is touched.
        make_inputs: a function of a config that returns a forward pass's keyword arguments, for a
            class that the library cannot feed by itself: see :func:`~tp_hf_config.prunable`.
        shard: for a model under FSDP2: a function that wraps the pruned model, whose parameters
            are on the meta device then, as your own code wrapped the model (``fully_shard``).
        distributed: every process of a run prunes a copy of the model (DistributedDataParallel):
            before each cut all compare what they would cut. Under FSDP2 they always do.

    Attributes:
        reports: one :class:`~tp_hf_config.SyncReport` per sync, the latest last.
    """

    carries_out = True  # so that other hooks see the model after the step

    @check_arguments
    def __init__(
        self,
        *,
        prune: str | Iterable[str] | None = None,
        ratios: Mapping[str, Share] | None = None,
        gqa: Gqa | None = None,
        per_layer: bool = False,
        refit: Calibration | None = None,
        plan: Plan | Allocation | None = None,
        strict: bool = False,
        make_inputs: MakeInputs | None = None,
        shard: Shard | None = None,
        distributed: bool = False,
    ) -> None:
        if plan is not None:
            _check_plan_alone(prune, ratios, gqa, make_inputs, per_layer)
            per_layer, make_inputs = plan.settings.per_layer, plan.make_inputs
        self.plan = plan
        self._settings = PruneSettings.of(prune, ratios or None, None, gqa, per_layer=per_layer)
        self._cheapest = prune == INNER
        if plan is not None:
            self._settings, self._cheapest = plan.settings, True
        self.per_layer, self.strict, self.make_inputs = per_layer, strict, make_inputs
        self.refit, self.shard, self.distributed = refit, shard, distributed
        self.reports: list[SyncReport] = []
        self._graph_reason, self._parameters = "", 0
        self._follower: Follower | None = None
        self._choice: UnitChoice | None = None
        self._cut_log: CutLog | None = None
        self._sharded: ShardedModel | None = None
        self._agreement: Agreement  # this and the next: once the hook is attached
        self._refits: StepRefits
        self._pending: PendingPrunes | None = None
        self._first = 0  # the first report on this model

    @property
    def pending(self) -> tuple[str, ...]:
        """Return what is missing until pruned groups are cut: groups to prune, or a reason.

        Empty: nothing waits. ``group.prune()`` outside of a step, and in a loop over an interactive
        one, records what to prune; model and config stay as they were until a config describes all
        that is recorded, and the loop has ended.
        """
        return () if self._pending is None else self._pending.missing

    @property
    def cuts(self) -> CutList | None:
        """Return what all steps have cut (``None``: nothing, or other code changed layers)."""
        return None if self._cut_log is None else self._cut_log.total

    @property
    def sharded_model(self) -> nn.Module | None:
        """Return a model under FSDP2 as it is now, pruned and wrapped by ``shard``.

        The model that was sharded first stays as it was. ``None``: the pruner prunes in place.
        """
        return None if self._sharded is None else self._sharded.model

    @property
    def last_report(self) -> SyncReport | None:
        """Return the report of the latest sync; ``None`` before the first."""
        return self.reports[-1] if self.reports else None

    def register(self, pruner: Any) -> registration.Handle:
        """Attach this hook to an existing pruner.

        A pruner that has traced its model gets the graph made from the config in the place of that
        trace, as if it had been constructed with this hook; its arguments keep their meaning.

        Returns:
            A handle with ``remove()``, which is also a context manager.

        Raises:
            UnsupportedModelError, ConfigSyncError: see :meth:`attach`.
            ValueError: as there; a trace cannot be replaced if the pruner has pruned by it, or its
                constructor is not Torch-Pruning's.
        """
        return registration.register(pruner, self)

    @contextmanager
    def constructing(self, arguments: dict[str, Any]) -> Iterator[None]:
        """Surround a pruner's constructor: check the model, and install the graph."""
        from ..graph.layer_fields import layers_listed
        from ..graph.meta_copy import on_meta_copy
        from ..graph.pruner_classes import constructing_with
        from ..planning.pruner_graph import graph_for

        arguments |= on_meta_copy(arguments["model"], arguments)
        with layers_listed(arguments["model"], self.per_layer):
            if self.plan is not None:
                self.plan.check_fits(arguments["model"])
                arguments |= _planned(arguments, self.plan.of_pruner())
            graph, self._graph_reason = graph_for(
                arguments, self._settings, self.make_inputs, self._cheapest
            )
            with constructing_with(graph):
                yield

    def attach(self, pruner: Any) -> None:
        """Start to follow a pruner; ``register`` calls this.

        Raises:
            CalibrationError: ``refit`` was measured on another model.
            ConfigSyncError: no config could describe what the pruner's settings leave; with
                ``strict``, also if that is not what they ask for, or if another live model holds
                the config.
            UnsupportedModelError: the model cannot be followed, or not pruned.
            ValueError: this hook follows another pruner already, the pruner has another
                HFConfigSyncHook, or its trace cannot be replaced.
        """
        from ..graph.layer_fields import layers_listed
        from ..model.sharded import behind
        from .agreement import Agreement
        from .sharded_model import ShardedModel

        if self._follower is not None:
            raise ValueError(
                "this HFConfigSyncHook follows another pruner already: give every pruner a hook "
                "of its own, or remove() the handle of the other one first"
            )
        if any(isinstance(hook, HFConfigSyncHook) for hook in registration.hooks_of(pruner)):
            raise ValueError(
                f"this {type(pruner).__name__} has an HFConfigSyncHook already, and one is enough. "
                "To put this one in its place, remove() the handle of the other first"
            )
        sharded = behind(pruner.model) is not pruner.model
        self._agreement = Agreement(sharded, self.distributed)
        self._sharded = None
        if sharded:
            self._sharded = ShardedModel(pruner.model, self.shard, self._agreement)
        with layers_listed(pruner.model, self.per_layer):
            cut_log = self._attach(pruner)
        cut_log.begin()

    def _attach(self, pruner: Any) -> CutLog:
        """Attach to a pruner while its model's layers have entries of their own, where they may."""
        from ..calibration.importance import advice
        from ..graph.config_graph import ConfigGraph
        from ..graph.pruner_access import restore_trace
        from ..planning.preflight import preflight
        from .cut_log import CutLog
        from .follow import Follower
        from .installed_graph import replace_trace
        from .pending_prunes import PendingPrunes
        from .refits import StepRefits
        from .unit_choice import UnitChoice

        follower = Follower(pruner, getattr(pruner.DG, "make_inputs", None) or self.make_inputs)
        if self.refit is not None:
            self.refit.check_measures(follower.model)
        elif (better := advice(pruner.importance, follower.model)) is not None:
            warn(better, CalibrationWarning)
        with ExitStack() as undo:
            if not isinstance(pruner.DG, ConfigGraph):
                if self.plan is not None:
                    raise ValueError(
                        "a plan sets the pruner's ratios and steps, so its hook is passed to the "
                        "constructor: hooks=[HFConfigSyncHook(plan=...)]"
                    )
                self._graph_reason = replace_trace(
                    pruner, self._settings, self.make_inputs, self._cheapest
                )
                undo.callback(restore_trace, pruner)
            choice = UnitChoice(pruner)
            choice.preflight = preflight(pruner, follower.view, self.strict)
            undo.pop_all()
        if self._cut_log is None or self._cut_log.model() is not follower.model:
            self._cut_log, self._first = CutLog(follower.model), len(self.reports)
        self._follower = follower
        self._choice, pruner.DG.choose = choice, choice.groups
        self._refits = StepRefits(self, follower, self._agreement)
        self._pending = PendingPrunes(
            pruner, follower, self._agreement, self.per_layer, self._refits, self._sync
        )
        pruner.DG.recorded.settle = self._pending.settle
        self._parameters = follower.model.num_parameters()
        return self._cut_log

    def detach(self, pruner: Any) -> None:
        """Stop following; called when the handle is removed.

        The pruner gets the trace that was replaced back, if nothing is pruned.
        """
        from ..graph.pruner_access import restore_trace

        if self._pending is not None:
            self._pending.release()
        self._follower = self._choice = self._pending = None
        graph = pruner.DG
        graph.choose = graph.recorded.settle = graph.recorded.refuse
        restore_trace(pruner)

    @contextmanager
    def stepping(self, pruner: Any) -> Iterator[None]:
        """Surround a step, which records what is to be cut.

        Raises:
            UnsupportedModelError: the model gained or lost parts since the hook was attached.
            TrainingError: another rank does something else.
        """
        assert self._follower is not None  # only an attached hook is called
        assert self._pending is not None
        with self._pending.step():
            self._follower.check_parts()
            if self._sharded is not None:
                self._sharded.before_step()
            self._agreement.on_settings(pruner)
            yield

    def looping(self, pruner: Any) -> AbstractContextManager[None]:
        """Surround the user's loop over the groups of an interactive step."""
        assert self._pending is not None  # only an attached hook is called
        return self._pending.loop()

    def after_step(self, pruner: Any) -> None:
        """Carry out what a step or a loop recorded; after a refused step there is nothing to do.

        Raises:
            ConfigSyncError: no config could describe what the step leaves; nothing of it is pruned.
            TrainingError: another rank would cut something else.
        """
        if self._pending is not None:
            self._pending.finish()

    def sync(self) -> SyncReport:
        """Bring the config in step with the weights, now.

        The hook does it after every step, and after ``group.prune()``,
        ``pruner.manual_prune_width(...)`` or ``load_pruning_history(...)`` as soon as a config
        describes what they leave. Call it yourself after code of yours has cut layers.

        Returns:
            The report of this sync, which is also the last of ``reports``.

        Raises:
            ConfigSyncError: no config of this class describes the weights, or what is recorded
                (see ``pending``). Nothing is cut or written then; pruning can go on.
            TrainingError: another rank of a sharded model did something else; it is as it was.
            ValueError: the hook is attached to no pruner.
        """
        if self._pending is None:
            raise ValueError(
                "this HFConfigSyncHook is attached to no pruner: pass it as hooks=[hook] or call "
                "hook.register(pruner)"
            )
        return self._pending.sync()

    def _sync(self, stepped: bool, done: Done, failure: ConfigSyncError | None) -> SyncReport:
        """Sync; after a step that pruned nothing, the report says why.

        Args:
            stepped: True after a step.
            done: what was cut.
            failure: why it cannot be cut, which the report says then.
        """
        from ..graph.layer_fields import layers_listed

        assert self._follower is not None  # only an attached hook is called
        started = time.perf_counter()
        report = SyncReport(
            len(self.reports) + 1, self._graph_reason, [group.counted() for group in done.groups]
        )
        try:
            if failure is not None:
                raise failure
            with layers_listed(self._follower.pruner.model, self.per_layer):
                report = self._follower.follow(report, done.groups)
            notes = list(report.notes)
            if stepped and self._choice is not None:
                notes += self._choice.notes(bool(report.groups))
            first = len(self.reports) == self._first
            graph_notes = self._follower.pruner.DG.notes if first else []
            report = replace(report, notes=[*graph_notes, *self._follower.notes, *notes])
        except ConfigSyncError as error:
            failure = error
        before, self._parameters = self._parameters, self._follower.model.num_parameters()
        if failure is None and self._cut_log is not None:
            self._cut_log.take(done.edits)
        synced = False
        try:
            if self._sharded is not None:
                self._sharded.carry_out(self._follower.pruner, done.edits, failure)
            elif failure is not None:
                raise failure
            synced = True
        finally:
            report = replace(
                report,
                parameters=(before, self._parameters),
                seconds=time.perf_counter() - started,
                error=None if failure is None else str(failure),
                refits=self._refits.taken(synced),
            )
            self.reports.append(report)
        return report

    def __repr__(self) -> str:
        names = ("plan", "strict", "per_layer", "refit", "make_inputs")
        given = {name: getattr(self, name) for name in (*names, "shard", "distributed")}
        if self.plan is None:
            asked = self._settings
            prune = INNER if self._cheapest else asked.prune and ", ".join(asked.prune)
            given = {"prune": prune, "gqa": asked.gqa, **given}
        settings = ", ".join(
            f"{name}={value if isinstance(value, (bool, str)) else '...'}"
            for name, value in given.items()
            if value not in (None, False)
        )
        state = "attached to no pruner"
        if self._follower is not None:
            pruner, name = self._follower.pruner, type(self._follower.model).__name__
            state = f"{type(pruner).__name__} of {name}, step {pruner.current_step} of "
            state += f"{pruner.iterative_steps}"
        waiting = ", groups recorded and not cut (hook.pending)" if self.pending else ""
        return f"HFConfigSyncHook({settings}): {state}, {len(self.reports)} reports{waiting}"

    @check_arguments
    def plot(self, path: str | PathLike[str]) -> Figure:
        """Draw the widths before the first step and after the last; return matplotlib's ``Figure``.

        ``path``: the file to write; its suffix sets the format, PNG without one.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: there is no report yet.
        """
        from ..plots import plot_widths

        return plot_widths(self.reports, path)

    @check_arguments
    def plot_history(
        self, path: str | PathLike[str], metrics: Mapping[str, Sequence[float]] | None = None
    ) -> Figure:
        """Draw parameters after each step, and metrics below them; return matplotlib's ``Figure``.

        Args:
            path: as for :meth:`plot`.
            metrics: name (``"perplexity"``) -> one value per report, or one more: the first is then
                that of the model before the first step.

        Raises:
            ImportError, ValueError: as there; or a metric has another number of values.
        """
        from ..plots import plot_history

        return plot_history(self.reports, path, metrics)


def _check_plan_alone(*others: Any) -> None:
    """Raise if a hook is given a plan and what a plan says too."""
    if any(others):
        raise ValueError(
            "HFConfigSyncHook(plan=...): the plan says what is pruned, so leave out prune=, "
            "ratios=, gqa=, per_layer= and make_inputs=, or the plan"
        )


def _planned(arguments: Mapping[str, Any], planned: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan's arguments of a pruner; raise if the pruner was given others."""
    from ..graph.pruner_classes import BasePruner  # imports torch_pruning, which imports hooks

    defaults = inspect.signature(BasePruner.__init__).parameters
    for name, value in planned.items():
        given = arguments.get(name)
        if given not in (value, defaults[name].default):
            raise ValueError(
                f"the pruner has {name}={given}, and the hook's plan {name}={value}: leave "
                f"{name}= out of the pruner, or make a plan with it"
            )
    return dict(planned)
