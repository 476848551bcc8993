"""What Torch-Pruning's tracer needs changed in a Hugging Face model while it runs.

Every change works around one fault of the tracer, and is undone afterwards, also after an error.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate, permutations
from pathlib import Path
from typing import Any

import torch_pruning.ops as tp_ops
from torch import nn

from ...errors import TracingError
from ...model.versions import graph_module as tp_graph

_ROTATIONS = ("rotate_half", "rotate_every_two")
_MAX_VISITS_PER_NODE = 60
_TRACER = "torch_pruning/dependency/"
_UNWRAPPED = r"Unwrapped parameters detected"


@contextmanager
def safe_tracing(model: nn.Module) -> Iterator[None]:
    """Make ``model`` traceable inside ``with``, which surrounds a pruner's constructor.

    Raises:
        TracingError: a dependency group grows without end, or the tracer breaks off.
    """
    with ExitStack() as stack:
        for context in (
            _faults_named(model),
            _settings_kept(model),
            _traceable_config(model),
            _neutral_rotary(model),
            _bounded_groups(),
            _coupled_ties(),
            _splits_that_shrink(),
            _no_unwrapped_warning(),
        ):
            stack.enter_context(context)
        yield


@contextmanager
def _faults_named(model: nn.Module) -> Iterator[None]:
    """Turn an error of the tracer, or of the forward pass it traces, into a ``TracingError``."""
    name = type(model).__name__
    try:
        yield
    except TracingError:
        raise
    except Exception as error:
        frames = [(frame, _in_tracer(frame)) for frame in traceback.extract_tb(error.__traceback__)]
        (last, file), message = frames[-1], f"{type(error).__name__}: {error}"
        if file:
            raise TracingError(
                f"Torch-Pruning cannot trace {name}: {message} (its dependency/{file}, line "
                f"{last.lineno}). Nothing was pruned. Name widths that need no trace "
                "(prunable(model) lists them): prune=, graph='config'."
            ) from error
        names = [frame.name for frame, _ in frames]
        if "_trace" in names and "_call_impl" in names[names.index("_trace") :]:
            raise TracingError(
                f"Torch-Pruning cannot trace {name}, whose forward pass fails: {message} "
                f"({Path(last.filename).name}, line {last.lineno}). Nothing was pruned. Give "
                "inputs that it takes: pruner_kwargs(model, example_inputs={...})."
            ) from error
        raise  # it is from the caller's own functions


def _in_tracer(frame: traceback.FrameSummary) -> str:
    """Return the name of Torch-Pruning's own file that a frame is in; empty if it is in another."""
    _, inside, file = frame.filename.replace("\\", "/").rpartition(_TRACER)
    return file if inside else ""


@contextmanager
def _settings_kept(model: nn.Module) -> Iterator[None]:
    """Make all parameters trainable and set eval mode; restore both afterwards.

    The tracer follows autograd, which ends at frozen parameters, and leaves the model in eval mode
    (dependency/graph.py, ``_trace``).
    """
    training = {module: module.training for module in model.modules()}
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        model.eval()
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _traceable_config(model: nn.Module) -> Iterator[None]:
    """Switch to eager attention and no cache; restore the config afterwards.

    Fused attention hides how key/value heads are repeated (Torch-Pruning issue 516), and a cache
    in the output ends in ``'tuple' object has no attribute 'grad_fn'``.
    """
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if hasattr(config, "to_json_string"):
            configs[id(config)] = config
    before = [(config, dict(vars(config))) for config in configs.values()]
    try:
        for config in configs.values():
            config._attn_implementation = "eager"
            if "use_cache" in vars(config):
                config.use_cache = False
        yield
    finally:
        for config, values in before:
            vars(config).update(values)
            for key in vars(config).keys() - values.keys():
                del vars(config)[key]


@contextmanager
def _neutral_rotary(model: nn.Module) -> Iterator[None]:
    """Make rotary embeddings rotate nothing.

    The tracer takes the ``cat`` of ``rotate_half`` for a concatenation of channels, and its group's
    indices grow for ever (Torch-Pruning issue 527; dependency/index_mapping.py,
    ``update_concat_index_mapping``).  Every modelling file has its own function.
    """
    files = {
        sys.modules[cls.__module__]
        for module in model.modules()
        for cls in type(module).__mro__
        if cls.__module__ in sys.modules and not cls.__module__.startswith(("torch.", "builtins"))
    }
    before = [
        (file, name, vars(file)[name])
        for file in files
        for name in _ROTATIONS
        if name in vars(file)
    ]
    try:
        for file, name, _ in before:
            setattr(file, name, _identity)
        yield
    finally:
        for file, name, function in before:
            setattr(file, name, function)


def _identity(x: Any, *args: Any, **kwargs: Any) -> Any:
    return x


@contextmanager
def _bounded_groups() -> Iterator[None]:
    """Raise a ``TracingError`` if a group grows without end, instead of waiting for it."""
    original = tp_graph.Group

    class BoundedGroup(original):  # type: ignore[valid-type, misc]
        """A group that counts how often each of its nodes is visited."""

        def __init__(self) -> None:
            super().__init__()
            self._visits: dict[Any, int] = {}

        def add_dep(self, dep: Any, idxs: Any) -> None:
            key = (id(dep.target), dep.handler)
            visits = self._visits[key] = self._visits.get(key, 0) + 1
            if visits > _MAX_VISITS_PER_NODE:
                raise TracingError(
                    f"Torch-Pruning's trace does not end: the group that starts at "
                    f"{self._group[0].dep.target.name} reaches {dep.target.name} again and again "
                    f"({visits} times), each time with other channels. The tracer mistakes a "
                    "concatenation or a repeat there for one of channels (Torch-Pruning issue "
                    "527). Put the layers around it into ignored_layers="
                )
            super().add_dep(dep, idxs)

    try:
        tp_graph.Group = BoundedGroup
        yield
    finally:
        tp_graph.Group = original


@contextmanager
def _coupled_ties() -> Iterator[None]:
    """Put layers that share one weight into one group.

    The tracer follows outputs, not weights: a masked-LM decoder and the embeddings that it is tied
    to, or the embeddings of an encoder and of its decoder, end up in two groups that lose different
    channels of the same weight.
    """
    graph_class = tp_graph.DependencyGraph
    original = graph_class._build_dependency

    def _build_dependency(graph: Any, module2node: Any) -> None:
        original(graph, module2node)
        sharing: dict[nn.Parameter, list[Any]] = {}
        for module, node in module2node.items():
            weight = getattr(module, "weight", None)
            if isinstance(module, (nn.Linear, nn.Embedding)) and weight is not None:
                sharing.setdefault(weight, []).append(node)
        for nodes in sharing.values():
            for source, target in permutations(nodes, 2):
                _couple(graph, source, target)

    try:
        graph_class._build_dependency = _build_dependency
        yield
    finally:
        graph_class._build_dependency = original


def _couple(graph: Any, source: Any, target: Any) -> None:
    """Make pruning the width of the source, a tied layer, prune that of the target."""
    sides = []
    for node in (source, target):
        layer_pruner = graph.get_pruner_of_module(node.module)
        embeds = isinstance(node.module, nn.Embedding)
        sides.append(layer_pruner.prune_out_channels if embeds else layer_pruner.prune_in_channels)
    source.dependencies.append(tp_graph.Dependency(sides[0], sides[1], source, target))


class _SplitPruner(tp_ops.SplitPruner):  # type: ignore[misc]
    """Torch-Pruning's pruner of split nodes, repaired to update their offsets.

    Torch-Pruning stores the new offsets on the pruner instead of the node (ops.py,
    ``SplitPruner.prune_out_channels``, 1.6.1), so the second step of a fused gate and up reads
    channels that are gone: ``IndexError: index ... is out of bounds``.
    """

    def prune_out_channels(self, layer: Any, idxs: Any) -> None:
        super().prune_out_channels(layer, idxs)
        if layer.split_sizes is not None:
            layer.offsets = [0, *accumulate(layer.split_sizes)]

    prune_in_channels = prune_out_channels


@contextmanager
def _splits_that_shrink() -> Iterator[None]:
    """Give a graph that is built inside ``with`` the repaired pruner of split nodes, for good."""
    original = tp_ops.SplitPruner
    try:
        tp_ops.SplitPruner = _SplitPruner
        yield
    finally:
        tp_ops.SplitPruner = original


@contextmanager
def _no_unwrapped_warning() -> Iterator[None]:
    """Silence the tracer's warning about bare Parameters.

    Norm weights of Hugging Face models are bare Parameters, and the tracer's default is right.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_UNWRAPPED)
        yield
