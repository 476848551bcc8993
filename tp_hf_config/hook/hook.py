"""The hook that updates a model's config after every pruning step."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import nn

from ..arguments import Share, check_arguments
from ..planning.settings import INNER, Gqa, PruneSettings
from . import registration
from .report import SyncReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..calibration.calibrate import Calibration
    from ..forward.run_recipe import MakeInputs
    from ..graph.config_graph import ConfigGraph
    from ..graph.cut_list import CutList
    from ..planning.allocate import Allocation
    from ..planning.plan import Plan
    from .attachment import Attachment, CutLog
    from .ranks import Shard, ShardedModel


class HFConfigSyncHook:
    """Keeps ``model.config`` correct while a Torch-Pruning pruner prunes the model.

    Pass the hook to a pruner's constructor, ``hooks=[HFConfigSyncHook()]``, or attach it to an
    existing pruner, ``HFConfigSyncHook().register(pruner)``. Each pruner needs its own hook.

    The pruner's own arguments keep their meaning: ratios, steps, ``prune_num_heads``, ``round_to``,
    ``ignored_layers``, ``pruning_ratio_dict``, ... Example inputs are not needed:
    ``example_inputs=None``.

    Args:
        prune: what to prune: a config field (``"intermediate_size"``), several fields, or
            ``"inner"``: the inner widths of feed-forward layers and experts, which cost least for
            each parameter (every width if the class has none). Default: the fields in ``ratios``;
            without ``ratios``, every width inside the model, as in Torch-Pruning, except numbers of
            experts and, if the model is inside another module, its output width. If widths share a
            dimension, the default prunes only the one that holds most parameters; the notes of the
            first report name the others.
        ratios: config field -> its ratio. Other fields of ``prune`` use the pruner's
            ``pruning_ratio``.
        gqa: how ``head_pruning_ratio`` prunes grouped-query heads. ``"query"``: the same number of
            query heads from every key/value group; key/value heads remain. ``"group"``: whole
            key/value groups. Default: with ``prune_num_heads=True``, query heads if a group has
            several.
        per_layer: layers may end with different widths (global or isomorphic ranking,
            ``pruning_ratio_dict``, ignored layers). The config gets ``per_layer_config``, and the
            model a class that builds its layers from it; that class is saved with the model and
            loaded with ``trust_remote_code=True``. Both are removed if all layers agree again.
        target: tools that will run or quantise the model, as in :func:`~tp_hf_config.plan`:
            ``"gguf-k"``, ``"w4a16,tp=2"``, ... Widths go to the nearest numbers that all of them
            take. Default: to the nearest multiple of 64, else of 32, 16 or 8 channels, that moves
            them by less than 2 % of the original; the pruner's ``round_to=1`` keeps the ratios.
        refit: result of :func:`~tp_hf_config.calibrate` for the pruner's model. Before every cut,
            the weights that read pruned channels are adjusted by least squares, so that each
            layer's output changes as little as possible. An adjustment is kept only if it helps on
            held-out data; the report has the numbers.
        plan: result of :func:`~tp_hf_config.plan` or :func:`~tp_hf_config.allocate` for this model,
            instead of ``prune``, ``ratios``, ``gqa``, ``per_layer``, ``target`` and
            ``make_inputs``. The pruner gets the plan's ratios and steps.
        strict: raise when the hook is attached if the class does not accept exactly what the
            settings ask for. By default, the nearest accepted value is used, and the report says
            so. Settings that no config can describe always raise, before any weight changes.
        make_inputs: a function of a config that returns the keyword arguments of a forward pass,
            for a class whose inputs the library cannot make; see :func:`~tp_hf_config.prunable`.
        shard: for a model under FSDP2: a function that makes your ``fully_shard`` calls on the
            pruned model, whose parameters are on the meta device at that time.
        distributed: every process prunes a copy of the model (DistributedDataParallel). All compare
            what they are about to remove before each cut. Under FSDP2 they always do.

    Attributes:
        reports: one :class:`~tp_hf_config.SyncReport` per sync, the latest last.
    """

    carries_out = True  # its after_step runs first, so that other hooks see the pruned model

    @check_arguments
    def __init__(
        self,
        *,
        prune: str | Iterable[str] | None = None,
        ratios: Mapping[str, Share] | None = None,
        gqa: Gqa | None = None,
        per_layer: bool = False,
        target: str | None = None,
        refit: Calibration | None = None,
        plan: Plan | Allocation | None = None,
        strict: bool = False,
        make_inputs: MakeInputs | None = None,
        shard: Shard | None = None,
        distributed: bool = False,
    ) -> None:
        self.plan, self._cheapest = plan, plan is not None or prune == INNER
        if plan is None:
            self._settings = PruneSettings.of(
                prune, ratios or None, None, gqa, per_layer=per_layer, target=target
            )
        elif any((prune, ratios, gqa, make_inputs, per_layer, target)):
            raise ValueError(
                "HFConfigSyncHook(plan=...): the plan already says what to prune. Leave out "
                "prune=, ratios=, gqa=, per_layer=, target= and make_inputs=, or leave out plan="
            )
        else:
            self._settings, make_inputs = plan.settings, plan.make_inputs
            per_layer = plan.settings.per_layer
        self.per_layer, self.strict, self.make_inputs = per_layer, strict, make_inputs
        self.refit, self.shard, self.distributed = refit, shard, distributed
        self.reports: list[SyncReport] = []
        self._graph_reason = ""
        self._attachment: Attachment | None = None
        self._cut_log: CutLog | None = None
        self._sharded: ShardedModel | None = None

    @property
    def pending(self) -> tuple[str, ...]:
        """What recorded prunes wait for: groups that also have to be pruned, or a reason.

        Empty if nothing is recorded. ``group.prune()`` outside a step, or in the loop over an
        interactive step, only records units. The model and its config change once a config
        describes everything recorded and the loop has ended.
        """
        return () if self._attachment is None else self._attachment.missing

    @property
    def cuts(self) -> CutList | None:
        """The cut list of all steps; ``None``: nothing was cut, or other code changed layers."""
        return None if self._cut_log is None else self._cut_log.total

    @property
    def sharded_model(self) -> nn.Module | None:
        """The pruned model under FSDP2, as wrapped by ``shard``; ``None``: pruned in place."""
        return None if self._sharded is None else self._sharded.model

    @property
    def last_report(self) -> SyncReport | None:
        """The report of the latest sync; ``None`` before the first."""
        return self.reports[-1] if self.reports else None

    def register(self, pruner: Any) -> registration.Handle:
        """Attach this hook to an existing pruner.

        The graph of a pruner that has traced its model is replaced by the one made from the config.
        The pruner's arguments keep their meaning.

        Returns:
            A handle with ``remove()``, which is also a context manager.

        Raises:
            UnsupportedModelError, ConfigSyncError, ValueError: see :meth:`attach`.
        """
        return registration.register(pruner, self)

    @contextmanager
    def constructing(self, arguments: dict[str, Any]) -> Iterator[ConfigGraph]:
        """Surround a pruner's constructor: check the model, and give the pruner its graph."""
        from ..graph.layer_fields import layers_listed
        from ..graph.rebuild import on_meta_copy

        arguments |= on_meta_copy(arguments["model"], arguments)
        with layers_listed(arguments["model"], self.per_layer):
            if self.plan is not None:
                self.plan.check_fits(arguments["model"])
                arguments |= _planned(arguments, self.plan.of_pruner())
            yield self._graph_for(arguments)

    def _graph_for(self, arguments: dict[str, Any]) -> ConfigGraph:
        from ..planning.pruner_graph import graph_for

        graph, self._graph_reason = graph_for(
            arguments, self._settings, self.make_inputs, self._cheapest
        )
        return graph

    def attach(self, pruner: Any) -> None:
        """Start to follow a pruner; ``register`` calls this.

        Raises:
            CalibrationError: ``refit`` was measured on another model.
            ConfigSyncError: no config describes the result of the pruner's settings. With
                ``strict``, also if the result is not exactly what they ask for.
            UnsupportedModelError: the model is not supported, or cannot be pruned.
            ValueError: this hook follows another pruner, the pruner has another HFConfigSyncHook,
                or its trace cannot be replaced: it has pruned already, or its constructor is not
                Torch-Pruning's.
        """
        from .attachment import Attachment, CutLog

        if self._attachment is not None:
            raise ValueError(
                "this HFConfigSyncHook is attached to another pruner. Make a hook for each pruner, "
                "or first call remove() on the handle that register() returned for the other pruner"
            )
        if any(isinstance(hook, HFConfigSyncHook) for hook in registration.hooks_of(pruner)):
            raise ValueError(
                f"this {type(pruner).__name__} already has an HFConfigSyncHook, and it can have "
                "one. To replace it, first call remove() on the handle of the other hook"
            )
        attachment = Attachment(self, pruner)
        model = attachment.follower.model
        if self._cut_log is None or self._cut_log.model() is not model:
            self._cut_log = CutLog(model)
        self._cut_log.begin()
        self._attachment, self._sharded = attachment, attachment.sharded

    def detach(self, pruner: Any) -> None:
        """Stop following a pruner, and restore its replaced trace if nothing was pruned."""
        from ..graph.pruner_access import restore_trace

        if self._attachment is not None:
            self._attachment.release()
        self._attachment = None
        graph = pruner.DG
        graph.choose = graph.recorded.settle = graph.recorded.refuse
        restore_trace(pruner)

    def stepping(self, pruner: Any) -> AbstractContextManager[None]:
        """Surround a step, which records what to cut.

        Raises:
            UnsupportedModelError: the model gained or lost parts since the hook was attached.
            TrainingError: another rank does something else.
        """
        assert self._attachment is not None  # only an attached hook is called
        return self._attachment.step()

    def looping(self, pruner: Any) -> AbstractContextManager[None]:
        """Surround the user's loop over the groups of an interactive step."""
        assert self._attachment is not None  # only an attached hook is called
        return self._attachment.loop()

    def after_step(self, pruner: Any) -> None:
        """Cut what a step or loop recorded; do nothing after a step that was refused.

        Raises:
            ConfigSyncError: no config describes the result of the step; nothing of it is pruned.
            TrainingError: another rank would cut something else.
        """
        if self._attachment is not None:
            self._attachment.finish()

    def sync(self) -> SyncReport:
        """Update the config to match the weights, now.

        The hook does this after every step. After ``group.prune()``,
        ``pruner.manual_prune_width(...)`` or ``load_pruning_history(...)``, it does so as soon as a
        config describes the result. Call it yourself after your own code has cut layers.

        Returns:
            The report of this sync, which is also the last of ``reports``.

        Raises:
            ConfigSyncError: no config of this class describes the weights, or what is recorded (see
                ``pending``). Nothing is cut or written; pruning can continue.
            TrainingError: another rank of a sharded model did something else; the model is
                unchanged.
            ValueError: the hook is attached to no pruner.
        """
        if self._attachment is None:
            raise ValueError(
                "this HFConfigSyncHook is attached to no pruner. Pass it to the pruner as "
                "hooks=[hook], or call hook.register(pruner)"
            )
        return self._attachment.sync()

    def __repr__(self) -> str:
        names = ("plan", "strict", "per_layer", "refit", "make_inputs")
        given = {name: getattr(self, name) for name in (*names, "shard", "distributed")}
        if self.plan is None:
            asked = self._settings
            prune = INNER if self._cheapest else asked.prune and ", ".join(asked.prune)
            given = {"prune": prune, "gqa": asked.gqa, "target": asked.target, **given}
        settings = ", ".join(
            f"{name}={value if isinstance(value, (bool, str)) else '...'}"
            for name, value in given.items()
            if value not in (None, False)
        )
        state = "attached to no pruner"
        if self._attachment is not None:
            follower = self._attachment.follower
            pruner, name = follower.pruner, type(follower.model).__name__
            state = f"{type(pruner).__name__} of {name}, step {pruner.current_step} of "
            state += f"{pruner.iterative_steps}"
        waiting = ", recorded groups are not cut yet (hook.pending)" if self.pending else ""
        return f"HFConfigSyncHook({settings}): {state}, {len(self.reports)} reports{waiting}"

    @check_arguments
    def plot(self, path: str | PathLike[str]) -> Figure:
        """Plot the widths before the first step and after the last one.

        Args:
            path: the file to write; its suffix sets the format, PNG without one.

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
        """Plot the number of parameters after each step, and metrics below it.

        Args:
            path: the file to write; its suffix sets the format, PNG without one.
            metrics: name (``"perplexity"``) -> one value per report, optionally preceded by the
                value before the first step.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: there is no report yet, or a metric has another number of values.
        """
        from ..plots import plot_history

        return plot_history(self.reports, path, metrics)


def _planned(arguments: Mapping[str, Any], planned: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan's arguments for the pruner; raise if the pruner was given other values."""
    from ..graph.pruner_access import BasePruner  # imports torch_pruning, which imports hooks

    defaults = inspect.signature(BasePruner.__init__).parameters
    for name, value in planned.items():
        given = arguments.get(name)
        if given not in (value, defaults[name].default):
            raise ValueError(
                f"the pruner has {name}={given}, but the hook's plan has {name}={value}. Leave "
                f"{name}= out of the pruner, or make a plan with it"
            )
    return dict(planned)
