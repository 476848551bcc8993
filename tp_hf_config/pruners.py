"""Make Torch-Pruning's pruners take ``hooks=`` and fire them.

Torch-Pruning has no hook API, and its subclasses spell out their arguments, so ``hooks=`` is taken
out before a constructor sees it.  Only constructors are wrapped; ``step`` is wrapped on the single
pruner that has hooks.  A pruner without hooks behaves exactly as before.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch_pruning as tp

from .norm_order import channels_in_order

_Base: Any = tp.pruner.BasePruner
_DICTS = ("num_heads", "in_channel_groups", "out_channel_groups", "channel_groups")
_constructing = threading.local()
_lock = threading.RLock()


@runtime_checkable
class PrunerHook(Protocol):
    """What a hook has to have: a call after each step.

    It may also have ``constructing(arguments)``, which returns a context manager around the
    pruner's constructor (``arguments["model"]`` is the model, and so on, every argument of
    Torch-Pruning's own constructor; what is changed in them is what that constructor gets),
    ``stepping(pruner)``, which returns one around each call of ``step()`` (an interactive step's
    groups come after it), and ``attach(pruner)`` / ``detach(pruner)``, called when it is
    registered and removed.
    """

    def after_step(self, pruner: Any) -> None:
        """Called after ``step()``, and when an interactive step ends, however it ends."""
        ...


class Handle:
    """Undoes one registration; also a context manager that does so at its end."""

    def __init__(self, pruner: Any, hook: PrunerHook):
        self._pruner, self._hook = pruner, hook

    def remove(self) -> None:
        """Take the hook off the pruner; a second call does nothing."""
        hooks = hooks_of(self._pruner)
        if not any(hook is self._hook for hook in hooks):
            return
        hooks[:] = [hook for hook in hooks if hook is not self._hook]
        _call(self._hook, "detach", self._pruner)
        if not hooks:
            own_step = vars(self._pruner).pop("step").replaced
            if own_step is not None:  # the user had put one on this pruner
                self._pruner.step = own_step

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def register(pruner: Any, hook: PrunerHook) -> Handle:
    """Attach a hook to a pruner that exists already.

    Raises:
        TypeError: ``hook`` has no ``after_step``.
    """
    _check(hook)
    _call(hook, "attach", pruner)
    if not hooks_of(pruner):
        pruner.step = _stepper(pruner)
    hooks_of(pruner).append(hook)
    return Handle(pruner, hook)


def hooks_of(pruner: Any) -> list[Any]:
    """The hooks of a pruner, kept on the ``step`` that fires them."""
    hooks: list[Any] = getattr(vars(pruner).get("step"), "hooks", [])
    return hooks


def _check(hook: Any) -> None:
    if isinstance(hook, type):
        raise TypeError(f"hooks: {hook.__name__} is a class. Pass an object: {hook.__name__}()")
    if not isinstance(hook, PrunerHook):
        raise TypeError(
            f"hooks: {type(hook).__name__} has no after_step(pruner) method. Pass a "
            "HFConfigSyncHook() or an object with that method."
        )


def _call(hook: Any, name: str, *args: Any) -> Any:
    method = getattr(hook, name, None)
    return method(*args) if method is not None else None


def _enter(stack: ExitStack, hooks: list[Any], name: str, *args: Any) -> None:
    """Enter the surroundings that hooks want."""
    for hook in hooks:
        context: AbstractContextManager[Any] | None = _call(hook, name, *args)
        if context is not None:
            stack.enter_context(context)


def _stepper(pruner: Any) -> Callable[..., Any]:
    """A ``step`` for one pruner that fires its hooks afterwards."""
    own_step = vars(pruner).get("step")
    step = pruner.step

    @functools.wraps(step)
    def stepping(*args: Any, **kwargs: Any) -> Any:
        try:
            with channels_in_order(), ExitStack() as stack:
                _enter(stack, hooks_of(pruner), "stepping", pruner)
                result = step(*args, **kwargs)
        except BaseException:
            _fire_quietly(pruner)
            raise
        if inspect.isgenerator(result):
            return _interactive(pruner, result)
        _fire(pruner)
        return result

    stepping.replaced = own_step  # type: ignore[attr-defined]
    stepping.hooks = []  # type: ignore[attr-defined]
    return stepping


def _interactive(pruner: Any, groups: Iterator[Any]) -> Iterator[Any]:
    """Pass groups on; fire when they are exhausted and when the user leaves the loop early."""
    try:
        with channels_in_order():
            yield from groups
    except BaseException:  # GeneratorExit on break, or the user's own exception
        _fire_quietly(pruner)
        raise
    _fire(pruner)


def _fire(pruner: Any) -> None:
    for hook in list(hooks_of(pruner)):
        hook.after_step(pruner)


def _fire_quietly(pruner: Any) -> None:
    """Fire where another exception is on its way, which must be the one that surfaces."""
    for hook in list(hooks_of(pruner)):
        try:
            hook.after_step(pruner)
        except Exception as error:
            warnings.warn(f"{type(hook).__name__} after an interrupted step: {error}", stacklevel=2)


def enable() -> None:
    """Let every pruner's constructor take ``hooks=``; done by ``import tp_hf_config``."""
    with _lock:
        for cls in family():
            _wrap_init(cls)
        if "__init_subclass__" not in vars(_Base):
            _Base.__init_subclass__ = classmethod(_wrap_subclass)


def disable() -> None:
    """Undo :func:`enable`: constructors are Torch-Pruning's own again."""
    with _lock:
        for cls in family():
            own_init = vars(cls).get("__init__")
            if _is_ours(own_init):
                if own_init.inherited:
                    del cls.__init__
                else:
                    cls.__init__ = own_init.original
        if "__init_subclass__" in vars(_Base):
            del _Base.__init_subclass__


def family(cls: Any = _Base) -> Iterator[Any]:
    """A class of pruners, by default all, and those made of it."""
    yield cls
    for subclass in cls.__subclasses__():
        yield from family(subclass)


def _wrap_subclass(cls: Any, /, **kwargs: Any) -> None:
    super(_Base, cls).__init_subclass__(**kwargs)
    _wrap_init(cls)


def _is_ours(init: Any) -> bool:
    """Whether a constructor is a wrapper of this module (a copy of its attributes is not)."""
    return getattr(init, "wrapper", None) is init is not None


def _wrap_init(cls: Any) -> None:
    """Wrap a class's constructor, inherited from a mixin or its own, unless it is wrapped."""
    original = cls.__init__
    if _is_ours(original):
        return
    signature = inspect.signature(original)
    if "hooks" in signature.parameters:  # the user's class has hooks of its own
        return

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        hooks = kwargs.pop("hooks", None)
        hooks = [] if hooks is None else hooks
        hooks = list(hooks) if isinstance(hooks, (list, tuple)) else [hooks]
        if hooks:
            _construct(self, functools.partial(__init__, self, *args, **kwargs), hooks)
        elif cls is _Base:
            _construct_base(original, signature, self, args, kwargs)
        else:
            original(self, *args, **kwargs)

    marked: Any = __init__
    marked.wrapper, marked.original = __init__, original
    marked.inherited = "__init__" not in vars(cls)
    cls.__init__ = __init__


@dataclass
class _Construction:
    """A pruner whose constructor runs, and the surroundings that its hooks want."""

    pruner: Any
    hooks: list[Any]
    surroundings: ExitStack
    begun: bool = False

    def begin(self, pruner: Any, arguments: dict[str, Any]) -> None:
        """Enter the surroundings, once; the hooks may change the arguments."""
        if pruner is self.pruner and not self.begun:
            self.begun = True
            _enter(self.surroundings, self.hooks, "constructing", arguments)


def _construct(pruner: Any, construct: Callable[[], None], hooks: list[Any]) -> None:
    """Run a constructor inside the hooks' surroundings, then register them: all or none."""
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
    """Run Torch-Pruning's own constructor, with what the hooks of this pruner make of it."""
    construction: _Construction | None = getattr(_constructing, "now", None)
    if construction is None:
        given = dict(zip(list(signature.parameters)[1:], args, strict=False))
        _check_awaited(given | kwargs)
        original(pruner, *args, **kwargs)
        return
    arguments = _with_own_dicts(signature, pruner, args, kwargs)
    construction.begin(pruner, arguments)
    _check_awaited(arguments)
    original(pruner, **arguments)


def _check_awaited(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of ``pruner_kwargs`` where no hook puts their graph in.

    Raises:
        ValueError: Torch-Pruning would trace, as nobody made safe.
    """
    graph = getattr(arguments.get("example_inputs"), "graph", None)
    if graph is not None and not getattr(graph, "awaited", True):
        raise ValueError(
            "pruner_kwargs(model) made these arguments for a pruner with a hook, which puts in the "
            "graph that is made from the config. Without it Torch-Pruning would trace the model, "
            "which need not end. Pass hooks=[HFConfigSyncHook()] too."
        )


def _with_own_dicts(
    signature: inspect.Signature, pruner: Any, args: Any, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments whose dicts belong to this pruner alone.

    Torch-Pruning writes to ``num_heads`` and its like, whose defaults are shared mutable dicts, so
    what one pruner wrote is found by the next (seen in 1.6.1, base_pruner.py).
    """
    bound = signature.bind(pruner, *args, **kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    arguments.pop(next(iter(signature.parameters)))
    return {
        name: dict(value) if name in _DICTS and isinstance(value, dict) else value
        for name, value in arguments.items()
    }


enable()
