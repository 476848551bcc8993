"""Skip parts of a model that compute the same in many passes: their results are replayed.

An experiment changes a few parameters and runs the model on the same inputs. Everything before the
first changed parameter computes the same: a vision tower before a text model, the backbone of a
detector.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, update_wrapper
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from ..model.surroundings import note_shortage
from .observed_pass import PassResult, outputs_in_float64
from .run_recipe import RunRecipe

_PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))


class _Call(NamedTuple):
    given: Any
    result: Any


class Replay:
    """The recorded results of a model's parts, for passes that change nothing in them.

    A part is replayed if none of its tensors is changed or differentiated, and its inputs equal the
    recorded ones and have no gradient. A call is never replayed if it draws random numbers, changes
    its inputs, returns them or views of them, or handles more than tensors and plain values; parts
    inside may be. Parts that compute a result in ``watched`` (it counts as an output) always run.
    """

    def __init__(self, model: nn.Module, watched: Sequence[PassResult] = ()):
        self._model, self._watched = model, watched
        names = {result.module for result in watched}
        self._running = {module for name, module in model.named_modules() if name in names}
        self._calls: dict[tuple[nn.Module, int], _Call] = {}
        self._impure: set[nn.Module] = set()  # modules with a call that must run
        self._outermost: dict[frozenset[int], list[nn.Module]] = {}

    @contextmanager
    def without(self, changed: Collection[Tensor]) -> Iterator[None]:
        numbers: Counter[nn.Module] = Counter()
        with ExitStack() as stack:
            for module in self._parts(frozenset(map(id, changed))):
                forward = module.forward
                own = vars(module).get("forward")
                stack.callback(_restore_forward, module, own)
                run = partial(self._run, module, forward, numbers)
                module.forward = update_wrapper(run, forward)  # callers may inspect its signature
            yield

    def outputs(
        self, changed: Collection[Tensor], inputs: Mapping[str, Any], recipe: RunRecipe
    ) -> list[Tensor] | None:
        """Outputs and watched results of a pass with replayed parts; ``None`` if it fails."""
        try:
            with self.without(changed):
                return outputs_in_float64(self._model, inputs, self._watched, recipe)
        # something may be collected inside a skipped part
        except Exception as error:  # a class may fail in any way
            note_shortage(error)
            return None

    def _parts(self, changed: frozenset[int]) -> list[nn.Module]:
        if changed not in self._outermost:
            self._outermost[changed] = list(self._parts_without(self._model, changed))
        return self._outermost[changed]

    def _parts_without(self, module: nn.Module, changed: frozenset[int]) -> Iterator[nn.Module]:
        """Yield the outermost modules inside that hold no changed tensor and no hook."""
        for child in module.children():
            inside = set(child.modules())
            free = changed.isdisjoint(map(id, (*child.parameters(), *child.buffers())))
            free = free and child not in self._impure and inside.isdisjoint(self._running)
            # Transformers collects attentions and hidden states with hooks
            free = free and not any(map(_has_hooks, inside - {child}))
            # lists of modules never run
            if free and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                yield child
            else:
                yield from self._parts_without(child, changed)

    def _run(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        numbers: Counter[nn.Module],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Call a module, or return the result of its recorded call of the same number."""
        key = module, numbers[module]
        numbers[module] += 1
        given = (args, kwargs)
        if key in self._calls:
            call = self._calls[key]
            same = _are_equal(given, call.given)
            return _copied(call.result) if same else forward(*args, **kwargs)
        if any(getattr(leaf, "requires_grad", False) for leaf in tree_leaves(given)):
            return forward(*args, **kwargs)
        before, random = _copied(given), torch.default_generator.get_state()
        result = forward(*args, **kwargs)
        pure = _is_plain(given) and _is_plain(result) and _are_equal(given, before)
        pure = pure and bool((torch.default_generator.get_state() == random).all())
        if not pure or _storages(given) & _storages(result):
            self._impure.add(module)
            self._outermost.clear()
            return result
        self._calls[key] = _Call(before, _copied(result))
        return _copied(result)  # without gradients, like a replayed result


def _restore_forward(module: nn.Module, own: Any) -> None:
    """Restore a module's own ``forward``; without one, that of its class applies."""
    vars(module).pop("forward")
    if own is not None:
        vars(module)["forward"] = own


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_plain(value: Any) -> bool:
    return all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in tree_leaves(value))


def _storages(value: Any) -> set[int]:
    tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
    return {tensor.untyped_storage().data_ptr() for tensor in tensors} - {0}


def _are_equal(value: Any, other: Any) -> bool:
    """True if two values are equal and the first carries no gradient."""
    leaves, spec = tree_flatten(value)
    other_leaves, other_spec = tree_flatten(other)
    return spec == other_spec and all(map(_is_same, leaves, other_leaves))


def _is_same(leaf: Any, other: Any) -> bool:
    if isinstance(leaf, Tensor) and isinstance(other, Tensor):
        same = not leaf.requires_grad and leaf.dtype == other.dtype
        return same and torch.equal(leaf, other)
    return type(leaf) is type(other) and bool(leaf == other)


def _copied(value: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), value)
