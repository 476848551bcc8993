"""The hook: after every step the config follows the weights."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import nn

from . import pruners
from .choice import Graph, check_graph
from .errors import ConfigSyncError
from .history import Recorder
from .locate import check_followable, find_pretrained
from .report import SyncReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel

    from .graph import ConfigGraph
    from .head_schedule import HeadSchedule
    from .steer import UnitSteering
    from .sync import Follower


class HFConfigSyncHook:
    """Keeps ``model.config`` true to the weights while a Torch-Pruning pruner prunes.

    Pass it to a pruner's constructor, ``hooks=[HFConfigSyncHook()]``, or attach it to a pruner that
    exists, ``HFConfigSyncHook().register(pruner)``. One hook follows one pruner.

    Args:
        graph: ``"config"``: the pruner's dependency graph is made from the config, every group
            proved, nothing traced; ``"trace"``: Torch-Pruning traces, safely; ``"auto"``: what
            ``pruner_kwargs`` chose; without it the former, for what the pruner's own arguments
            ask for, but the trace where no experiment can be made.
        strict: do what the settings ask for, or nothing: where the class does not take that, or
            another live model holds the config object too, the hook raises when it is attached. By
            default the nearest that the class takes is done and said in the report, and of the
            config a warning tells (:class:`~tp_hf_config.PrunerSettingsWarning`). Settings that no
            config could follow raise in either case, before any weight is touched.

    Attributes:
        reports: one :class:`~tp_hf_config.SyncReport` per sync, the latest last.
    """

    def __init__(self, graph: Graph = "auto", strict: bool = False) -> None:
        check_graph(graph)
        self.graph, self.strict = graph, strict
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
        """The report of the latest sync; ``None`` before the first."""
        return self.reports[-1] if self.reports else None

    def register(self, pruner: Any) -> pruners.Handle:
        """Attach this hook to a pruner that exists already.

        Returns:
            A handle with ``remove()``, which is also a context manager.

        Raises:
            UnsupportedModelError: the pruner's model cannot be followed, or a traced group that it
                is going to prune is wrong.
        """
        return pruners.register(pruner, self)

    @contextmanager
    def constructing(self, arguments: dict[str, Any]) -> Iterator[None]:
        """Around a pruner's constructor: check the model, put the graph in or trace safely."""
        from .steer import building
        from .traced_groups import keeping_groups
        from .tracing import safe_tracing

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
        """The graph to put in, with the arguments settled for it; ``None``: trace."""
        from .arguments import check_handed, check_ratios, settle
        from .learn import map_of
        from .prepare import by_itself
        from .widths import WidthView

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
            made = by_itself(model, arguments, must=self.graph == "config")
            if isinstance(made, str):
                self._why = f"traced graph: {made}"
            else:
                arguments |= made
                inputs = made["example_inputs"]
                graph, self._why = inputs.graph, inputs.why
        check_handed(getattr(inputs, "handed", {}), arguments, traced=graph is None)
        if graph is not None:
            settle(WidthView(pretrained, map_of(pretrained)), graph, arguments)
        return graph

    def attach(self, pruner: Any) -> None:
        """Start following a pruner; called by ``register``.

        Raises:
            ConfigSyncError: no config could say what the pruner's settings leave; ``strict``, and
                it is not what they ask for, or the config is another live model's too.
        """
        from .before_cut import foretell_traced
        from .foresee import check_config_is_own, foresee
        from .graph import ConfigGraph
        from .head_schedule import HeadSchedule
        from .steer import UnitSteering
        from .sync import Follower
        from .traced_groups import forget_groups
        from .traced_proof import check_traced

        if self._follower is not None:
            raise ValueError(
                "this HFConfigSyncHook follows another pruner already: give every pruner a hook "
                "of its own, or remove() the handle of the other one first"
            )
        follower = Follower(pruner)
        check_config_is_own(pruner, follower.model, follower.sharers, self.strict)
        steering = UnitSteering(pruner)
        schedule = HeadSchedule(pruner, follower.accepts_heads)
        with ExitStack() as undo, ExitStack() as done:
            done.callback(forget_groups, pruner.DG)
            if not isinstance(pruner.DG, ConfigGraph):
                self._unproved = check_traced(pruner, follower.model, follower.known)
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
        """What the pruner's graph leaves as it is; of a trace, what is not proved every time."""
        assert self._follower is not None  # sync asked
        graph = self._follower.pruner.DG
        left = [] if self.reports else getattr(graph, "notes", [])
        return [*self._unproved, *left]

    def _adjusted(self) -> list[str]:
        """What the latest step of the pruner did instead of what its ratios ask for."""
        steering = self._steering
        if steering is None or steering.foreseen is None:
            return []
        return steering.foreseen.notes(steering.pruner.current_step)

    @contextmanager
    def stepping(self, pruner: Any) -> Iterator[None]:
        """Around a step: what it leaves is proved first, and every parameter is copied once."""
        from .before_cut import proved_first
        from .steer import cutting_together

        if self._follower is not None:
            self._follower.check_parts()
        with cutting_together(pruner), proved_first(pruner, partial(self._prove, pruner)):
            yield

    def _prove(self, pruner: Any, groups: Sequence[Any]) -> None:
        """Refuse a step that leaves what no config says; nothing of it is pruned then."""
        from .before_cut import foretell

        assert self._follower is not None  # attached, else no step of the pruner comes here
        try:
            foretell(self._follower, pruner, groups, pruner.current_step)
        except ConfigSyncError:
            self._refused = True
            raise

    def after_step(self, pruner: Any) -> None:
        """Called after every step of the pruner; after a refused one there is nothing to do."""
        refused, self._refused = self._refused, False
        if not refused:
            self._sync(stepped=True)

    def sync(self) -> SyncReport:
        """Bring the config in step with the weights, now.

        Called by itself after every step; by hand after ``group.prune()``,
        ``pruner.manual_prune_width(...)`` or ``load_pruning_history(...)``.

        Raises:
            ConfigSyncError: no config of this class says what the weights are. Nothing is written
                then; pruning can go on and sync later.
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
        """Draw the widths before the first step and after the last, as PNG or by the suffix.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: there is no report yet.
        """
        from .plots import plot_widths

        return plot_widths(self.reports, path)

    def plot_history(
        self, path: str | PathLike[str], metrics: Mapping[str, Sequence[float]] | None = None
    ) -> Figure:
        """Draw how many parameters there were after each step, and what was measured of them.

        Args:
            path: the file to write.
            metrics: a name (``"perplexity"``) with a value for each report, or one more: first
                that of before the first step.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: there is no report yet, or a metric has another number of values.
        """
        from .plots import plot_history

        return plot_history(self.reports, path, metrics)
