"""Make Torch-Pruning's pruners accept ``hooks=`` and call the hooks.

Torch-Pruning has no hook API, and its subclasses list their arguments, so ``hooks=`` is removed
before a constructor sees it. Only constructors are wrapped; ``step`` is wrapped only on pruners
with hooks. A pruner without hooks behaves exactly as before.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch_pruning import DependencyGraph

from ..arguments import check_arguments
from ..graph.pruner_access import BasePruner, constructor_with, family

Pruner = Any  # any pruner of Torch-Pruning, which has no type hints
_DICTS = ("num_heads", "in_channel_groups", "out_channel_groups", "channel_groups")
_constructing = threading.local()


@runtime_checkable
class PrunerHook(Protocol):
    """The methods of a hook; only ``after_step`` is required.

    A hook may also have these methods:

    - ``constructing(arguments)`` returns a context manager around the pruner's constructor.
      ``arguments`` are all arguments of Torch-Pruning's own constructor (``arguments["model"]`` is
      the model); the hook may change them. A ``DependencyGraph`` that the context manager gives
      is the pruner's, instead of a trace.
    - ``stepping(pruner)`` returns a context manager around each call of ``step()``. The groups of
      an interactive step are pruned after it ends.
    - ``looping(pruner)`` returns a context manager around the user's loop over the groups of an
      interactive step.
    - ``attach(pruner)`` and ``detach(pruner)`` are called when the hook is registered and removed.

    If a hook has a true attribute ``carries_out``, it cuts what a step recorded; its ``after_step``
    is called before those of other hooks.
    """

    def after_step(self, pruner: Any) -> None:
        """Run after ``step()``, and when the loop over an interactive step ends in any way."""
        ...


class Handle:
    """Undoes one registration; also a context manager that does so at the end of its block."""

    def __init__(self, pruner: Any, hook: PrunerHook):
        self._pruner, self._hook = pruner, hook

    def remove(self) -> None:
        """Detach the hook from the pruner; a second call does nothing."""
        hooks = hooks_of(self._pruner)
        if not any(hook is self._hook for hook in hooks):
            return
        hooks[:] = [hook for hook in hooks if hook is not self._hook]
        _call(self._hook, "detach", self._pruner)
        if not hooks:
            own_step = vars(self._pruner).pop("step").replaced
            if own_step is not None:  # the user had set one on this pruner
                self._pruner.step = own_step

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


@check_arguments
def register(pruner: Pruner, hook: PrunerHook) -> Handle:
    """Attach a hook to an existing pruner; the returned handle detaches it."""
    _check(hook)
    _call(hook, "attach", pruner)
    if not hooks_of(pruner):
        pruner.step = _stepper(pruner)
    hooks_of(pruner).append(hook)
    return Handle(pruner, hook)


def hooks_of(pruner: Any) -> list[Any]:
    """Return a pruner's hooks, which are an attribute of its wrapped ``step``."""
    hooks: list[Any] = getattr(vars(pruner).get("step"), "hooks", [])
    return hooks


def _check(hook: Any) -> None:
    if isinstance(hook, type):
        raise TypeError(f"hooks: {hook.__name__} is a class. Pass an object: {hook.__name__}()")
    if not isinstance(hook, PrunerHook):
        raise TypeError(
            f"hooks: {type(hook).__name__} has no method after_step(pruner). Pass "
            "HFConfigSyncHook() or another object with this method."
        )


def _call(hook: Any, name: str, *args: Any) -> Any:
    method = getattr(hook, name, None)
    return method(*args) if method is not None else None


def _enter(stack: ExitStack, hooks: list[Any], name: str, *args: Any) -> list[Any]:
    contexts = (_call(hook, name, *args) for hook in hooks)
    return [stack.enter_context(context) for context in contexts if context is not None]


def _stepper(pruner: Any) -> Callable[..., Any]:
    own_step = vars(pruner).get("step")
    step = pruner.step

    @functools.wraps(step)
    def stepping(*args: Any, **kwargs: Any) -> Any:
        try:
            with ExitStack() as stack:
                _enter(stack, hooks_of(pruner), "stepping", pruner)
                result = step(*args, **kwargs)
        except BaseException:
            _fire(pruner, quietly=True)  # ``raise`` is the exception that has to surface
            raise
        if inspect.isgenerator(result):
            return _interactive(pruner, result)
        _fire(pruner)
        return result

    stepping.replaced = own_step  # type: ignore[attr-defined]
    stepping.hooks = []  # type: ignore[attr-defined]
    return stepping


def _interactive(pruner: Any, groups: Iterator[Any]) -> Iterator[Any]:
    """Yield an interactive step's groups; call the hooks when the user's loop ends."""
    try:
        with ExitStack() as stack:
            _enter(stack, hooks_of(pruner), "looping", pruner)
            yield from groups
    except BaseException:  # GeneratorExit on break, or the user's own exception
        _fire(pruner, quietly=True)
        raise
    _fire(pruner)


def _fire(pruner: Any, quietly: bool = False) -> None:
    """Call every hook's ``after_step``, then raise the first exception; ``quietly``: warn only."""
    first: Exception | None = None
    for hook in sorted(hooks_of(pruner), key=lambda hook: not getattr(hook, "carries_out", False)):
        try:
            hook.after_step(pruner)
        except Exception as error:
            if not quietly and first is None:
                first = error
                continue
            warnings.warn(
                f"{type(hook).__name__} failed after an interrupted step: {error}", stacklevel=2
            )
    if first is not None:
        raise first


_own_prune, _own_estimate = BasePruner._prune, BasePruner.estimate_importance


def _prune(self: Any) -> Iterator[Any]:
    """Replaces ``BasePruner._prune``: a config graph chooses the groups, a trace Torch-Pruning."""
    choose = getattr(self.DG, "choose", None)
    return _own_prune(self) if choose is None else choose()  # type: ignore[no-any-return]


def _estimate_importance(self: Any, group: Any) -> Any:
    """Replaces ``BasePruner.estimate_importance``: a config graph gives one value per unit."""
    estimate = functools.partial(_own_estimate, self)
    by_unit = not getattr(group, "by_channel", True)  # a ConfigGroup; its module is slow to import
    return self.DG.importance_of(group, estimate) if by_unit else estimate(group)


def _wrap_subclass(cls: Any, /, **kwargs: Any) -> None:
    super(BasePruner, cls).__init_subclass__(**kwargs)
    _wrap_init(cls)


def constructor_of(cls: Any) -> Callable[..., None]:
    """Return a class's constructor without this module's wrapper."""
    init = cls.__init__
    original: Callable[..., None] = init.original if _is_ours(init) else init
    return original


def _is_ours(init: Any) -> bool:
    """True if a constructor is this module's wrapper; copying its attributes is not enough."""
    return getattr(init, "wrapper", None) is init is not None


def _wrap_init(cls: Any) -> None:
    original = cls.__init__
    if _is_ours(original):
        return
    signature = inspect.signature(original)
    if "hooks" in signature.parameters:  # the user's class has a parameter of that name
        return

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        hooks = kwargs.pop("hooks", None)
        hooks = [] if hooks is None else hooks
        hooks = list(hooks) if isinstance(hooks, (list, tuple)) else [hooks]
        if hooks:
            _construct(self, functools.partial(__init__, self, *args, **kwargs), hooks)
        elif cls is BasePruner:
            _construct_base(original, signature, self, args, kwargs)
        else:
            original(self, *args, **kwargs)

    marked: Any = __init__
    marked.wrapper, marked.original = __init__, original
    cls.__init__ = __init__


@dataclass
class _Construction:
    """A pruner whose constructor is running."""

    pruner: Any
    waiting: list[Any]  # hooks whose ``constructing`` is not entered yet
    surroundings: ExitStack  # holds the hooks' context managers


def _construct(pruner: Any, construct: Callable[[], None], hooks: list[Any]) -> None:
    """Run a constructor inside its hooks' context managers; then register all hooks or none."""
    for hook in hooks:
        _check(hook)
    with ExitStack() as stack:
        stack.callback(setattr, _constructing, "now", getattr(_constructing, "now", None))
        _constructing.now = _Construction(pruner, hooks, stack)
        construct()
    with ExitStack() as undo:
        for hook in hooks:
            undo.callback(register(pruner, hook).remove)
        undo.pop_all()


def _construct_base(
    original: Callable[..., None],
    signature: inspect.Signature,
    pruner: Any,
    args: Any,
    kwargs: dict[str, Any],
) -> None:
    """Run Torch-Pruning's own constructor, with the graph that a hook gives instead of a trace."""
    construction: _Construction | None = getattr(_constructing, "now", None)
    if construction is None:
        original(pruner, *args, **kwargs)
        return
    arguments = _with_own_dicts(signature, pruner, args, kwargs)
    hooks: list[Any] = []
    if pruner is construction.pruner:
        hooks, construction.waiting = construction.waiting, hooks
    given = _enter(construction.surroundings, hooks, "constructing", arguments)
    graph = next((one for one in given if isinstance(one, DependencyGraph)), None)
    construct = original if graph is None else constructor_with(graph)
    construct(pruner, **arguments)


def _with_own_dicts(
    signature: inspect.Signature, pruner: Any, args: Any, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the constructor's arguments, with dicts that belong to this pruner only."""
    # Torch-Pruning writes to num_heads and similar arguments, whose defaults are shared dicts, so
    # a pruner sees what another one wrote (1.6.1, base_pruner.py)
    bound = signature.bind(pruner, *args, **kwargs)
    bound.apply_defaults()
    _, *arguments = bound.arguments.items()
    return {
        name: dict(value) if name in _DICTS and isinstance(value, dict) else value
        for name, value in arguments
    }


for _cls in family():
    _wrap_init(_cls)
BasePruner.__init_subclass__ = classmethod(_wrap_subclass)
BasePruner._prune, BasePruner.estimate_importance = _prune, _estimate_importance
