"""Run a forward pass of an experiment in float64, and keep results beside its outputs.

No output depends on some parts of a model: their result is not used (a pooling head), or only
decides (the scores of a top-k). Then results that nothing is computed from, and those that decide,
are watched like outputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.build import DefaultDtype
from ..model.shapes import named_modules
from ..model.surroundings import note_shortage, without_caches
from ..model.tensors import owner, saved_buffers
from .output_tensors import largest_in, outputs_of, tensors_in, unmasked
from .run_recipe import PLAIN, RunRecipe

_NONE = 1e-12  # a smaller gradient counts as zero
_NUMBERS = ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__")
_BLANK = tuple(  # they read only the shape of a tensor, so its values decide nothing
    form.format(what)
    for what in ("zeros", "ones", "full", "empty", "rand", "randn")
    for form in ("new_{}", "{}_like")
)
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_LOW = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}


class PassResult(NamedTuple):
    module: str  # innermost running module
    function: str  # that returns it
    number: int  # previous results of the function in the module, in this pass


class AllFloat64(DefaultDtype):
    """Turns casts to lower precision into float64: float32 norms would hide small differences.

    Constants are float64 too: Transformers 4 fills a mask of the default dtype with float64's
    smallest number. The caches of classes are not used.
    """

    def __init__(self) -> None:
        super().__init__(torch.float64)

    def __enter__(self) -> Any:
        self._uncached = without_caches()
        self._uncached.__enter__()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._uncached.__exit__(*exception)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CASTS:
            return args[0].double()
        if torch.dtype in map(type, args):
            args = tuple(
                torch.float64 if type(value) is torch.dtype and value in _LOW else value
                for value in args
            )
        kwargs = dict(kwargs) if kwargs else {}
        if kwargs.get("dtype") in _LOW:
            kwargs["dtype"] = torch.float64
        if func is F.embedding:  # the padding row gets a gradient too
            args = (*args[:2], None, *args[3:])
            kwargs.pop("padding_idx", None)
        return super().__torch_function__(func, types, args, kwargs)


class _ResultWatch(AllFloat64):
    """Keeps the ``wanted`` results of a pass; ``None``: all, and fills ``read``."""

    def __init__(self, wanted: Collection[PassResult] | None):
        super().__init__()
        self.wanted = wanted
        self._modules = {result.module for result in wanted or ()}
        self.results: dict[PassResult, Tensor] = {}
        # inputs of functions whose result has no gradient: an order, positions, a comparison, a
        # number
        self.read: list[Tensor] = []
        self._running = [""]
        self._numbers: Counter[tuple[str, str]] = Counter()

    @contextmanager
    def over(self, model: nn.Module) -> Iterator[None]:
        """While open, keep track of which module of the model is running."""
        with ExitStack() as stack, self:
            around = {"": ""}  # module -> itself, or for a list of modules the one that runs them
            first: dict[nn.Module, str] = {}
            followed: set[nn.Module] = set()
            for name, module in named_modules(model):
                first.setdefault(module, name)
                holder = name.rpartition(".")[0]
                around[name] = around[holder] if isinstance(module, _LISTS) else name
                # also modules inside a counted one, so that it does not get their results
                counted = self._counts(name) or self._counts(around[holder])
                if not counted or module in followed:
                    continue
                followed.add(module)
                enter = partial(self._enter, first[module])
                stack.enter_context(module.register_forward_pre_hook(enter))
                stack.enter_context(module.register_forward_hook(self._leave, always_call=True))
            yield

    def _counts(self, module: str) -> bool:
        """True if results of this module may be kept."""
        return self.wanted is None or module in self._modules

    def _enter(self, name: str, *_: Any) -> None:
        self._running.append(name)

    def _leave(self, *_: Any) -> None:
        self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # an experiment asks what depends on what, also where a class switches gradients off
        if func is torch._C._set_grad_enabled:
            return None
        output = super().__torch_function__(func, types, args, kwargs)
        if not self._counts(self._running[-1]):
            return output
        name = getattr(func, "__name__", "")
        tensors = list(tensors_in(output))
        for tensor in tensors:
            if tensor.is_floating_point():
                self._keep(tensor, name)
        chooses = name in _NUMBERS or not all(tensor.requires_grad for tensor in tensors)
        chooses = chooses and name not in _BLANK
        if self.wanted is None and chooses:
            given = tensors_in([*args, *(kwargs or {}).values()])
            self.read += [tensor for tensor in given if tensor.requires_grad]
        return output

    def _keep(self, tensor: Tensor, function: str) -> None:
        place = (self._running[-1], function)
        result = PassResult(*place, self._numbers[place])
        self._numbers[place] += 1
        if self.wanted is None or result in self.wanted:
            self.results[result] = tensor


def outputs_in_float64(
    model: nn.Module,
    inputs: Mapping[str, Any],
    watched: Sequence[PassResult] = (),
    recipe: RunRecipe = PLAIN,
) -> list[Tensor]:
    """Outputs of a forward pass with a fixed seed, and watched results (NaN if missing)."""
    torch.default_generator.manual_seed(0)
    watch = _ResultWatch(set(watched))
    with watch.over(model) if watched else AllFloat64():
        outputs = _floating(outputs_of(model, inputs, recipe))
    missing = torch.tensor(torch.nan, dtype=torch.float64)
    beside = (watch.results.get(result, missing) for result in watched)
    return [unmasked(output) for output in (*outputs, *beside)]


def _floating(outputs: Any) -> list[Tensor]:
    return [value for value in tensors_in(outputs) if value.is_floating_point()]


def watched_results(
    model: nn.Module, inputs: Mapping[str, Any], recipe: RunRecipe = PLAIN
) -> tuple[PassResult, ...]:
    """Results to watch: they depend on parameters that no output depends on.

    These are all results that decide something. Of the results that nothing is computed from, the
    fewest that observe all parameters are added, and for each matrix still unobserved the last
    result that depends on it. They are in the order of the pass; none if the pass changes a
    parameter in place.
    """
    computed = outputs_in_float64(model, inputs, recipe=recipe)
    outputs = [output for output in computed if output.requires_grad]
    unobserved = _unobserved(outputs, list(model.parameters()))
    if not unobserved:
        return ()
    watch = _ResultWatch(None)
    torch.default_generator.manual_seed(0)
    try:
        with watch.over(model):
            outputs_of(model, inputs, recipe)
    except RuntimeError as error:  # the class changes a parameter in place, under no_grad
        note_shortage(error)
        return ()
    consumed, read = _consumed(watch.results.values()), {_edge(tensor) for tensor in watch.read}
    first = {_edge(tensor): result for result, tensor in reversed(watch.results.items())}
    dependence = _Dependence(unobserved, watch.results)
    ends = {r: edge in read for edge, r in first.items() if edge in read or edge not in consumed}
    choosing = {result for result, chooses in ends.items() if chooses and dependence.on(result)}
    needed = dependence.fewest(result for result, chooses in ends.items() if not chooses)
    observed = set().union(*map(dependence.on, choosing | needed))
    rest = [one for one in unobserved if id(one) not in observed and one.ndim > 1]
    last = _last_dependents(model, dependence, rest)
    return tuple(result for result in watch.results if result in choosing | needed | last)


class _Dependence:
    def __init__(self, parameters: Sequence[Tensor], results: dict[PassResult, Tensor]):
        self.results = results
        self._parameters = parameters
        self._observed: dict[PassResult, set[int]] = {}

    def on(self, result: PassResult) -> set[int]:
        """The ``id`` of each parameter that a result depends on; none if changed in place."""
        if result not in self._observed:
            tensor, without = self.results[result], self._parameters
            try:
                if tensor.requires_grad:
                    without = _unobserved([unmasked(tensor)], without)
            except RuntimeError as error:  # changed in place since (MiniMax-M3's scores)
                note_shortage(error)
            self._observed[result] = set(map(id, self._parameters)) - set(map(id, without))
        return self._observed[result]

    def fewest(self, results: Iterable[PassResult]) -> set[PassResult]:
        """Few results that together depend on all parameters that any does."""
        needed: set[PassResult] = set()
        observed: set[int] = set()
        for result in sorted(results, key=lambda result: (-len(self.on(result)), result)):
            if not self.on(result) <= observed:
                needed.add(result)
                observed |= self.on(result)
        return needed


def _last_dependents(
    model: nn.Module, dependence: _Dependence, parameters: Sequence[Tensor]
) -> set[PassResult]:
    """For each parameter, the last result in its module, or the one around, that depends on it.

    Later ones do not depend on it: a softmax over a single score (SwiftFormer) is 1, and attention
    over equal values (X-CLIP's first layer) returns these values, whatever the scores are.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    results: set[PassResult] = set()
    for parameter in parameters:
        owner = names[id(parameter)].rpartition(".")[0]
        around = (owner, owner.rpartition(".")[0])
        nearby = (result for result in reversed(dependence.results) if result.module in around)
        last = next((result for result in nearby if id(parameter) in dependence.on(result)), None)
        if last is not None:
            results.add(last)
    return results


_Edge = tuple[Any, int]


def _edge(tensor: Tensor) -> _Edge:
    return tensor.grad_fn, tensor.output_nr


def _consumed(tensors: Iterable[Tensor]) -> set[_Edge]:
    """Edges of the autograd graph that something else is computed from."""
    waiting = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    visited = set(waiting)
    consumed: set[_Edge] = set()
    while waiting:
        for node, number in waiting.pop().next_functions:
            if node is not None:
                consumed.add((node, number))
                if node not in visited:
                    visited.add(node)
                    waiting.append(node)
    return consumed


def _unobserved(outputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    if not outputs or not parameters:
        return list(parameters)
    generator = torch.Generator().manual_seed(3)
    losses = []
    for output in outputs:
        weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        losses.append((output.square() * weights.to(output.device)).sum())
    grads = torch.autograd.grad(
        torch.stack(losses).sum(), parameters, allow_unused=True, retain_graph=True
    )
    return [
        parameter
        for parameter, grad in zip(parameters, grads, strict=True)
        if grad is None or largest_in(grad) < _NONE
    ]


def followed_buffers(
    model: nn.Module, inputs: Mapping[str, Any], watched: Sequence[PassResult], recipe: RunRecipe
) -> frozenset[str]:
    """Saved buffers of norms whose gradients a pass can compute; none if the pass fails.

    Tables of other modules are excluded: outputs may depend on a part only (MiniMax's decays, for a
    text of one block), or a choice hides the gradient (EnCodec's codebooks).
    """
    buffers = {
        name: buffer
        for name, buffer in saved_buffers(model).items()
        if _is_norm(owner(model, name)[0])
    }
    if not buffers:
        return frozenset()
    try:
        with following(buffers.values()):
            outputs = outputs_in_float64(model, inputs, watched, recipe)
            depending = [output.sum() for output in outputs if output.requires_grad]
            total = torch.stack(depending).sum()
            # a class may write to a buffer, which fails
            torch.autograd.grad(total, list(buffers.values()), allow_unused=True)
    except RuntimeError as error:
        note_shortage(error)
        return frozenset()
    return frozenset(buffers)


def _is_norm(module: nn.Module) -> bool:
    """True if a module's own tensors are all vectors, except for torch's batch norms."""
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    # torch computes no gradients of their statistics
    of_torch = isinstance(module, nn.modules.batchnorm._NormBase)
    return not of_torch and all(tensor.ndim <= 1 for tensor in own)


@contextmanager
def following(tensors: Iterable[Tensor]) -> Iterator[None]:
    followed = [tensor for tensor in tensors if not tensor.requires_grad]
    try:
        for tensor in followed:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor in followed:
            tensor.requires_grad_(False)


def hidden_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Hidden states among a layer's arguments: the first floating point tensor."""
    values = (*args, *kwargs.values())
    return next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)


def hidden_out(output: Any) -> Tensor | None:
    """Hidden states that a layer returns, alone or as the first of several results."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


Argument = int | str  # position or name


def _arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[Argument, Any]:
    return dict([*enumerate(args), *kwargs.items()])


@contextmanager
def handed_on(layers: Sequence[nn.Module]) -> Iterator[dict[int, Argument]]:
    """Note place among a layer's results -> argument of the next layer that is this tensor."""
    # LUKE's layers pass on the states of words and those of entities
    handed: dict[int, Argument] = {}
    places: dict[int, int] = {}  # id of a tensor that the previous layer returned -> its place
    alive: list[Any] = []  # keeps the ids unique

    def receive(layer: nn.Module, args: Any, kwargs: Any) -> None:
        for argument, value in _arguments(args, kwargs).items():
            if id(value) in places:
                handed.setdefault(places[id(value)], argument)

    def give(layer: nn.Module, args: Any, output: Any) -> None:
        outputs = output if isinstance(output, (tuple, list)) else (output,)
        places.clear()
        places.update({id(v): n for n, v in enumerate(outputs) if isinstance(v, Tensor)})
        alive[:] = outputs

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.register_forward_pre_hook(receive, with_kwargs=True))
            stack.enter_context(layer.register_forward_hook(give))
        yield handed


def _same_shape(value: Any, result: Any) -> Any:
    both = isinstance(value, Tensor) and isinstance(result, Tensor)
    return value if both and value.shape == result.shape else result


@contextmanager
def without_layers(
    layers: Sequence[nn.Module], handed: Mapping[int, Argument] | None = None
) -> Iterator[list[str]]:
    """While open, these layers return the hidden states that they are given.

    Results in ``handed`` are hidden states too; others stay as computed. Yields the classes of
    layers that cannot be skipped, because their output has another shape.
    """
    impossible: list[str] = []

    def pass_on(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        before, after = hidden_in(args, kwargs), hidden_out(output)
        if before is None or after is None or before.shape != after.shape:
            impossible.append(type(layer).__name__)
            return output
        if isinstance(output, Tensor):
            return before
        arguments = _arguments(args, kwargs)
        given = {place: arguments.get(name) for place, name in (handed or {}).items() if place}
        return type(output)(
            (before, *(_same_shape(given.get(n), value) for n, value in enumerate(output[1:], 1)))
        )

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.register_forward_hook(pass_on, with_kwargs=True))
        yield impossible
