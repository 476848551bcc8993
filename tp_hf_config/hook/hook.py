"""The hook that keeps a config in step with the weights after every pruning step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import ConfigSyncError
from ..model.locate import check_followable, find_pretrained
from ..planning.choices import Graph, check_graph
from . import registration as pruners
from .history import Recorder
from .report import SyncReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel

    from ..forward.run_recipe import MakeInputs
    from ..graph.config_graph import ConfigGraph
    from ..graph.traced.head_schedule import HeadSchedule
    from .follow import Follower
    from .steering import UnitSteering


class HFConfigSyncHook:
    """Keeps ``model.config`` true to the weights while a Torch-Pruning pruner prunes.

    Pass it to a pruner's constructor, ``hooks=[HFConfigSyncHook()]``, or attach it to an existing
    pruner, ``HFConfigSyncHook().register(pruner)``. One hook follows one pruner.

    Args:
        graph: which dependency graph the pruner uses. ``"config"``: it is made from the config,
            every group is proved, nothing is traced; ``"trace"``: Torch-Pruning traces, safely;
            ``"auto"``: what ``pruner_kwargs`` chose. Without ``pruner_kwargs``, ``"auto"`` makes
            the config graph for what the pruner's own arguments ask for, and traces only where no
            experiment can be made with the class.
        strict: do exactly what the settings ask for, or raise when the hook is attached: where the
            class does not accept it, or where another live model holds the same config object. By
            default the hook does the nearest that the class accepts and says so in the report; for
            a shared config it warns (:class:`~tp_hf_config.PrunerSettingsWarning`). Settings that
            no config could describe raise in either case, before any weight is touched.
        make_inputs: a function of a config that returns a forward pass's keyword arguments, for a
            class that the library cannot feed by itself: see :func:`~tp_hf_config.prunable`.
            Needed only without ``pruner_kwargs(make_inputs=)``, and with a traced graph.

    Attributes:
        reports: one :class:`~tp_hf_config.SyncReport` per sync, the latest last.
    """

    def __init__(
        self,
        graph: Graph = "auto",
        strict: bool = False,
        make_inputs: MakeInputs | None = None,
    ) -> None:
        check_graph(graph)
        self.graph, self.strict, self.make_inputs = graph, strict, make_inputs
        self.reports: list[SyncReport] = []
        self._why = "traced graph: registered with a pruner that had it"
        self._unproved: list[str] = []
        self._follower: Follower | None = None
        self._recorder: Recorder | None = None
        self._schedule: HeadSchedule | None = None
        self._steering: UnitSteering | None = None
        self._parameters = 0
        self._refused = False

    @property
    def last_report(self) -> SyncReport | None:
        """Return the report of the latest sync; ``None`` before the first."""
        return self.reports[-1] if self.reports else None

    def register(self, pruner: Any) -> pruners.Handle:
        """Attach this hook to an existing pruner.

        Returns:
            A handle with ``remove()``, which is also a context manager.

        Raises:
            UnsupportedModelError: the pruner's model cannot be followed, or a traced group that it
                is going to prune is wrong.
            ConfigSyncError: see :meth:`attach`.
            ValueError: this hook follows another pruner already.
        """
        return pruners.register(pruner, self)

    @contextmanager
    def constructing(self, arguments: dict[str, Any]) -> Iterator[None]:
        """Surround a pruner's constructor: check the model; install the graph or trace safely."""
        from ..graph.pruner_access import building
        from ..graph.traced.groups import keeping_groups
        from ..graph.traced.safe_tracing import safe_tracing

        model: nn.Module = arguments["model"]
        _, pretrained = find_pretrained(model)
        check_followable(pretrained)
        graph = self._graph_for(model, pretrained, arguments)
        if graph is not None:
            with building(graph):
                yield
        else:
            with safe_tracing(model), keeping_groups():
                yield

    def _graph_for(
        self, model: nn.Module, pretrained: PreTrainedModel, arguments: dict[str, Any]
    ) -> ConfigGraph | None:
        """Return the config graph to install, or None to trace.

        Args:
            model: the module that the pruner prunes.
            pretrained: the Hugging Face model in it.
            arguments: those of the pruner's constructor; they are adapted to the config graph.

        Raises:
            ValueError: a ratio is outside 0 to 1, or the arguments were made for another graph or
                other heads.
        """
        from ..fieldmap.field_map import map_of
        from ..fieldmap.model_view import WidthView
        from ..planning.pruner_arguments import check_handed, check_ratios, settle
        from ..planning.pruner_kwargs import by_itself

        check_ratios(arguments)
        inputs = arguments.get("example_inputs")
        graph, self._why = getattr(inputs, "graph", None), getattr(inputs, "why", "")
        if self.graph == "trace":
            if graph is not None:
                raise ValueError(
                    "HFConfigSyncHook(graph='trace'), but pruner_kwargs made its arguments for the "
                    "config graph: say pruner_kwargs(model, graph='trace') too"
                )
            self._why = "traced graph: asked for"
        elif graph is None and (self.graph == "config" or not self._why):
            must = self.graph == "config"
            by_config = by_itself(model, arguments, must, self.make_inputs)
            if isinstance(by_config, str):
                self._why = f"traced graph: {by_config}"
            else:
                arguments |= by_config
                inputs = by_config["example_inputs"]
                graph, self._why = inputs.graph, inputs.why
        check_handed(getattr(inputs, "handed", {}), arguments, traced=graph is None)
        if graph is not None:
            field_map = map_of(pretrained, make_inputs=graph.make_inputs)
            settle(WidthView(pretrained, field_map), graph, arguments)
        return graph

    def attach(self, pruner: Any) -> None:
        """Start to follow a pruner; ``register`` calls this.

        Raises:
            ConfigSyncError: no config could describe what the pruner's settings leave; with
                ``strict``, also if that is not what they ask for, or if another live model holds
                the config.
            UnsupportedModelError: the model cannot be followed, or a traced group is wrong.
            ValueError: this hook follows another pruner already.
        """
        from ..graph.config_graph import ConfigGraph
        from ..graph.traced.groups import forget_groups
        from ..graph.traced.head_schedule import HeadSchedule
        from ..graph.traced.proof import check_traced
        from ..planning.preflight import check_config_is_own, foresee
        from .follow import Follower
        from .steering import UnitSteering
        from .step_preflight import foretell_traced

        if self._follower is not None:
            raise ValueError(
                "this HFConfigSyncHook follows another pruner already: give every pruner a hook "
                "of its own, or remove() the handle of the other one first"
            )
        follower = Follower(pruner, getattr(pruner.DG, "make_inputs", None) or self.make_inputs)
        check_config_is_own(pruner, follower.model, follower.sharers, self.strict)
        steering = UnitSteering(pruner)
        schedule = HeadSchedule(pruner, follower.accepts_heads)
        with ExitStack() as undo, ExitStack() as done:
            done.callback(forget_groups, pruner.DG)
            if not isinstance(pruner.DG, ConfigGraph):
                self._unproved = check_traced(pruner, follower.model, follower.field_map)
            for part in (steering, schedule):
                part.attach()
                undo.callback(part.detach)
            steering.foreseen = foresee(pruner, follower.view, self.strict)
            if not isinstance(pruner.DG, ConfigGraph):
                foretell_traced(follower, pruner)
            undo.pop_all()
        self._follower, self._recorder = follower, Recorder(pruner.DG)
        self._schedule, self._steering = schedule, steering
        self._parameters = follower.model.num_parameters()
        self._recorder.attach()

    def detach(self, pruner: Any) -> None:
        """Stop following; called when the handle is removed."""
        for part in (self._recorder, self._schedule, self._steering):
            if part is not None:
                part.detach()
        self._follower = self._recorder = self._schedule = self._steering = None
        self._unproved = []

    def _told_once(self) -> list[str]:
        """Return what the next report says of the graph.

        Every report names traced groups that are not proved; the first one also says what the graph
        leaves as it is.
        """
        assert self._follower is not None  # _sync checks this
        graph = self._follower.pruner.DG
        graph_notes = [] if self.reports else getattr(graph, "notes", [])
        return [*self._unproved, *graph_notes]

    def _adjusted(self) -> list[str]:
        """Return what the pruner's latest step did instead of what its ratios ask for."""
        steering = self._steering
        if steering is None or steering.foreseen is None:
            return []
        return steering.foreseen.notes(steering.pruner.current_step)

    @contextmanager
    def stepping(self, pruner: Any) -> Iterator[None]:
        """Surround a step: prove first what it leaves, and copy every parameter only once.

        Raises:
            UnsupportedModelError: the model gained or lost parts since the hook was attached.
            ConfigSyncError: no config could describe what the step leaves.
        """
        from .steering import cutting_together
        from .step_preflight import proved_first

        if self._follower is not None:
            self._follower.check_parts()
        with cutting_together(pruner), proved_first(pruner, partial(self._prove, pruner)):
            yield

    def _prove(self, pruner: Any, groups: Sequence[Any]) -> None:
        """Raise if no config could describe what a step leaves; nothing of it is pruned then.

        Raises:
            ConfigSyncError: no config could.
        """
        from .step_preflight import foretell

        assert self._follower is not None  # only an attached hook is called in a step
        try:
            foretell(self._follower, pruner, groups, pruner.current_step)
        except ConfigSyncError:
            self._refused = True
            raise

    def after_step(self, pruner: Any) -> None:
        """Sync after a step of the pruner; after a refused step there is nothing to do."""
        refused, self._refused = self._refused, False
        if not refused:
            self._sync(stepped=True)

    def sync(self) -> SyncReport:
        """Bring the config in step with the weights, now.

        The hook does it after every step. Call it yourself after ``group.prune()``,
        ``pruner.manual_prune_width(...)`` or ``load_pruning_history(...)``.

        Returns:
            The report of this sync, which is also the last of ``reports``.

        Raises:
            ConfigSyncError: no config of this class describes the weights. Nothing is written then;
                pruning can go on and sync later.
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
        started = time.perf_counter()
        groups = self._recorder.drain()
        failed: ConfigSyncError | None = None
        try:
            outcome = self._follower.follow(groups)
            of_step = [*outcome["notes"][len(self._follower.notes) :], *self._adjusted()]
            if stepped and not groups and not of_step and self._steering is not None:
                of_step = [f"nothing was pruned: {self._steering.why_nothing()}"]
            outcome["notes"] = [*self._told_once(), *self._follower.notes, *of_step]
        except ConfigSyncError as error:
            failed, outcome = error, {"error": str(error)}
        before, self._parameters = self._parameters, self._follower.model.num_parameters()
        report = SyncReport(
            step=len(self.reports) + 1,
            graph=self._why,
            groups=groups,
            parameters=(before, self._parameters),
            seconds=time.perf_counter() - started,
            **outcome,
        )
        self.reports.append(report)
        if failed is not None:
            raise failed
        return report

    def plot(self, path: str | PathLike[str]) -> Figure:
        """Draw the widths before the first step and after the last.

        Args:
            path: the file to write; its suffix sets the format, PNG without one.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: there is no report yet.
        """
        from .plots import plot_widths

        return plot_widths(self.reports, path)

    def plot_history(
        self, path: str | PathLike[str], metrics: Mapping[str, Sequence[float]] | None = None
    ) -> Figure:
        """Draw the parameter count after each step, and the metrics below it.

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
