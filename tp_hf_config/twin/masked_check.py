"""Masked check: the pruned model must equal the original with the removed units at zero.

Shapes cannot show that the right units were removed: a layer that lost the wrong channels, or whose
heads were regrouped, has exactly the shapes that its config asks for. Which units were removed is
read off the values, not off any record of the pruning: weights are random, so that each value tells
its position. In the masked original, norms run over the kept channels only, routers never choose
the removed experts, and scales that depend on widths are those of the pruned model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..forward.encoder_states import AXIS, states_in, states_of
from ..forward.observed_pass import Result, outputs_in_float64, warm_up
from ..forward.run_recipe import PLAIN, RunRecipe
from ..model.build import Refusal
from ..model.tensors import saved_buffers, stacks
from .width_scalars import AsNarrow, Side, SizesRead, Width, as_written, take_scales

Kept = dict[str, tuple[Side, ...]]
"""The positions that are left of every tensor: its name, and one ``Side`` for each dimension."""
EXACT = 1e-9
"""Largest relative difference at which two float64 outputs count as the same."""
_NEVER = -1e9
"""The score of a removed expert: so low that no router chooses it."""
_PROJECTIONS = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
"""Layers that are no norms, even if all of their parameters are vectors."""


def difference(
    original: nn.Module,
    pruned: nn.Module,
    fresh: nn.Module,
    inputs: Mapping[str, Any],
    watched: Sequence[Result] = (),
    recipe: RunRecipe = PLAIN,
) -> str | None:
    """Return where a pruned model differs from the masked original, or None if nowhere.

    Encoder states among the inputs lose the channels that the layer which reads them lost.

    Args:
        original: the model before pruning, every weight random, in float64 and eval mode.
        pruned: the model after pruning.
        fresh: the reference build: the class built anew from the pruned model's config. Its weights
            may have any values; its scales count.
        inputs: keyword arguments of one forward pass of the original.
        watched: intermediate results that are compared like outputs.
        recipe: how the class is run.

    Returns:
        What differs first: a tensor that does not hold the original's values, or an output with its
        relative difference.
    """
    kept = kept_positions(original, pruned)
    if isinstance(kept, Refusal):
        return kept.reason
    pruned_inputs = _left_of(inputs, original, kept, recipe)
    warm_up(pruned, pruned_inputs, watched, recipe)
    with torch.no_grad(), as_written(pruned), SizesRead() as sizes_read:
        actual = outputs_in_float64(pruned, pruned_inputs, watched, recipe)

    # the first pass may exchange modules (BigBird: full attention for short texts)
    warmed_up = _copied(original)
    with torch.no_grad():
        outputs_in_float64(warmed_up, inputs, recipe=recipe)
        outputs_in_float64(fresh, pruned_inputs, recipe=recipe)

    def masked(surroundings: AbstractContextManager[Any]) -> list[Tensor]:
        reference = _masked(warmed_up, fresh, kept)
        with torch.no_grad(), _closed(reference, kept), surroundings:
            return outputs_in_float64(reference, inputs, watched, recipe)

    reason = _compared(masked(nullcontext()), actual, kept)
    if reason is None:
        return None
    # the pass itself may make a scale from the head dim, which then is in no attribute
    narrow = AsNarrow(sizes_read.sizes, (side for sides in kept.values() for side in sides))
    with as_written(original):
        outputs = masked(narrow)
    return None if _compared(outputs, actual, kept) is None else reason


def _copied(model: nn.Module) -> nn.Module:
    """Return a copy of a model that may still hold tensors of a past pass (RecurrentGemma)."""
    values = [value for module in model.modules() for value in vars(module).values()]
    nonleaves = [tensor for tensor in values if isinstance(tensor, Tensor) and not tensor.is_leaf]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in nonleaves})


def _masked(original: nn.Module, fresh: nn.Module, kept: Kept) -> nn.Module:
    """Return a copy of the original with removed units masked and scales taken from ``fresh``."""
    reference = copy.deepcopy(original)
    take_scales(reference, fresh)
    _mask(reference, kept)
    _norms_over_kept(reference, kept)
    return reference


def _compared(expected: Sequence[Tensor], got: Sequence[Tensor], kept: Kept) -> str | None:
    """Return where an output first differs from the masked original, or None if nowhere."""
    if len(expected) != len(got):
        return f"{len(got)} outputs, the original has {len(expected)}"
    for number, (full, value) in enumerate(zip(expected, got, strict=True)):
        aligned = _aligned(full, value, kept)
        if isinstance(aligned, Refusal):
            return f"output {number}: {aligned.reason}"
        full, value = aligned
        error = float((value - full).norm() / full.norm().clamp_min(1e-30))
        if not error <= EXACT:
            return f"output {number} is {error:.0e} off the original with the removed units masked"
    return None


def kept_positions(original: nn.Module, pruned: nn.Module) -> Kept | Refusal:
    """Return the kept positions of every tensor, or a ``Refusal`` if one holds anything else."""
    before, after = _tensors(original), _tensors(pruned)
    if before.keys() != after.keys():
        return Refusal(f"other tensors: {', '.join(sorted(before.keys() ^ after.keys())[:3])}")
    kept: Kept = {}
    for name, value in before.items():
        sides = kept_along(value, after[name])
        if isinstance(sides, Refusal):
            return Refusal(f"{name} holds {sides.reason}")
        kept[name] = sides
    return kept


def inputs_left(
    original: nn.Module, pruned: nn.Module, inputs: Mapping[str, Any], recipe: RunRecipe
) -> dict[str, Any] | Refusal:
    """Return the inputs of a pruned model: those of the original, less what it does not read.

    Only encoder states lose channels. A ``Refusal`` says why the kept positions cannot be told.
    """
    kept = kept_positions(original, pruned)
    return kept if isinstance(kept, Refusal) else _left_of(inputs, original, kept, recipe)


def _left_of(
    inputs: Mapping[str, Any], original: nn.Module, kept: Kept, recipe: RunRecipe
) -> dict[str, Any]:
    """Return the inputs, with encoder states cut to the channels that their reader kept."""
    states_input = states_of(original, recipe.states)
    states = states_in(original, inputs, recipe.states)
    if states_input is None:
        return dict(inputs)
    index = kept[states_input.reader][states_input.dim].left
    return {**inputs, **{name: value.index_select(AXIS, index) for name, value in states.items()}}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and saved buffer by its name, detached."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return {name: value.detach() for name, value in {**named, **saved_buffers(model)}.items()}


def kept_along(before: Tensor, after: Tensor) -> tuple[Side, ...] | Refusal:
    """Return which positions of a tensor of random values are left, found by value.

    Returns:
        One ``Side`` for each dimension; or a ``Refusal`` if ``after`` is not ``before`` at some of
        its positions along each dimension, in their order.
    """
    if before.shape == after.shape:
        if not torch.equal(before, after):
            return Refusal("other values than before")
        return tuple(Side(size, torch.arange(size)) for size in before.shape)
    if before.ndim != after.ndim:
        return Refusal("other dimensions than before")
    if not before.numel():  # an empty tensor (no such tokens): nothing tells which are left
        sizes = zip(before.shape, after.shape, strict=True)
        return tuple(Side(size, torch.arange(remaining)) for size, remaining in sizes)
    values, order = before.flatten().sort()
    unique = torch.ones(len(values), dtype=torch.bool)
    unique[1:] &= values[1:] != values[:-1]
    unique[:-1] &= values[1:] != values[:-1]
    where = torch.searchsorted(values, after.flatten()).clamp(max=len(values) - 1)
    if not torch.equal(values[where], after.flatten()):
        return Refusal("values that the original has not")
    places = torch.stack(torch.unravel_index(order[where], before.shape))
    sure = unique[where].view(after.shape)
    result: list[Side] = []
    expected = before
    for dim, size in enumerate(after.shape):
        rows = places[dim].view(after.shape).movedim(dim, 0).reshape(size, -1)
        sure_rows = sure.movedim(dim, 0).reshape(size, -1)
        remaining = torch.stack([row[k][0] for row, k in zip(rows, sure_rows, strict=True)])
        if not bool((remaining.diff() > 0).all()):
            return Refusal("channels in another order")
        expected = expected.index_select(dim, remaining)
        result.append(Side(before.shape[dim], remaining))
    return tuple(result) if torch.equal(expected, after) else Refusal("channels of mixed origin")


def _mask(model: nn.Module, kept: Kept) -> None:
    """Set everything of the removed units to zero, in place."""
    with torch.no_grad():
        for name, value in _tensors(model).items():
            for dim, side in enumerate(kept[name]):
                if side.cut:
                    value.index_fill_(dim, side.gone, 0.0)


def _vectors(module: nn.Module) -> bool:
    """True if a module is a norm or a scale: all of its parameters are vectors of its channels."""
    own = list(module.parameters(recurse=False))
    whole = len(own) == len(list(module.parameters()))
    statistics = any(buffer.numel() > 1 for buffer in saved_buffers(module).values())
    plain = isinstance(module, _PROJECTIONS) or statistics
    return (
        bool(own) and whole and not plain and all(p.ndim and p.numel() == max(p.shape) for p in own)
    )


def _norms_over_kept(model: nn.Module, kept: Kept) -> None:
    """Make norms run over the kept channels only and return zeros elsewhere, in place."""
    for name, module in model.named_modules():
        if _vectors(module):
            sides = [
                side
                for key, _ in module.named_parameters()
                for side in kept[f"{name}.{key}" if name else key]
            ]
            cut = [side for side in sides if side.cut]
            if not cut:
                continue
            size, remaining = cut[0]
            narrow = _narrow(module, remaining)
        elif "norm" in type(module).__name__.lower() and not list(module.parameters()):
            size, remaining, narrow = 0, None, copy.deepcopy(module)
        else:
            continue
        module.forward = _over(narrow, size, remaining)


def _narrow(module: nn.Module, left: Tensor) -> nn.Module:
    """Return a copy of a norm or scale whose vectors have the kept channels only."""
    narrow = copy.deepcopy(module)
    for key, parameter in narrow._parameters.items():
        if parameter is not None and parameter.numel() > 1:
            dim = max(range(parameter.ndim), key=lambda d: parameter.shape[d])
            narrow._parameters[key] = nn.Parameter(parameter.detach().index_select(dim, left))
    for part in narrow.modules():  # Moonshine's scale holds a norm without weights
        if hasattr(part, "normalized_shape"):
            setattr(part, "normalized_shape", (len(left),))
    for key, value in vars(narrow).items():  # a group norm with one group for each channel
        if isinstance(value, Width):
            setattr(narrow, key, value.new)
    return narrow


def _over(narrow: nn.Module, size: int, left: Tensor | None) -> Callable[..., Any]:
    """Return a forward pass that runs a module over some channels and gives zeros elsewhere.

    Args:
        narrow: the module, as wide as the kept channels.
        size: how many channels there were before pruning; 0 if ``left`` is None.
        left: positions of the kept channels; ``None``: those that are not zero everywhere.
    """

    def forward(x: Tensor, *others: Any, **named: Any) -> Any:
        places = left
        axis = -1
        if places is None:
            places = (x != 0).flatten(0, -2).any(0).nonzero().view(-1)
            if hasattr(narrow, "normalized_shape"):  # a norm without weights (OLMo's)
                setattr(narrow, "normalized_shape", (len(places),))
        else:
            axis = _axis(x, Side(size, places))
        width = _long(x, axis)

        def cut(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.ndim < 2 or value.ndim <= axis:
                return value
            return value.index_select(axis, places) if _long(value, axis) == width else value

        def whole(result: Any) -> Any:
            if not isinstance(result, Tensor) or _long(result, axis) != len(places):
                return result  # it has no axis of channels
            narrow_last = result.movedim(axis, -1)
            full = F.pad(torch.zeros_like(narrow_last), (0, width - len(places)))
            return full.index_copy(-1, places, narrow_last).movedim(-1, axis)

        result = narrow(
            cut(x), *map(cut, others), **{key: cut(value) for key, value in named.items()}
        )
        return tuple(map(whole, result)) if type(result) is tuple else whole(result)

    return forward


def _axis(x: Tensor, side: Side) -> int:
    """Return the axis along which channels stand: the last, 1 (ConvNeXt), or another (heads).

    If several axes are as long, return the one along which the removed channels are zero.
    """
    axes = (-1, 1, *range(2, x.ndim - 1)) if x.ndim > 1 else ()
    fitting = [axis for axis in axes if _long(x, axis) == side.size]
    masked = (axis for axis in fitting if not bool(x.index_select(axis, side.gone).any()))
    return next(masked, fitting[0] if fitting else 1)


def _long(x: Tensor, axis: int) -> int:
    """Return the length of an axis, in a way that counts as no size which the model reads."""
    return len(x.movedim(axis, 0))


@contextmanager
def _closed(model: nn.Module, kept: Kept) -> Iterator[None]:
    """Keep routers from choosing removed stacked experts in this context: they score ``_NEVER``."""
    tensors = _tensors(model)
    lost = [
        (name.rpartition(".")[0].rpartition(".")[0], kept[name][0])
        for name in tensors
        if stacks(model, name) and kept[name][0].cut
    ]
    weights: dict[int, Tensor] = {}
    for layer, experts in lost:
        for name, value in tensors.items():
            inside = name.startswith(f"{layer}.") or not layer
            if not inside or value.ndim not in (1, 2) or kept[name][0].size != experts.size:
                continue
            if torch.equal(kept[name][0].left, experts.left):
                if value.ndim == 1:
                    with torch.no_grad():
                        value.index_fill_(0, experts.gone, _NEVER)
                weights[value.data_ptr()] = experts.gone
    plain = F.linear

    def linear(x: Tensor, weight: Tensor, *rest: Any, **named: Any) -> Tensor:
        out = plain(x, weight, *rest, **named)
        gone = weights.get(weight.data_ptr()) if weight.ndim == 2 else None
        return out if gone is None else out.index_fill(-1, gone, _NEVER)

    F.linear = linear  # type: ignore[assignment]
    try:
        yield
    finally:
        F.linear = plain


def _aligned(full: Tensor, value: Tensor, kept: Kept) -> tuple[Tensor, Tensor] | Refusal:
    """Return an output of the masked original and of the pruned model in one shape.

    Along an axis that was cut, both have the kept positions only: those of a tensor dim with the
    same two sizes (the nearest result if there are several), or the channels that are not zero for
    every input.

    Returns:
        Both outputs; or a ``Refusal`` if no choice of positions makes their shapes equal.
    """
    if full.ndim != value.ndim:
        return Refusal(f"shape {list(value.shape)}, the original's has {list(full.shape)}")
    axes = [n for n in range(full.ndim) if full.shape[n] != value.shape[n]]
    pairs = [(full, value)]
    for axis in axes:
        pairs = [one for pair in pairs for one in _cut_alike(*pair, axis, kept)]
    fitting = [(one, other) for one, other in pairs if one.shape == other.shape]
    if not fitting:
        return Refusal(f"shape {list(value.shape)}, unmasked in the original {list(full.shape)}")
    return min(fitting, key=lambda pair: float((pair[0] - pair[1]).norm()))


def _cut_alike(full: Tensor, value: Tensor, axis: int, kept: Kept) -> list[tuple[Tensor, Tensor]]:
    """Return both outputs with one axis cut: like each ``Side`` of its sizes, and to non-zeros."""
    sizes = (full.shape[axis], value.shape[axis])
    choices = {
        tuple(side.left.tolist()): side.left
        for sides in kept.values()
        for side in sides
        if (side.size, len(side.left)) == sizes
    }
    cut = [(full.index_select(axis, positions), value) for positions in choices.values()]
    dense = [
        output.index_select(axis, (rows != 0).any(1).nonzero().view(-1))
        for output in (full, value)
        for rows in (output.movedim(axis, 0).reshape(output.shape[axis], -1),)
    ]
    return [*cut, (dense[0], dense[1])]
