"""The hook that keeps a config in step with the weights after every pruning step."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import nn

from ..arguments import check_arguments
from ..errors import CalibrationWarning, ConfigSyncError, warn
from ..planning.settings import Graph, Layers, check_graph
from . import registration
from .history import Recorder
from .report import SyncReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..calibration.calibrate import Calibration
    from ..calibration.compensation import Compensating, Compensation
    from ..forward.run_recipe import MakeInputs
    from ..graph.cut_list import CutList
    from .agreement import Agreement
    from .cut_log import CutLog
    from .follow import Follower
    from .rebuilding import Rebuild, Rebuilding
    from .steering import UnitSteering


class HFConfigSyncHook:
    """Keeps ``model.config`` true to the weights while a Torch-Pruning pruner prunes.

    Pass it to a pruner's constructor, ``hooks=[HFConfigSyncHook()]``, or attach it to an existing
    pruner, ``HFConfigSyncHook().register(pruner)``. One hook follows one pruner.

    Args:
        graph: ``"auto"`` or ``"config"``, which mean the same: the dependency graph is made from
            the config, every group is proved, nothing is traced. It is the one of
            ``pruner_kwargs``, or, without ``pruner_kwargs``, one for what the pruner's own
            arguments ask for.
        strict: do exactly what the settings ask for, or raise when the hook is attached: where the
            class does not accept it, or where another live model holds the same config object. By
            default the hook does the nearest that the class accepts and says so in the report; for
            a shared config it warns (:class:`~tp_hf_config.PrunerSettingsWarning`). Settings that
            no config could describe raise in either case, before any weight is touched.
        make_inputs: a function of a config that returns a forward pass's keyword arguments, for a
            class that the library cannot feed by itself: see :func:`~tp_hf_config.prunable`.
            Needed only without ``pruner_kwargs(make_inputs=)``.
        layers: ``"uniform"``: all layers keep the same widths. ``"differ"``: each may have its own,
            as global and isomorphic ranking, ``pruning_ratio_dict`` and ignored layers leave them;
            the config gets ``per_layer_config``, the model the class that builds its layers from it
            (saved with the model, loaded with ``trust_remote_code=True``), and both go again
            once all layers agree.
        compensate: what :func:`~tp_hf_config.calibrate` measured of the pruner's model: before
            every cut the weights that read pruned channels are refitted by least squares, where
            held-out data says that it helps. The report says by how much.
        record_refits: keep what was refitted for ``report.cuts``, in temporary files where it is
            large; without, the cut list of a compensated step cannot be saved or carried out.
        rebuild: for a model under FSDP2: a function that wraps the pruned model, whose parameters
            are on the meta device then, as your own code wrapped the model (``fully_shard``).
        distributed: every process of a run prunes a copy of the model (DistributedDataParallel):
            before each cut all compare what they would cut. Under FSDP2 they always do.

    Attributes:
        reports: one :class:`~tp_hf_config.SyncReport` per sync, the latest last.
    """

    @check_arguments
    def __init__(
        self,
        graph: Graph = "auto",
        strict: bool = False,
        make_inputs: MakeInputs | None = None,
        compensate: Calibration | None = None,
        layers: Layers = "uniform",
        rebuild: Rebuild | None = None,
        record_refits: bool = False,
        distributed: bool = False,
    ) -> None:
        check_graph(graph)
        self.layers, self.strict, self.make_inputs = layers, strict, make_inputs
        self.compensate, self.record_refits = compensate, record_refits
        self._compensating: Compensating | None = None
        self.rebuild, self.distributed = rebuild, distributed
        self.reports: list[SyncReport] = []
        self._graph_reason, self._parameters = "", 0
        self._follower: Follower | None = None
        self._recorder: Recorder | None = None
        self._steering: UnitSteering | None = None
        self._cut_log: CutLog | None = None
        self._rebuilding: Rebuilding | None = None
        self._agreement: Agreement  # from the time on when the hook is attached
        self._step_refused = False
        self._model: Callable[[], Any] = lambda: None  # a weak reference
        self._first = 0  # the first report on this model

    @property
    def cuts(self) -> CutList | None:
        """Return what all steps have cut (``None``: nothing, or other code changed layers)."""
        from .cut_log import joined

        synced = [report for report in self.reports[self._first :] if report.error is None]
        return joined([report.cuts for report in synced if report.groups or report.cuts])

    @property
    def rebuilt_model(self) -> nn.Module | None:
        """Return a model under FSDP2 as it is now, pruned and wrapped by ``rebuild``.

        The model that was sharded first stays as it was. ``None``: the pruner prunes in place.
        """
        return None if self._rebuilding is None else self._rebuilding.model

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
        from ..graph.pruner_classes import constructing_with
        from ..graph.standin import on_standin
        from .installed_graph import graph_for

        arguments |= on_standin(arguments["model"], arguments)
        with layers_listed(arguments["model"], self.layers):
            graph, self._graph_reason = graph_for(arguments, self.make_inputs)
            with constructing_with(graph):
                yield

    def attach(self, pruner: Any) -> None:
        """Start to follow a pruner; ``register`` calls this.

        Raises:
            CalibrationError: ``compensate`` was measured on another model.
            ConfigSyncError: no config could describe what the pruner's settings leave; with
                ``strict``, also if that is not what they ask for, or if another live model holds
                the config.
            UnsupportedModelError: the model cannot be followed, or not pruned.
            ValueError: this hook follows another pruner already, or the pruner's trace cannot be
                replaced.
        """
        from ..graph.layer_fields import layers_listed
        from ..graph.standin import standin_behind
        from .agreement import Agreement
        from .cut_log import CutLog
        from .rebuilding import Rebuilding

        if self._follower is not None:
            raise ValueError(
                "this HFConfigSyncHook follows another pruner already: give every pruner a hook "
                "of its own, or remove() the handle of the other one first"
            )
        standin = standin_behind(pruner.model)
        self._agreement = Agreement(standin is not None, self.distributed)
        self._rebuilding = self._compensating = None
        if standin is not None:
            self._rebuilding = Rebuilding(standin, self.rebuild, self._agreement)
        with layers_listed(pruner.model, self.layers):
            follower = self._attach(pruner)
        self._cut_log = CutLog(follower.model, pruner.DG.cuts)

    def _attach(self, pruner: Any) -> Follower:
        """Attach to a pruner while its model's layers have entries of their own, where they may."""
        from ..calibration.importance import advice
        from ..graph.config_graph import ConfigGraph
        from ..graph.pruner_access import restore_trace
        from ..planning.preflight import check_config_is_own, preflight
        from .follow import Follower
        from .installed_graph import replace_trace
        from .steering import UnitSteering

        follower = Follower(pruner, getattr(pruner.DG, "make_inputs", None) or self.make_inputs)
        check_config_is_own(pruner, follower.model, follower.sharers, self.strict)
        if self.compensate is not None:
            self.compensate.check_measures(follower.model)
        elif (better := advice(pruner.importance, follower.model)) is not None:
            warn(better, CalibrationWarning)
        with ExitStack() as undo:
            if not isinstance(pruner.DG, ConfigGraph):
                self._graph_reason = replace_trace(pruner, self.make_inputs)
                undo.callback(restore_trace, pruner)
            steering = UnitSteering(pruner)
            steering.attach()
            undo.callback(steering.detach)
            steering.preflight = preflight(pruner, follower.view, self.strict)
            undo.pop_all()
        if self._model() is not follower.model:
            self._model, self._first = weakref.ref(follower.model), len(self.reports)
        self._follower, self._recorder = follower, Recorder(pruner.DG)
        self._steering = steering
        self._parameters = follower.model.num_parameters()
        self._recorder.attach()
        return follower

    def detach(self, pruner: Any) -> None:
        """Stop following; called when the handle is removed.

        The last hook to go gives a pruner back the trace that was replaced, if nothing is pruned.
        """
        from ..graph.pruner_access import restore_trace

        for part in (self._recorder, self._steering):
            if part is not None:
                part.detach()
        self._follower = self._recorder = self._steering = None
        if not any(isinstance(hook, HFConfigSyncHook) for hook in registration.hooks_of(pruner)):
            restore_trace(pruner)

    @contextmanager
    def stepping(self, pruner: Any) -> Iterator[None]:
        """Surround a step: prove first what it leaves, and copy every parameter only once.

        Raises:
            UnsupportedModelError: the model gained or lost parts since the hook was attached.
            ConfigSyncError: no config could describe what the step leaves.
            TrainingError: another rank does something else.
        """
        from ..graph.layer_fields import layers_listed
        from .steering import cutting_together
        from .step_preflight import check_step, prove_before_cutting

        assert self._follower is not None  # only an attached hook is called
        with self._refusing():
            self._follower.check_parts()
            if self._rebuilding is not None:
                self._rebuilding.before_step()
            self._agreement.on_settings(pruner)
        prepare = None if self.compensate is None else partial(self._refit, pruner)
        prove = partial(check_step, self._follower, self._agreement, pruner)
        with (
            layers_listed(pruner.model, self.layers),
            cutting_together(pruner),
            prove_before_cutting(pruner, self._refusing, prove, prepare),
        ):
            yield

    def _refit(self, pruner: Any, groups: Sequence[Any], whole: bool) -> None:
        """Solve refits for the groups that a step chose; the cut applies them."""
        from ..calibration.compensation import Compensating
        from ..planning.pruner_arguments import warn
        from .cheaper import advice_before
        from .step_preflight import shapes_left

        assert self.compensate is not None  # only then is it called
        self._compensating = Compensating(self.compensate, groups, whole, self.record_refits)
        self._agreement.on_refits(pruner, self._compensating.result)
        pruner.DG.cuts.apply_refit = self._compensating.applied.apply
        remaining = shapes_left(pruner, self.compensate.model, groups) if whole else None
        if remaining is not None:
            assert self._follower is not None  # only an attached hook refits
            view = self._follower.view
            told = advice_before(view, self.compensate, self._compensating, groups, remaining)
            if told is not None:
                warn(told, CalibrationWarning)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Note that a step cuts nothing, if the block raises: nothing is synced after it."""
        try:
            yield
        except BaseException:
            self._step_refused = True
            raise

    def after_step(self, pruner: Any) -> None:
        """Sync after a step of the pruner; after a refused step there is nothing to do."""
        refused, self._step_refused = self._step_refused, False
        pruner.DG.cuts.apply_refit = None
        if not refused:
            self._sync(stepped=True)
        self._compensating = None

    def sync(self) -> SyncReport:
        """Bring the config in step with the weights, now.

        The hook does it after every step. Call it yourself after ``group.prune()``,
        ``pruner.manual_prune_width(...)`` or ``load_pruning_history(...)``.

        Returns:
            The report of this sync, which is also the last of ``reports``.

        Raises:
            ConfigSyncError: no config of this class describes the weights. Nothing is written then;
                pruning can go on and sync later.
            TrainingError: another rank of a sharded model did something else; it is as it was.
            ValueError: the hook is attached to no pruner.
        """
        return self._sync(stepped=False)

    def _sync(self, stepped: bool) -> SyncReport:
        """Sync; after a step that pruned nothing, the report says why."""
        if self._follower is None or self._recorder is None:
            raise ValueError(
                "this HFConfigSyncHook is attached to no pruner: pass it as hooks=[hook] or call "
                "hook.register(pruner)"
            )
        from ..graph.layer_fields import layers_listed

        started = time.perf_counter()
        groups = self._recorder.drain()
        report = SyncReport(len(self.reports) + 1, self._graph_reason, groups, notes=[])
        failure: ConfigSyncError | None = None
        try:
            with layers_listed(self._follower.pruner.model, self.layers):
                report = self._follower.follow(report)
            notes = list(report.notes)
            if stepped and self._steering is not None:
                notes += self._steering.notes(bool(report.groups))
            if stepped and report.groups and self.compensate and self._compensating is None:
                notes.append(
                    "no weight is refitted: the step of this pruner cannot be gone through before "
                    "its cuts (it is not Torch-Pruning's own, or its importance is told of them)"
                )
            first = len(self.reports) == self._first
            graph_notes = self._follower.pruner.DG.notes if first else []
            report = replace(report, notes=[*graph_notes, *self._follower.notes, *notes])
        except ConfigSyncError as error:
            failure = error
        before, self._parameters = self._parameters, self._follower.model.num_parameters()
        report = replace(
            report,
            parameters=(before, self._parameters),
            seconds=time.perf_counter() - started,
            error=None if failure is None else str(failure),
            compensation=self._compensation(failure is None),
            cuts=self._cut_log.take() if failure is None and self._cut_log else None,
        )
        self.reports.append(report)
        if self._rebuilding is not None:
            self._rebuilding.carry_out(self._follower.pruner, report, failure)
        elif failure is not None:
            raise failure
        return report

    def _compensation(self, synced: bool) -> Compensation | None:
        """Return what the refits of the step that ends came to; ``None`` if there are none."""
        compensating, self._compensating = self._compensating, None
        return None if compensating is None else compensating.finished(synced)

    @check_arguments
    def plot(self, path: str | PathLike[str]) -> Figure:
        """Draw the widths before the first step and after the last; return matplotlib's ``Figure``.

        Args:
            path: the file to write; its suffix sets the format, PNG without one.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: there is no report yet.
        """
        from .plots import plot_widths

        return plot_widths(self.reports, path)

    @check_arguments
    def plot_history(
        self, path: str | PathLike[str], metrics: Mapping[str, Sequence[float]] | None = None
    ) -> Figure:
        """Draw parameters after each step, and metrics below them; return matplotlib's ``Figure``.

        Args:
            path: the file to write; its suffix sets the format, PNG without one.
            metrics: name (``"perplexity"``) -> one value per report, or one more: the first is then
                that of the model before the first step.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: there is no report yet, or a metric has another number of values.
        """
        from .plots import plot_history

        return plot_history(self.reports, path, metrics)
