"""Masked check: the pruned model must equal the original with the removed units at zero.

Shapes cannot show whether the right units were removed. The kept units are found by their values,
which are random and so identify positions, and not by any record of the pruning. In the masked
original, norms run over the kept channels, routers never choose removed experts, and scales that
depend on widths are those of the pruned model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import ConfigSyncError
from ..fieldmap.unit_shares import units_of
from ..forward.observed_pass import PassResult, outputs_in_float64
from ..forward.run_recipe import AXIS, PLAIN, RunRecipe, encoder_states_in, encoder_states_of
from ..model.build import Refusal
from ..model.config_json import FieldPath, field_name
from ..model.fill import fill
from ..model.shapes import shapes
from ..model.surroundings import note_shortage
from ..model.tensors import (
    compute_unsaved,
    is_matrix_stack,
    saved_buffers,
    select,
    tensor,
)
from .layout import Removed, positions_left
from .width_scalars import AsNarrow, CutDim, DualWidth, SizesRead, as_written, take_scales

if TYPE_CHECKING:
    from .layout import Finding, TinyGroup
    from .tiny.tiny_model import TinyModel


EXACT = 1e-9  # largest relative difference at which two float64 outputs count as the same
_NEVER = -1e9  # the score of a removed expert: so low that no router chooses it
# layers that are no norms, even if all of their parameters are vectors
_PROJECTIONS = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
_LENGTHS, _DIRECTIONS = ".original0", ".original1"  # torch.nn.utils.parametrizations.weight_norm


def run_once(model: nn.Module, inputs: Mapping[str, Any], recipe: RunRecipe) -> nn.Module:
    """Return the model after a pass, which may replace modules (BigBird's attention)."""
    with torch.no_grad():
        outputs_in_float64(model, inputs, recipe=recipe)
    return model


def difference_of_pass(
    pruned_run: PrunedPass,
    original: nn.Module,
    reference_build: nn.Module,
    inputs: Mapping[str, Any],
    watched: Sequence[PassResult] = (),
    recipe: RunRecipe = PLAIN,
) -> Refusal | None:
    """Return where the pass of a pruned model differs from the masked original, or None.

    ``reference_build`` is built from the pruned config; only its scales count. ``original`` and
    ``reference_build`` have run before (:func:`run_once`).
    """
    kept = pruned_run.kept
    parameters = original.named_parameters(remove_duplicate=False)
    whole = {id(value): value for name, value in parameters if not any(d.cut for d in kept[name])}

    def masked_outputs(surroundings: AbstractContextManager[Any]) -> list[Tensor]:
        masked = copy.deepcopy(original, dict(whole))  # shares the tensors that are not cut
        take_scales(masked, reference_build)
        _mask(masked, kept)
        _norms_over_kept(masked, kept)
        with torch.no_grad(), _without_removed_experts(masked, kept), surroundings:
            return outputs_in_float64(masked, inputs, watched, recipe)

    mismatch = _first_difference(masked_outputs(nullcontext()), pruned_run.outputs, kept)
    if mismatch is None:
        return None
    # the pass itself may compute a scale from the head dim, which then is no attribute
    narrow = AsNarrow(pruned_run.sizes, chain.from_iterable(kept.values()))
    with as_written(original):
        outputs = masked_outputs(narrow)
    return None if _first_difference(outputs, pruned_run.outputs, kept) is None else mismatch


def _first_difference(
    expected: Sequence[Tensor], actual: Sequence[Tensor], kept: Kept
) -> Refusal | None:
    if len(expected) != len(actual):
        return Refusal(f"{len(actual)} outputs, the original has {len(expected)}")
    for number, (full, value) in enumerate(zip(expected, actual, strict=True)):
        aligned = _aligned(full, value, kept)
        if isinstance(aligned, Refusal):
            return Refusal(f"output {number}: {aligned.reason}")
        full, value = aligned
        error = float((value - full).norm() / full.norm().clamp_min(1e-30))
        if not error <= EXACT:
            return Refusal(
                f"output {number} is {error:.0e} off the original with the removed units masked"
            )
    return None


def _mask(model: nn.Module, kept: Kept) -> None:
    """Set everything of the removed units to zero, in place."""
    with torch.no_grad():
        for name, value in tensors_of(model).items():
            lengths = kept.get(name.removesuffix(_DIRECTIONS) + _LENGTHS, ())
            for axis, dim in enumerate(kept[name]):
                # where a weight norm's length is 0, its direction is kept: zeros have none
                if dim.cut and not (lengths and lengths[axis].cut):
                    value.index_fill_(axis, dim.removed, 0.0)


def _is_norm_or_scale(module: nn.Module) -> bool:
    """True if all parameters of a module are vectors of its channels, and it is no projection."""
    own = list(module.parameters(recurse=False))
    if not own or len(own) < len(list(module.parameters())) or isinstance(module, _PROJECTIONS):
        return False
    has_statistics = any(buffer.numel() > 1 for buffer in saved_buffers(module).values())
    return not has_statistics and all(p.ndim and p.numel() == max(p.shape) for p in own)


def _norms_over_kept(model: nn.Module, kept: Kept) -> None:
    """Make norms run over the kept channels only and return zeros elsewhere, in place."""
    for name, module in model.named_modules():
        if _is_norm_or_scale(module):
            keys = [f"{name}.{key}" if name else key for key, _ in module.named_parameters()]
            cut = next((dim for key in keys for dim in kept[key] if dim.cut), None)
            if cut is not None:
                module.forward = _over_some_channels(_narrow(module, cut.kept), cut)
        elif "norm" in type(module).__name__.lower() and not tensors_of(module):  # RT-DETR's has
            module.forward = _over_some_channels(copy.deepcopy(module), None)


def _narrow(module: nn.Module, positions: Tensor) -> nn.Module:
    """Return a copy of a norm or scale whose vectors have the kept channels only."""
    narrow = copy.deepcopy(module)
    for key, parameter in narrow._parameters.items():
        if parameter is not None and parameter.numel() > 1:
            dim = max(range(parameter.ndim), key=lambda d: parameter.shape[d])
            narrow._parameters[key] = nn.Parameter(parameter.detach().index_select(dim, positions))
    for part in narrow.modules():  # Moonshine's scale holds a norm without weights
        if hasattr(part, "normalized_shape"):
            setattr(part, "normalized_shape", (len(positions),))
    for key, value in vars(narrow).items():  # a group norm with one group for each channel
        if isinstance(value, DualWidth):
            setattr(narrow, key, value.new)
    return narrow


def _over_some_channels(narrow: nn.Module, channels: CutDim | None) -> Callable[..., Any]:
    """Return a forward pass over some channels (None: the non-zero), with zeros elsewhere."""

    def forward(x: Tensor, *others: Any, **named: Any) -> Any:
        if channels is None:
            axis, kept = -1, (x != 0).flatten(0, -2).any(0).nonzero().view(-1)
            if hasattr(narrow, "normalized_shape"):  # a norm without weights (OLMo's)
                setattr(narrow, "normalized_shape", (len(kept),))
        else:
            axis, kept = _channel_axis(x, channels), channels.kept
        width = _long(x, axis)

        def cut(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.ndim < 2 or value.ndim <= axis:
                return value
            return value.index_select(axis, kept) if _long(value, axis) == width else value

        def with_zeros(result: Any) -> Any:
            if not isinstance(result, Tensor) or _long(result, axis) != len(kept):
                return result  # it has no axis of channels
            narrow_last = result.movedim(axis, -1)
            full = F.pad(torch.zeros_like(narrow_last), (0, width - len(kept)))
            return full.index_copy(-1, kept, narrow_last).movedim(-1, axis)

        result = narrow(
            cut(x), *map(cut, others), **{key: cut(value) for key, value in named.items()}
        )
        return tuple(map(with_zeros, result)) if type(result) is tuple else with_zeros(result)

    return forward


def _channel_axis(x: Tensor, channels: CutDim) -> int:
    """Return the axis of the channels: the last, 1 (ConvNeXt), or another (heads)."""
    axes = (-1, 1, *range(2, x.ndim - 1)) if x.ndim > 1 else ()
    fitting = [axis for axis in axes if _long(x, axis) == channels.size]
    # of several axes as long, the one along which the removed channels are zero
    masked = (axis for axis in fitting if not bool(x.index_select(axis, channels.removed).any()))
    return next(masked, fitting[0] if fitting else 1)


def _long(x: Tensor, axis: int) -> int:
    return len(x.movedim(axis, 0))  # not x.shape: that counts as a size which the model reads


@contextmanager
def _without_removed_experts(model: nn.Module, kept: Kept) -> Iterator[None]:
    """Keep routers from choosing removed stacked experts in this context: they score ``_NEVER``."""
    tensors = tensors_of(model)
    cut_stacks = [
        (name.rpartition(".")[0].rpartition(".")[0], kept[name][0])
        for name in tensors
        if is_matrix_stack(model, name) and kept[name][0].cut
    ]
    removed_by_weight: dict[int, Tensor] = {}
    for layer, experts in cut_stacks:
        for name, value in tensors.items():
            inside = name.startswith(f"{layer}.") or not layer
            if not inside or value.ndim not in (1, 2) or kept[name][0].size != experts.size:
                continue
            if torch.equal(kept[name][0].kept, experts.kept):
                if value.ndim == 1:
                    with torch.no_grad():
                        value.index_fill_(0, experts.removed, _NEVER)
                removed_by_weight[value.data_ptr()] = experts.removed

    with _Routers(removed_by_weight):
        yield


class _Routers(TorchFunctionMode):
    """Sets the scores of removed experts to ``_NEVER``, by the address of a router's weight."""

    def __init__(self, removed_by_weight: Mapping[int, Tensor]):
        super().__init__()
        self._removed = removed_by_weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not F.linear:
            return out
        weight = args[1] if len(args) > 1 else (kwargs or {})["weight"]
        removed = self._removed.get(weight.data_ptr()) if weight.ndim == 2 else None
        return out if removed is None else out.index_fill(-1, removed, _NEVER)


def _aligned(full: Tensor, value: Tensor, kept: Kept) -> tuple[Tensor, Tensor] | Refusal:
    """Return an output of the masked original and of the pruned model in one shape."""
    if full.ndim != value.ndim:
        return Refusal(f"shape {list(value.shape)}, the original's has {list(full.shape)}")
    # along a cut axis: positions kept in a tensor dim of the same two sizes, or non-zero channels
    pairs = [(full, value)]
    for axis in range(full.ndim):
        if full.shape[axis] != value.shape[axis]:
            pairs = [shorter for pair in pairs for shorter in _cut_alike(*pair, axis, kept)]
    fitting = [pair for pair in pairs if pair[0].shape == pair[1].shape]
    if not fitting:
        return Refusal(f"shape {list(value.shape)}, unmasked in the original {list(full.shape)}")
    return min(fitting, key=lambda pair: float((pair[0] - pair[1]).norm()))


def _cut_alike(full: Tensor, value: Tensor, axis: int, kept: Kept) -> list[tuple[Tensor, Tensor]]:
    sizes = (full.shape[axis], value.shape[axis])
    choices = {
        tuple(dim.kept.tolist()): dim.kept
        for dim in chain.from_iterable(kept.values())
        if (dim.size, len(dim.kept)) == sizes
    }
    cut = [(full.index_select(axis, positions), value) for positions in choices.values()]
    dense = [
        output.index_select(axis, (rows != 0).any(1).nonzero().view(-1))
        for output in (full, value)
        for rows in (output.movedim(axis, 0).reshape(output.shape[axis], -1),)
    ]
    return [*cut, (dense[0], dense[1])]


Kept = dict[str, tuple[CutDim, ...]]  # the name of every tensor -> one for each dimension


@dataclass(frozen=True)
class PrunedPass:
    kept: Kept
    inputs: dict[str, Any]  # those of the original, without removed channels
    outputs: list[Tensor]  # floating point; watched results last
    sizes: list[tuple[int, ...]]  # that the model read (:class:`SizesRead`)


def pruned_pass(
    original: nn.Module,
    pruned: nn.Module,
    inputs: Mapping[str, Any],
    watched: Sequence[PassResult] = (),
    recipe: RunRecipe = PLAIN,
) -> PrunedPass | Refusal:
    """Run a pruned model; the refusal says which tensor is no cut of ``original``'s random ones."""
    kept = kept_positions(original, pruned)
    if isinstance(kept, Refusal):
        return kept
    pruned_inputs = _cut_inputs(inputs, original, kept, recipe)
    with torch.no_grad(), as_written(pruned), SizesRead() as sizes_read:
        outputs = outputs_in_float64(pruned, pruned_inputs, watched, recipe)
    return PrunedPass(kept, pruned_inputs, outputs, sizes_read.sizes)


def kept_positions(original: nn.Module, pruned: nn.Module) -> Kept | Refusal:
    """Return the kept positions of every tensor, or a ``Refusal`` if one holds anything else."""
    before, after = tensors_of(original), tensors_of(pruned)
    if before.keys() != after.keys():
        return Refusal(f"other tensors: {', '.join(sorted(before.keys() ^ after.keys())[:3])}")
    kept: Kept = {}
    for name, value in before.items():
        cut_dims = cut_dims_of(value, after[name])
        if isinstance(cut_dims, Refusal):
            return Refusal(f"{name} holds {cut_dims.reason}")
        kept[name] = cut_dims
    return kept


def pruned_inputs_of(
    original: nn.Module, pruned: nn.Module, inputs: Mapping[str, Any], recipe: RunRecipe
) -> dict[str, Any] | Refusal:
    """Return the inputs of a pruned model: encoder states lose the removed channels."""
    if encoder_states_of(original, recipe.encoder_states) is None:
        return dict(inputs)
    kept = kept_positions(original, pruned)
    return kept if isinstance(kept, Refusal) else _cut_inputs(inputs, original, kept, recipe)


def _cut_inputs(
    inputs: Mapping[str, Any], original: nn.Module, kept: Kept, recipe: RunRecipe
) -> dict[str, Any]:
    states_input = encoder_states_of(original, recipe.encoder_states)
    states = encoder_states_in(original, inputs, recipe.encoder_states)
    if states_input is None:
        return dict(inputs)
    index = kept[states_input.reader][states_input.dim].kept
    return {**inputs, **{name: value.index_select(AXIS, index) for name, value in states.items()}}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    tensors = dict(model.named_parameters(remove_duplicate=False)) | saved_buffers(model)
    return {name: value.detach() for name, value in tensors.items()}


def cut_dims_of(before: Tensor, after: Tensor) -> tuple[CutDim, ...] | Refusal:
    """Return which positions along each dim pruning kept, found by the tensor's random values."""
    if before.shape == after.shape:
        if not torch.equal(before, after):
            return Refusal("other values than before")
        return tuple(CutDim(size, torch.arange(size)) for size in before.shape)
    if before.ndim != after.ndim:
        return Refusal("other dimensions than before")
    if not before.numel():  # an empty tensor does not show which are kept
        sizes = zip(before.shape, after.shape, strict=True)
        return tuple(CutDim(size, torch.arange(new_size)) for size, new_size in sizes)
    values, order = before.flatten().sort()
    differs = F.pad(values[1:] != values[:-1], (1, 1), value=True)  # from the value before
    unique = differs[1:] & differs[:-1]
    where = torch.searchsorted(values, after.flatten()).clamp(max=len(values) - 1)
    if not torch.equal(values[where], after.flatten()):
        return Refusal("values that the original has not")
    positions = torch.unravel_index(order[where], before.shape)
    certain = unique[where].view(after.shape)
    cut_dims: list[CutDim] = []
    expected = before
    for dim, (size, new_size) in enumerate(zip(before.shape, after.shape, strict=True)):
        if size == new_size:
            cut_dims.append(CutDim(size, torch.arange(size)))
            continue
        origins = positions[dim].view(after.shape).masked_fill(~certain, size)
        kept = origins.movedim(dim, 0).reshape(new_size, -1).amin(1)  # they agree, or it differs
        if not bool((kept.diff() > 0).all()) or bool((kept == size).any()):
            return Refusal("channels in another order")
        expected = expected.index_select(dim, kept)
        cut_dims.append(CutDim(size, kept))
    return tuple(cut_dims) if torch.equal(expected, after) else Refusal("channels of mixed origin")


_BLIND_CUTS = 4  # cuts that change no output, after which no more are tried


def rehearse(tiny: TinyModel, finding: Finding) -> Refusal | None:
    """Cut about half of a tiny width and compare; return why the width cannot be cut, or None.

    A permutation shows that units are interchangeable, but not that the class counts these units:
    with as many heads as dimensions in a head, one dimension of every head looks like one head.
    """
    name = " and ".join(map(field_name, finding.fields))
    blind_cuts, unbuilt = 0, ""
    for values, removed in _cuts(tiny, finding):
        smaller = tiny.field_map.builder.build_unfilled(tiny.field_map.config_at(values))
        if isinstance(smaller, Refusal):
            unbuilt = f": {smaller.reason}"
            continue
        added = min(shapes(smaller).keys() - shapes(tiny.model).keys(), default=None)
        if added is not None:  # Jamba's layers with a single expert have no experts
            unbuilt = f": the class then builds {added} too"
            continue
        outputs = take_weights(smaller, tiny.model, removed) or _outputs(tiny, smaller)
        if isinstance(outputs, Refusal):
            return Refusal(
                f"with a smaller {name}, the class does not compute what remains of the original: "
                f"{outputs.reason}"
            )
        if _is_change(tiny.outputs, outputs):
            return None
        blind_cuts += 1  # only padding of a sound may be left: other cuts may show more
        if blind_cuts == _BLIND_CUTS:
            break
    if blind_cuts:
        return Refusal(
            f"a smaller {name} changes no output of the tiny model, so the outputs do not show "
            "whether the right units were removed"
        )
    return Refusal(
        f"the tiny model cannot be built with a smaller {name}, so pruning it cannot be "
        f"checked{unbuilt}"
    )


def _outputs(tiny: TinyModel, smaller: nn.Module) -> list[Tensor] | Refusal:
    given = (tiny.inputs, tiny.watched, tiny.recipe)
    try:
        run = pruned_pass(tiny.model, smaller, *given)
        if isinstance(run, Refusal):
            return run
        return difference_of_pass(run, tiny.model, smaller, *given) or run.outputs
    except Exception as error:  # a class may stop with any exception
        note_shortage(error)
        text = " ".join(str(error).split())
        return Refusal(f"it does not run: {type(error).__name__}: {text}")


def _is_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """True if a cut changes any output. If it changes none, equal outputs prove nothing."""
    return any(
        old.shape != new.shape or bool((old - new).norm() > EXACT * old.norm())
        for old, new in zip(before, after, strict=True)
    )


_Cut = tuple[dict[FieldPath, int], list[Removed]]


def _cuts(tiny: TinyModel, finding: Finding) -> Iterator[_Cut]:
    """Yield smaller values of a width's fields, nearest to half first, with the units to remove."""
    values, units = tiny.field_map.values, units_of(tiny.field_map, finding.fields)
    for count in sorted(range(finding.minimum, units), key=lambda n: abs(2 * n - units)):
        counts = [(group, count * group.per_field_unit) for group in finding.groups]
        if all(number % group.channel_groups == 0 for group, number in counts):
            smaller = {field: values[field] // units * count for field in finding.fields}
            yield smaller, [_removed(group, number) for group, number in counts]


def _removed(group: TinyGroup, count: int) -> Removed:
    """Return units to remove so that ``count`` random ones remain, equally many in each part."""
    generator = torch.Generator().manual_seed(count)
    size, per_channel_group = group.units // group.channel_groups, count // group.channel_groups
    gone = [
        start + torch.randperm(size, generator=generator)[per_channel_group:]
        for start in range(0, group.units, size)
    ]
    return group.dims, group.units, torch.cat(gone)


def take_weights(new: nn.Module, old: nn.Module, removed: Sequence[Removed] = ()) -> Refusal | None:
    """Copy the kept units into a smaller build, never whole tensors, or say why that fails."""
    kept = positions_left(shapes(old), removed)

    def what_stays(name: str, values: Tensor) -> Tensor:
        return select(values, kept[name]) if name in kept else values

    computed = compute_unsaved(new)
    for name in (name for name in shapes(new) if name in computed):
        if not torch.equal(what_stays(name, old.get_parameter(name)), new.get_parameter(name)):
            return Refusal(
                f"{name} is not saved, and computed from the config it holds other values"
            )
    try:
        fill(new, old, what_stays)
    except ConfigSyncError as error:
        return Refusal(str(error))
    for name, buffer in saved_buffers(new).items():
        cut = what_stays(name, tensor(old, name))
        if cut.shape != buffer.shape:
            return Refusal(f"{name} has {list(cut.shape)}, the class builds {list(buffer.shape)}")
        buffer.copy_(cut)
    return None
