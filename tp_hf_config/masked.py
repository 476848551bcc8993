"""Did the right units go?  A pruned model must be the original with the removed units at zero.

Shapes cannot tell: a layer that lost the wrong channels, or regrouped heads, has the shapes that
its config asks for.  Which units went is read off the values themselves, not off any record of the
pruning: random weights stand for their places.  Norms run over the kept channels, routers never
choose the removed experts, scales that depend on widths are those of the pruned model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .passes import Result, outputs_in_float64, warm_up
from .reference import Refusal
from .scales import AsNarrow, Side, SizesRead, Width, as_written, take_scales
from .states import AXIS, states_in, states_of
from .ties import saved_buffers, stacks

Kept = dict[str, tuple[Side, ...]]
"""What is left of every tensor, dimension by dimension."""

EXACT = 1e-9
"""Relative difference up to which two outputs in float64 are the same."""
_NEVER = -1e9
_PROJECTIONS = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)


def difference(
    original: nn.Module,
    pruned: nn.Module,
    fresh: nn.Module,
    inputs: Mapping[str, Any],
    watched: Sequence[Result] = (),
) -> str | None:
    """Where a pruned model is not the original with the removed units masked; ``None``: nowhere.

    States of an encoder lose the channels that the layer which reads them lost.

    Args:
        original: before pruning, every weight random, in float64 and eval mode.
        pruned: after it.
        fresh: the class built anew from the pruned model's config, any weights: its scales count.
        inputs: keyword arguments of one forward pass of the original.
        watched: what is compared beside the outputs.
    """
    kept = kept_positions(original, pruned)
    if isinstance(kept, Refusal):
        return kept.reason
    left = _left_of(inputs, original, kept)
    warm_up(pruned, left, watched)
    with torch.no_grad(), as_written(pruned), SizesRead() as read:
        got = outputs_in_float64(pruned, left, watched)

    # a class may exchange modules as it first runs (BigBird, which leaves short texts dense)
    started = _copied(original)
    with torch.no_grad():
        outputs_in_float64(started, inputs)
        outputs_in_float64(fresh, left)

    def masked(surroundings: AbstractContextManager[Any]) -> list[Tensor]:
        reference = _masked(started, fresh, kept)
        with torch.no_grad(), _closed(reference, kept), surroundings:
            return outputs_in_float64(reference, inputs, watched)

    plain = _compared(masked(nullcontext()), got, kept)
    if plain is None:
        return None
    # a scale may be read off the head dim as the model runs, where no attribute says it
    narrow = AsNarrow(read.sizes, (side for sides in kept.values() for side in sides))
    with as_written(original):
        outputs = masked(narrow)
    return None if _compared(outputs, got, kept) is None else plain


def _copied(model: nn.Module) -> nn.Module:
    """A copy, without the history of what a forward pass has left in the model (RecurrentGemma)."""
    values = [value for module in model.modules() for value in vars(module).values()]
    left = [one for one in values if isinstance(one, Tensor) and not one.is_leaf]
    return copy.deepcopy(model, {id(one): one.detach().clone() for one in left})


def _masked(original: nn.Module, fresh: nn.Module, kept: Kept) -> nn.Module:
    """The original with the removed units masked."""
    reference = copy.deepcopy(original)
    take_scales(reference, fresh)
    _mask(reference, kept)
    _norms_over_kept(reference, kept)
    return reference


def _compared(expected: Sequence[Tensor], got: Sequence[Tensor], kept: Kept) -> str | None:
    """Where outputs differ from those of the masked original, or ``None``."""
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
    """Which positions of every tensor are left, or which tensor holds anything else."""
    before, after = _tensors(original), _tensors(pruned)
    if before.keys() != after.keys():
        return Refusal(f"other tensors: {', '.join(sorted(before.keys() ^ after.keys())[:3])}")
    kept: Kept = {}
    for name, value in before.items():
        found = kept_along(value, after[name])
        if isinstance(found, Refusal):
            return Refusal(f"{name} holds {found.reason}")
        kept[name] = found
    return kept


def inputs_left(
    original: nn.Module, pruned: nn.Module, inputs: Mapping[str, Any]
) -> dict[str, Any] | Refusal:
    """Inputs of a pruned model: those of the original, less channels that it does not read."""
    kept = kept_positions(original, pruned)
    return kept if isinstance(kept, Refusal) else _left_of(inputs, original, kept)


def _left_of(inputs: Mapping[str, Any], original: nn.Module, kept: Kept) -> dict[str, Any]:
    read = states_of(original)
    states = states_in(original, inputs)
    if read is None:
        return dict(inputs)
    left = kept[read.reader][read.dim].left
    return {**inputs, **{name: one.index_select(AXIS, left) for name, one in states.items()}}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = dict(model.named_parameters(remove_duplicate=False))
    return {name: value.detach() for name, value in {**named, **saved_buffers(model)}.items()}


def kept_along(before: Tensor, after: Tensor) -> tuple[Side, ...] | Refusal:
    """What is left of a tensor of random values, dimension by dimension, found by value."""
    if before.shape == after.shape:
        if not torch.equal(before, after):
            return Refusal("other values than before")
        return tuple(Side(size, torch.arange(size)) for size in before.shape)
    if before.ndim != after.ndim:
        return Refusal("other dimensions than before")
    if not before.numel():  # tokens that there are none of: nothing tells which
        sizes = zip(before.shape, after.shape, strict=True)
        return tuple(Side(size, torch.arange(left)) for size, left in sizes)
    values, order = before.flatten().sort()
    alone = torch.ones(len(values), dtype=torch.bool)
    alone[1:] &= values[1:] != values[:-1]
    alone[:-1] &= values[1:] != values[:-1]
    where = torch.searchsorted(values, after.flatten()).clamp(max=len(values) - 1)
    if not torch.equal(values[where], after.flatten()):
        return Refusal("values that the original has not")
    places = torch.stack(torch.unravel_index(order[where], before.shape))
    sure = alone[where].view(after.shape)
    result: list[Side] = []
    expected = before
    for dim, size in enumerate(after.shape):
        rows = places[dim].view(after.shape).movedim(dim, 0).reshape(size, -1)
        known = sure.movedim(dim, 0).reshape(size, -1)
        left = torch.stack([row[k][0] for row, k in zip(rows, known, strict=True)])
        if not bool((left.diff() > 0).all()):
            return Refusal("channels in another order")
        expected = expected.index_select(dim, left)
        result.append(Side(before.shape[dim], left))
    return tuple(result) if torch.equal(expected, after) else Refusal("channels of mixed origin")


def _mask(model: nn.Module, kept: Kept) -> None:
    """Everything of the removed units becomes zero."""
    with torch.no_grad():
        for name, value in _tensors(model).items():
            for dim, side in enumerate(kept[name]):
                if side.cut:
                    value.index_fill_(dim, side.gone, 0.0)


def _vectors(module: nn.Module) -> bool:
    """Whether a module is nothing but vectors as long as what goes through it: a norm, a scale."""
    own = list(module.parameters(recurse=False))
    whole = len(own) == len(list(module.parameters()))
    statistics = any(buffer.numel() > 1 for buffer in saved_buffers(module).values())
    plain = isinstance(module, _PROJECTIONS) or statistics
    return (
        bool(own) and whole and not plain and all(p.ndim and p.numel() == max(p.shape) for p in own)
    )


def _norms_over_kept(model: nn.Module, kept: Kept) -> None:
    """Make norms look at the kept channels only and give zeros elsewhere."""
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
            size, left = cut[0]
            narrow = _narrow(module, left)
        elif "norm" in type(module).__name__.lower() and not list(module.parameters()):
            size, left, narrow = 0, None, copy.deepcopy(module)
        else:
            continue
        module.forward = _over(narrow, size, left)


def _narrow(module: nn.Module, left: Tensor) -> nn.Module:
    narrow = copy.deepcopy(module)
    for key, parameter in narrow._parameters.items():
        if parameter is not None and parameter.numel() > 1:
            dim = max(range(parameter.ndim), key=lambda d: parameter.shape[d])
            narrow._parameters[key] = nn.Parameter(parameter.detach().index_select(dim, left))
    for part in narrow.modules():  # Moonshine's scale holds a norm without weights
        if hasattr(part, "normalized_shape"):
            setattr(part, "normalized_shape", (len(left),))
    for key, value in vars(narrow).items():  # one group of channels for each
        if isinstance(value, Width):
            setattr(narrow, key, value.new)
    return narrow


def _over(narrow: nn.Module, size: int, left: Tensor | None) -> Callable[..., Any]:
    """A forward pass over some channels: those given, or those that are not zero everywhere."""

    def forward(x: Tensor, *others: Any, **named: Any) -> Any:
        places = left
        axis = -1
        if places is None:
            places = (x != 0).flatten(0, -2).any(0).nonzero().view(-1)
            if hasattr(narrow, "normalized_shape"):  # without weights, as OLMo's
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
                return result  # it does not keep the channels apart
            narrow_last = result.movedim(axis, -1)
            full = F.pad(torch.zeros_like(narrow_last), (0, width - len(places)))
            return full.index_copy(-1, places, narrow_last).movedim(-1, axis)

        result = narrow(
            cut(x), *map(cut, others), **{key: cut(value) for key, value in named.items()}
        )
        return tuple(map(whole, result)) if type(result) is tuple else whole(result)

    return forward


def _axis(x: Tensor, side: Side) -> int:
    """Along which axis channels stand: the last, or the one after the samples (ConvNeXt).

    Or another one (heads).  Of several as long, it is that along which removed channels are zero.
    """
    axes = (-1, 1, *range(2, x.ndim - 1)) if x.ndim > 1 else ()
    fitting = [axis for axis in axes if _long(x, axis) == side.size]
    masked = (axis for axis in fitting if not bool(x.index_select(axis, side.gone).any()))
    return next(masked, fitting[0] if fitting else 1)


def _long(x: Tensor, axis: int) -> int:
    """How long an axis is, so that it is not among the sizes that the model reads."""
    return len(x.movedim(axis, 0))


@contextmanager
def _closed(model: nn.Module, kept: Kept) -> Iterator[None]:
    """Where stacked experts went, no router chooses them: what scores them says never."""
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
    """Both at the positions that are left, along axes that were cut.

    Those are the positions of a group that was cut alike (the nearest, where several were), or the
    channels that are not zero for every input.
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
    sizes = (full.shape[axis], value.shape[axis])
    lefts = {
        tuple(side.left.tolist()): side.left
        for sides in kept.values()
        for side in sides
        if (side.size, len(side.left)) == sizes
    }
    cut = [(full.index_select(axis, left), value) for left in lefts.values()]
    dense = [
        one.index_select(axis, (rows != 0).any(1).nonzero().view(-1))
        for one in (full, value)
        for rows in (one.movedim(axis, 0).reshape(one.shape[axis], -1),)
    ]
    return [*cut, (dense[0], dense[1])]
