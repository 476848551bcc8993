"""Did the right units go?  The full-size original, with the removed units at zero, must agree.

Nothing here is the library's.  Which units went is read off the values: random weights, each
another, stand for their places.  Norms are taken over what is left, scales that depend on widths
are those of the class built from the new config, routers never choose an expert that went.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from generation import Precise, outputs_of, plain_copy, saved_buffers
from narrowed import as_narrow, nothing
from torch import Tensor, nn

ALLOWED = 1e-8
"""Relative difference of outputs in float64 that are the same; a wrong unit shows at 1e-3."""
_NEVER = -1e9
_STATES = ("encoder_hidden_states", "encoder_outputs", "cross_attention_states")


@dataclass(frozen=True)
class Axis:
    """What is left along one dimension of a tensor."""

    size: int
    left: Tensor

    @property
    def whole(self) -> bool:
        """Nothing went."""
        return len(self.left) == self.size

    @property
    def gone(self) -> Tensor:
        """The positions that went."""
        mask = torch.ones(self.size, dtype=torch.bool)
        mask[self.left] = False
        return mask.nonzero().flatten()


Left = dict[str, list[Axis]]


class WrongError(Exception):
    """What a pruned model holds or computes cannot be the original's."""


def compare(
    original: nn.Module, pruned: Any, inputs: Mapping[str, Any], fresh: nn.Module
) -> dict[str, Any]:
    """Inputs of the pruned model, once its outputs are those of the masked original.

    Args:
        original: before pruning.
        pruned: after it.
        inputs: of one forward pass of the original.
        fresh: the class built from the pruned model's config.

    Raises:
        WrongError: they are not.
    """
    left = what_is_left(original, pruned)
    pruned, why = plain_copy(pruned).double(), ""  # some layers stay in float32 (routers)
    for scales in (nothing, as_narrow, partial(as_narrow, by_number=True)):
        masked = masked_copy(original, fresh, left)
        with Masked(masked, left), scales(masked, fresh):
            expected = outputs_of(masked, inputs)
        found = _agreeing(expected, pruned, inputs, left)
        if not isinstance(found, str):
            return found
        why = why or found
    raise WrongError(why)


def _agreeing(
    expected: Sequence[Tensor], pruned: nn.Module, inputs: Mapping[str, Any], left: Left
) -> dict[str, Any] | str:
    """The inputs with which the pruned model gives the expected outputs; or how it differs."""
    why = ""
    for given in _narrowed(inputs, left):
        try:
            with Precise():
                got = outputs_of(pruned, given)
        except Exception as error:
            why = why or f"it does not run: {type(error).__name__}: {' '.join(str(error).split())}"
            continue
        differs = _difference(expected, got, left)
        if differs is None:
            return given
        why = differs
    return why


def what_is_left(original: nn.Module, pruned: nn.Module) -> Left:
    """Which positions of every tensor are left, by value."""
    before, after = _tensors(original), _tensors(pruned)
    if before.keys() != after.keys():
        raise WrongError(f"other tensors: {sorted(before.keys() ^ after.keys())[:3]}")
    return {name: _axes(name, value, after[name]) for name, value in before.items()}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    found = dict(model.named_parameters(remove_duplicate=False)) | saved_buffers(model)
    return {name: value.detach() for name, value in found.items()}


def _axes(name: str, before: Tensor, after: Tensor) -> list[Axis]:
    if before.shape == after.shape:
        if not torch.equal(before, after):
            raise WrongError(f"{name} holds other values than before")
        return [Axis(size, torch.arange(size)) for size in before.shape]
    if before.ndim == after.ndim and before.numel() == after.numel() == 0:
        return [Axis(size, torch.arange(size)) for size in before.shape]  # no register tokens
    if before.ndim != after.ndim or not before.numel():
        raise WrongError(f"{name} holds {list(after.shape)}, before it was {list(before.shape)}")
    flat, order = before.flatten().sort()
    once = torch.ones_like(flat, dtype=torch.bool)
    once[1:] &= flat.diff() != 0
    once[:-1] &= flat.diff() != 0
    places = torch.searchsorted(flat, after.flatten().contiguous()).clamp(max=len(flat) - 1)
    if not torch.equal(flat[places], after.flatten()):
        raise WrongError(f"{name} holds values that it did not hold before")
    coordinates = torch.unravel_index(order[places], before.shape)
    sure = once[places].view(after.shape)
    axes, expected = [], before
    for dim, size in enumerate(before.shape):
        if size == after.shape[dim]:  # rows of zeros (padding) do not say where they stood
            axes.append(Axis(size, torch.arange(size)))
            continue
        where = coordinates[dim].view(after.shape).masked_fill(~sure, -1)
        left = where.movedim(dim, 0).reshape(after.shape[dim], -1).amax(1)
        if bool((left < 0).any()) or not bool((left.diff() > 0).all()):
            raise WrongError(f"{name} holds channels of mixed origin or in another order")
        axes.append(Axis(size, left))
        expected = expected.index_select(dim, left)
    if not torch.equal(expected, after):
        raise WrongError(f"{name} holds channels of mixed origin")
    return axes


def masked_copy(original: nn.Module, fresh: nn.Module, left: Left) -> nn.Module:
    """The original with removed units at zero, its scales those of the new config."""
    model = plain_copy(original).double()
    with torch.no_grad():
        for name, value in _tensors(model).items():
            for dim, axis in enumerate(left[name]):
                if not axis.whole:
                    value.index_fill_(dim, axis.gone, 0.0)
    built = dict(fresh.named_modules())
    for name, module in list(model.named_modules()):
        if name in built:
            _take_scales(module, built[name])
        if _is_norm(module):
            cut = [a for key, _ in module.named_parameters() for a in left[_join(name, key)]]
            cut = [axis for axis in cut if not axis.whole]
            if cut:
                _over_what_is_left(module, built.get(name), cut[0])
    return model


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _take_scales(module: nn.Module, other: nn.Module) -> None:
    for key, value in list(vars(module).items()):
        new = vars(other).get(key)
        if isinstance(value, float) and isinstance(new, float):
            setattr(module, key, new)
    for key, buffer in module._buffers.items():
        new = other._buffers.get(key)
        if (
            buffer is not None
            and new is not None
            and not buffer.ndim
            and buffer.is_floating_point()
        ):
            module._buffers[key] = new.to(buffer)


def _is_norm(module: nn.Module) -> bool:
    """Nothing but vectors: a norm or a scale, and no layer of another kind."""
    own = list(module.parameters())
    plain = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
    return (
        bool(own)
        and len(list(module.parameters(recurse=False))) == len(own)
        and not isinstance(module, plain)
        and all(one.ndim and one.numel() == max(one.shape) for one in own)
    )


def _over_what_is_left(norm: nn.Module, built: nn.Module | None, axis: Axis) -> None:
    """The norm over the channels that are left, zeros elsewhere."""
    narrow = plain_copy(norm)
    for key, parameter in list(narrow._parameters.items()):
        if parameter is not None and parameter.numel() == axis.size:
            dim = parameter.shape.index(axis.size)
            narrow._parameters[key] = nn.Parameter(parameter.detach().index_select(dim, axis.left))
    others = () if built is None else built.modules()
    for part, other in zip(narrow.modules(), others, strict=False):
        for key, value in list(vars(part).items()):
            new = vars(other).get(key)
            if isinstance(value, (int, tuple)) and type(new) is type(value) and key != "training":
                setattr(part, key, new)

    def forward(x: Tensor, *others: Any, **named: Any) -> Any:
        along = _along(x, axis)

        def cut(value: Any) -> Any:
            fits = isinstance(value, Tensor) and value.ndim > along
            fits = fits and value.ndim > 1 and value.shape[along] == axis.size
            return value.index_select(along, axis.left) if fits else value

        result = narrow(cut(x), *map(cut, others), **{k: cut(v) for k, v in named.items()})
        if not isinstance(result, Tensor) or result.shape[along] != len(axis.left):
            return result
        shape = list(result.shape)
        shape[along] = axis.size
        return result.new_zeros(shape).index_copy(along, axis.left, result)

    norm.forward = forward  # type: ignore[method-assign]


def _along(x: Tensor, axis: Axis) -> int:
    """Along which dimension of an activation the channels stand: where those that went are 0."""
    dims = [dim for dim in (-1, 1, *range(2, x.ndim - 1)) if x.ndim > 1]
    fitting = [dim for dim in dims if x.shape[dim] == axis.size]
    empty = (d for d in fitting if not bool(x.index_select(d, axis.gone).any()))
    return next(empty, fitting[0] if fitting else -1)


class Masked(Precise):
    """While a masked model runs: means, norms and softmaxes are over the channels that are left."""

    def __init__(self, model: nn.Module, left: Left):
        super().__init__()
        cut = [axis for axes in left.values() for axis in axes if not axis.whole]
        self.cut = list({(axis.size, tuple(axis.left.tolist())): axis for axis in cut}.values())
        self.routers = dict(_routers(model, left))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.mean, torch.mean) and _is_last(args, kwargs):
            axis = self._empty(args[0])
            if axis is not None:
                return super().__torch_function__(func, types, args, kwargs) * (
                    axis.size / len(axis.left)
                )
        if func is F.layer_norm:
            axis = self._empty(args[0])
            plain = len(args) < 3 or args[2] is None
            if axis is not None and plain and kwargs.get("weight") is None:
                return self._norm(args, kwargs, axis)
        if func in (torch.softmax, Tensor.softmax, F.softmax):
            axis = self._empty(args[0])
            if axis is not None:
                args = (args[0].index_fill(-1, axis.gone, float("-inf")), *args[1:])
        result = super().__torch_function__(func, types, args, kwargs)
        if func is F.linear and isinstance(args[1], Tensor):
            gone = self.routers.get(args[1].data_ptr())
            if gone is not None and result.shape[-1] > int(gone.max()):
                return result.index_fill(-1, gone, _NEVER)
        return result

    def _empty(self, x: Tensor) -> Axis | None:
        """The cut that an activation's last dimension shows: what went is zero, all else is not."""
        if not isinstance(x, Tensor) or x.ndim < 2 or not x.is_floating_point():
            return None
        fitting = [axis for axis in self.cut if axis.size == x.shape[-1]]
        if not fitting:
            return None
        zero = (x == 0).flatten(0, -2).all(0)
        return next((a for a in fitting if torch.equal(zero.nonzero().flatten(), a.gone)), None)

    def _norm(self, args: Sequence[Any], kwargs: dict[str, Any], axis: Axis) -> Tensor:
        x = args[0]
        narrow = F.layer_norm(x[..., axis.left], (len(axis.left),), eps=kwargs.get("eps", 1e-5))
        return torch.zeros_like(x).index_copy(-1, axis.left, narrow)


def _is_last(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return dim in (-1, (-1,), [-1])


def _routers(model: nn.Module, left: Left) -> Iterator[tuple[int, Tensor]]:
    """Weights that score experts of which some went; beside them, biases say never."""
    tensors, modules = _tensors(model), dict(model.named_modules())
    for name, axes in left.items():
        owner = modules[name.rpartition(".")[0]]
        if len(axes) != 3 or axes[0].whole or isinstance(owner, nn.modules.conv._ConvNd):
            continue
        if min(axes[1].size, axes[2].size) == 1:  # a scale of every channel
            continue
        block = name.rpartition(".")[0].rpartition(".")[0]
        for other, sides in left.items():
            inside = other.startswith(f"{block}.") and len(sides) in (1, 2)
            if inside and sides[0].size == axes[0].size:
                if not torch.equal(sides[0].left, axes[0].left):
                    continue
                if len(sides) == 1:
                    with torch.no_grad():
                        tensors[other].index_fill_(0, axes[0].gone, _NEVER)
                else:
                    yield tensors[other].data_ptr(), axes[0].gone


def _narrowed(inputs: Mapping[str, Any], left: Left) -> Iterator[dict[str, Any]]:
    """The inputs; then with the states of an encoder less the channels that some layer lost."""
    yield dict(inputs)
    states = {k: v for k, v in inputs.items() if k in _STATES and isinstance(v, Tensor)}
    cut = {
        (axis.size, tuple(axis.left.tolist())): axis
        for axes in left.values()
        for axis in axes
        if not axis.whole
    }
    for axis in cut.values():
        for key, value in states.items():
            if value.shape[-1] == axis.size:
                yield {**inputs, key: value.index_select(-1, axis.left)}


def _difference(expected: Sequence[Tensor], got: Sequence[Tensor], left: Left) -> str | None:
    if len(expected) != len(got):
        return f"{len(got)} outputs, the original has {len(expected)}"
    for number, (full, value) in enumerate(zip(expected, got, strict=True)):
        nearest = min((error_of(one, value) for one in _cut_like(full, value, left)), default=None)
        if nearest is None:
            return f"output {number} has shape {list(value.shape)}, {list(full.shape)} before"
        if not nearest <= ALLOWED:
            return f"output {number} is {nearest:.0e} off the masked original"
    return None


def error_of(one: Tensor, other: Tensor) -> float:
    """The relative difference of two tensors of one shape; what is no number in both is alike."""
    both = torch.isnan(one) & torch.isnan(other) | (one == other)
    one, other = one.masked_fill(both, 0.0), other.masked_fill(both, 0.0)
    scale = max(float(other.norm()), float(one.norm()), 1e-30)
    return float((one - other).norm()) / scale if bool((one != other).any()) else 0.0


def _cut_like(full: Tensor, value: Tensor, left: Left) -> list[Tensor]:
    """The original's output at the channels that are left, in all ways that give this shape."""
    if full.ndim != value.ndim:
        return []
    found = [full]
    for dim, (old, new) in enumerate(zip(full.shape, value.shape, strict=True)):
        if old == new:
            continue
        ways = {
            tuple(axis.left.tolist()): axis.left
            for axes in left.values()
            for axis in axes
            if (axis.size, len(axis.left)) == (old, new)
        }
        ways |= {
            tuple(first.tolist()): first  # of a layer whose outputs are several in a row (SEW)
            for axes in left.values()
            for axis in axes
            if axis.size > old and axis.size % old == 0
            if len(first := axis.left[axis.left < old]) == new
        }
        cut = [one.index_select(dim, way) for one in found for way in ways.values()]
        for one in found:
            rows = (one.movedim(dim, 0).reshape(old, -1) != 0).any(1).nonzero().flatten()
            if len(rows) == new:
                cut.append(one.index_select(dim, rows))
        found = cut
    return found
