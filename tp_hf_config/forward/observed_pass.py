"""Run one forward pass of an experiment in float64, and keep results beside its outputs.

A part of a model may run without an output that depends on it: its result is not used (a pooling
head), or only decides (the scores of which the best few are taken). Then its results are watched as
if they were outputs: those that nothing is computed from, and those that decide choices.
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
from ..model.shortage import note_shortage
from ..model.surroundings import without_caches
from ..model.tensors import owner, saved_buffers
from .output_tensors import largest_in, outputs_of, tensors_in, unmasked
from .run_recipe import PLAIN, RunRecipe

_NONE = 1e-12  # a smaller gradient is none
_NUMBERS = ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__")
_BLANK = tuple(
    form.format(what)
    for what in ("zeros", "ones", "full", "empty", "rand", "randn")
    for form in ("new_{}", "{}_like")
)
"""Functions that read only the shape of a tensor: its values choose nothing there."""
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_LOW = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}


class PassResult(NamedTuple):
    """One floating point tensor that a forward pass computes.

    Attributes:
        module: the name of the innermost module that is running.
        function: the name of the function that returns the tensor.
        number: how many results of that function the module had before in this pass.
    """

    module: str
    function: str
    number: int


class AllFloat64(DefaultDtype):
    """Turns casts to lower precision into float64: float32 norms would hide small differences.

    Constants are float64 too: Transformers 4 fills a mask of the default dtype with float64's least
    number. Nothing that is computed in this mode stays in the caches of classes.
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
        if func is F.embedding:  # the padding row has a gradient like any other
            args = (*args[:2], None, *args[3:])
            kwargs.pop("padding_idx", None)
        return super().__torch_function__(func, types, args, kwargs)


class _ResultWatch(AllFloat64):
    """Keeps the results of functions while a model runs.

    Parts that switch gradients off have them here if the whole pass has: an experiment asks what
    depends on what.

    Args:
        wanted: the results to keep; ``None`` to keep every result and fill ``read`` too.

    Attributes:
        results: the results that were kept.
        read: tensors that went into functions whose own result carries no gradient: an order,
            positions, a comparison, a number.
    """

    def __init__(self, wanted: Collection[PassResult] | None):
        super().__init__()
        self.wanted = wanted
        self._modules = {result.module for result in wanted or ()}
        self.results: dict[PassResult, Tensor] = {}
        self.read: list[Tensor] = []
        self._running = [""]
        self._numbers: Counter[tuple[str, str]] = Counter()

    @contextmanager
    def over(self, model: nn.Module) -> Iterator[None]:
        """While open, keep track of which module of the model is running."""
        with ExitStack() as stack, self:
            around = {"": ""}  # module -> itself, or for a list of modules what runs them
            first: dict[nn.Module, str] = {}
            followed: set[nn.Module] = set()
            for name, module in named_modules(model):
                first.setdefault(module, name)
                holder = name.rpartition(".")[0]
                around[name] = around[holder] if isinstance(module, _LISTS) else name
                counted = self._counts(name) or self._counts(around[holder])
                if not counted or module in followed:
                    continue
                followed.add(module)
                enter = partial(self._enter, first[module])
                stack.enter_context(module.register_forward_pre_hook(enter))
                stack.enter_context(module.register_forward_hook(self._leave, always_call=True))
            yield

    def _counts(self, module: str) -> bool:
        """True if results of this module may be kept.

        ``over`` also follows the modules right inside it, whose results are their own.
        """
        return self.wanted is None or module in self._modules

    def _enter(self, name: str, *_: Any) -> None:
        self._running.append(name)

    def _leave(self, *_: Any) -> None:
        self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
    """Return the floating point outputs of one forward pass, with a fixed random seed.

    The watched results come last; one that this pass does not compute is a single NaN. Scores of
    what is masked, as infinity, are 0.
    """
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
    """Return the results to watch: they depend on parameters that no output depends on.

    These are all results by which something is chosen, and of the results that nothing is computed
    from as many as it takes to observe every such parameter, those that depend on most of them
    first. For matrices that are still unobserved, the last result that depends on each follows.

    Returns:
        The results in the order of the pass; none if outputs depend on all parameters, or if the
        pass changes a parameter in place.
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
    except RuntimeError as error:  # a parameter is changed in place, where the class wants none
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
    """Tells which of some parameters each result of a pass depends on."""

    def __init__(self, parameters: Sequence[Tensor], results: dict[PassResult, Tensor]):
        self.results = results
        self._parameters = parameters
        self._observed: dict[PassResult, set[int]] = {}

    def on(self, result: PassResult) -> set[int]:
        """Return the parameters, by ``id``, of a result; none if it was changed in place since."""
        if result not in self._observed:
            tensor, without = self.results[result], self._parameters
            try:
                if tensor.requires_grad:
                    without = _unobserved([unmasked(tensor)], without)
            except RuntimeError as error:  # torch computes no gradients then (MiniMax-M3's scores)
                note_shortage(error)
            self._observed[result] = set(map(id, self._parameters)) - set(map(id, without))
        return self._observed[result]

    def fewest(self, results: Iterable[PassResult]) -> set[PassResult]:
        """Return as few results as depend on all the parameters that any do, largest sets first."""
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
    """Return, for each of these parameters, the last result that depends on it.

    Nothing later does: a softmax over a single score (SwiftFormer's) gives 1, and attention over
    equal values (X-CLIP's first layer) gives those values, whatever the scores are. The search is
    in the module that the parameter belongs to, and the one around it.
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
    """Return the edges of the autograd graph that something else is computed from."""
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
    """Return the parameters that these tensors do not depend on."""
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
    """Return the names of the saved buffers of norms whose gradients a pass can compute.

    Tables of other modules stay out: the outputs may depend on some of them alone (MiniMax's decays
    of a text of one block), or have no gradient behind a choice (EnCodec's codebooks). Torch
    computes no gradients of its own batch norms' statistics. There are none at all if a pass fails
    with them: a class may write to a buffer.
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
            torch.autograd.grad(total, list(buffers.values()), allow_unused=True)
    except RuntimeError as error:
        note_shortage(error)
        return frozenset()
    return frozenset(buffers)


def _is_norm(module: nn.Module) -> bool:
    """True if a module's own tensors are all vectors, and it is none of torch's batch norms."""
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    of_torch = isinstance(module, nn.modules.batchnorm._NormBase)
    return not of_torch and all(tensor.ndim <= 1 for tensor in own)


@contextmanager
def following(tensors: Iterable[Tensor]) -> Iterator[None]:
    """While open, autograd follows these tensors."""
    followed = [tensor for tensor in tensors if not tensor.requires_grad]
    try:
        for tensor in followed:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor in followed:
            tensor.requires_grad_(False)
