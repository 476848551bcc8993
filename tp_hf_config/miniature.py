"""A tiny copy of a class, for experiments: every mechanism of it, none of its size."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import nn

from .depth import is_numbers
from .fit import value_at
from .heads import Layout, observe
from .images import crops, smaller_images
from .inputs import example_inputs, input_forms, second_sample, text_inputs
from .learn import ConfigMap, learn
from .lighter import in_proportion, lighter
from .passes import AllFloat64, Result, tensors_in, watched_results
from .reference import Builder, FieldPath, Refusal, shapes, with_values
from .states import states_in
from .ties import saved_buffers

_FEW = 8
_HEAD_DIM = 16
_ROWS = 2048
_EXPERTS = (4, 8, 16, 32)
_LONG_TEXT = 32
_TOKEN = ("_token_id", "_token_index")
_PLACES = ("image", "video", "audio", "vision")
_LADDERS: tuple[tuple[int | None, tuple[int, ...]], ...] = (
    (_FEW, (4, 2, 3, 6, 8)),
    (63, (4, 6, 8, 12, 16)),
    (None, (16, 24, 32, 40, 48, 64, 96, 128)),
)


@dataclass(frozen=True)
class Miniature:
    """A class at tiny widths.

    Attributes:
        known: the map of the class around the tiny config.
        model: the class with random weights, none of them trivial, in float64 and eval mode.
        inputs: keyword arguments of one forward pass of two samples.
        partial: it runs on text alone, though the class takes images or sound too.
        watched: what counts as an output beside the outputs: of parts that run without any.
    """

    known: ConfigMap
    model: nn.Module
    inputs: dict[str, Any]
    partial: bool = False
    watched: tuple[Result, ...] = ()

    @property
    def states(self) -> dict[str, torch.Tensor]:
        """The states of an encoder among the inputs: units stand along them too."""
        return states_in(self.model, self.inputs)


def miniature(known: ConfigMap) -> Miniature | Refusal:
    """Make every width that a class lets shrink small, and see that the model still runs.

    Where it does not, some widths have to stay equal to each other: those go together then.
    """
    found: list[Miniature | Refusal] = []
    for together in (False, True):
        made = _build(known, _shrunken(known, _small_tokens(known.depth.data), together))
        if isinstance(made, Miniature) and not made.partial:
            return made
        found.append(made)
    return next((one for one in found if isinstance(one, Miniature)), found[-1])


def _build(known: ConfigMap, data: dict[str, Any]) -> Miniature | Refusal:
    """The class at these widths with random weights, if it runs."""
    builder = known.builder
    full = builder.build(data)
    if isinstance(full, Refusal):
        return full
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = builder.build_real(data)
        if isinstance(model, Refusal):
            return model
        randomise(model)
        working = _working_inputs(model)
        if isinstance(working, Refusal):
            return working
        inputs, partial = working
        data, model = _with_layers_named(builder, data, model, inputs)
        full = builder.build(data)
    if isinstance(full, Refusal):
        return full
    around = learn(builder, builder.config(data), full, all_set=True)
    watched = () if partial else watched_results(model, inputs)
    return Miniature(around, model, inputs, partial, watched)


def _with_layers_named(
    builder: Builder, data: dict[str, Any], model: nn.Module, inputs: dict[str, Any]
) -> tuple[dict[str, Any], nn.Module]:
    """The config and its class, lists of layers naming those that are left, if more is reached.

    What Qwen3-VL has beside its layers 8, 16 and 24 would never run in a copy of two layers.
    """
    unreached = _unreached(model, inputs)
    for path, length in _numbers_of_layers(data) if unreached else ():
        named: dict[FieldPath, Any] = {path: list(range(length))}
        trial = with_values(data, named)
        other = builder.build_real(trial)
        if isinstance(other, Refusal) or shapes(other) != shapes(model):
            continue
        randomise(other)
        if why_not(other, inputs) is None and _unreached(other, inputs) < unreached:
            data, model, unreached = trial, other, _unreached(other, inputs)
    return data, model


def _numbers_of_layers(node: Any, path: FieldPath = ()) -> Iterator[tuple[FieldPath, int]]:
    """Lists in a config that can name layers by their numbers, and how long they are."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if is_numbers(value):
            yield (*path, key), len(value)
        yield from _numbers_of_layers(value, (*path, key))


def _working_inputs(model: nn.Module) -> tuple[dict[str, Any], bool] | Refusal:
    """Inputs of two samples with which the model runs, and whether it is text alone.

    Three tokens come last: there may be few positions. Before text alone, states of an encoder are
    left out.
    """
    first = example_inputs(model)  # it went furthest without data
    forms = chain([first], input_forms(model), islice(input_forms(model, length=3), 1))
    states = states_in(model, first)
    bare = [{name: value for name, value in first.items() if name not in states}] if states else []
    text = text_inputs(model)
    reason = ""
    for form, partial in chain(((form, False) for form in chain(forms, bare)), ((text, True),)):
        stopped = "" if form is None else why_not(model, inputs := second_sample(form))
        if form is not None and stopped is None:
            return _reaching(model, inputs), partial
        reason = reason or stopped or ""
    return Refusal(f"the tiny copy does not run: {reason}")


def _reaching(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """These inputs, or a longer text where that reaches more of the model.

    No token of a short one may go to some expert; Transformers 4 keeps each as layers of its own.
    """
    unreached = _unreached(model, inputs)
    if unreached and "input_ids" in inputs:
        longer = second_sample(example_inputs(model, length=_LONG_TEXT))
        alike = longer.keys() == inputs.keys() and why_not(model, longer) is None
        if alike and _unreached(model, longer) < unreached:
            return longer
    return inputs


def _unreached(model: nn.Module, inputs: dict[str, Any]) -> int:
    """How many parameters the outputs do not depend on."""
    with AllFloat64():
        outputs = [tensor for tensor in tensors_in(model(**inputs)) if tensor.requires_grad]
    total = torch.stack([tensor.sum() for tensor in outputs]).sum()
    grads = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    return sum(grad is None for grad in grads)


def why_not(model: nn.Module, inputs: dict[str, Any]) -> str | None:
    """What a forward pass breaks off with; ``None``: it does not."""
    try:
        with torch.no_grad(), AllFloat64():
            model(**inputs)
    except Exception as error:  # whatever a class's forward pass raises
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


def _shrunken(known: ConfigMap, data: dict[str, Any], together: bool) -> dict[str, Any]:
    """Lower one field after the other, as long as the class builds and runs as far as before."""
    base = known.builder.build(data)
    if isinstance(base, Refusal):
        return data
    unshrunken, before = shapes(base), observe(base)
    several = _several_per_unit(known)
    data = with_values(data, {path: known.sizes[path] for path in known.unset})
    counts = {split[0] for splits in before.heads.values() for split in splits}
    parts = {_part(path) for path in known.count_fields()}
    splitting = known.count_fields() | {p for p, size in known.sizes.items() if size in counts}
    heads = known.count_fields() | {path for path in splitting if _part(path) not in parts}

    def seen(trial: dict[str, Any]) -> Layout | None:
        model = known.builder.build(trial)
        if isinstance(model, Refusal):
            return None
        built = shapes(model)
        if built.keys() != unshrunken.keys() or _single(unshrunken, built):
            return None
        if not _still_several(several, trial, built) or not _ties_alike(model, built):
            return None
        layout = observe(model)
        return layout if _alike(before, layout) else None

    def runs(trial: dict[str, Any]) -> bool:
        return seen(trial) is not None

    data = next(filter(runs, smaller_images(known, data)), data)
    data = in_proportion(known, data, seen)
    for path in sorted(known.sizes, key=lambda path: known.sizes[path]):
        changes = _smaller(known, data, path, heads, splitting, together)
        trials = (with_values(data, {**one, **crops(data, one)}) for one in changes)
        fitting: Iterator[dict[str, Any]] = filter(runs, trials)
        if _stacked(known, path):  # room for a router first: it runs with half of the experts too
            every = list(fitting)
            halves = [with_values(one, {path: _get(one, path) // 2}) for one in every]
            roomy = (one for one, half in zip(every, halves, strict=True) if runs(half))
            fitting = chain(roomy, every)
        data = next(fitting, data)
    matrices = (shape for shape in known.shapes.values() if len(shape) == 3 and 1 not in shape)
    return lighter(known, data, max((shape[0] for shape in matrices), default=0), seen)


def _several_per_unit(known: ConfigMap) -> list[tuple[str, int, FieldPath]]:
    """Dimensions in which a unit of some field holds several positions, and that field.

    With one position a unit, the tiny copy could not show in which order they stand.
    """
    return [
        (name, dim, path)
        for (name, dim), expression in known.expressions.items()
        if isinstance(dim, int)
        for path in expression.fields
        if expression.terms.get(frozenset({path}), 0) > 1
    ]


def _still_several(
    several: Sequence[tuple[str, int, FieldPath]],
    data: dict[str, Any],
    built: dict[str, tuple[int, ...]],
) -> bool:
    return all(
        built[name][dim] > _get(data, path)
        for name, dim, path in several
        if name in built and dim < len(built[name])
    )


def _single(before: dict[str, tuple[int, ...]], built: dict[str, tuple[int, ...]]) -> bool:
    """Whether a dimension shrank to 1: attention over one patch of an image shows nothing."""
    return any(1 in built[name] and built[name].count(1) > before[name].count(1) for name in built)


def _ties_alike(model: Any, built: dict[str, tuple[int, ...]]) -> bool:
    """Whether tied weights are alike: Marian's decoder counts its tokens by two fields."""
    model.tie_weights()
    return shapes(model) == built


def _alike(before: Layout, after: Layout) -> bool:
    """Whether a forward pass goes as far, over heads wide enough for all that is in them.

    A head of two dimensions has no partial rotary embedding any more, and attention over a single
    token (of an image that is too small) is the same whatever its queries are.
    """
    if after.steps < before.steps or (before.ended and not after.ended):
        return False
    if after.alone > before.alone:
        return False
    for layer, splits in before.heads.items():
        now = after.heads.get(layer, ())
        if len(now) != len(splits):
            return False
        if any(new[-1] < min(old[-1], _HEAD_DIM) for new, old in zip(now, splits, strict=True)):
            return False
    return True


def _smaller(
    known: ConfigMap,
    data: dict[str, Any],
    path: FieldPath,
    counts: Collection[FieldPath],
    splitting: Collection[FieldPath],
    together: bool,
) -> Iterator[dict[FieldPath, int]]:
    """Smaller values of a field, alone (but if ``together``) and with all fields equal to it.

    Values that no other field has come first, so that what is different stays different; small
    numbers take no others, but those of heads (``counts``), as long as there are more query heads
    than key/value heads where there were.  Last, fewer of what may count heads (``splitting``) with
    the width that they split.
    """
    if path in known.linked:
        return
    value = _get(data, path)
    if value <= _ROWS and _only_rows(known, path):
        return  # positions or distances: a forward pass may look up any of them
    heads = path in counts
    stacked = _stacked(known, path)
    few = value <= _FEW or heads
    ladder = next(steps for limit, steps in _LADDERS if few or limit is None or value <= limit)
    if stacked:  # of fewer experts a router would take all
        ladder = _EXPERTS
    elif heads and value % 2 == 0:  # several may go in proportion (Whisper's encoder, decoder)
        ladder = tuple(step for step in ladder if step % 2 == 0)
    followers = [other for other, leader in known.linked.items() if leader == path]
    current = {other: _get(data, other) for other in known.sizes}
    equals = [
        other for other, size in current.items() if size == value and (other in counts) == heads
    ]
    taken = {size for size in current.values() if size != value}
    fresh = [step for step in ladder if step < value and step not in taken]
    if heads:
        taken_too = [step for step in ladder if step in taken - _beside(data, path, counts)]
    else:
        taken_too = [] if few else [step for step in ladder if step in taken]
    used = [step for step in taken_too if step < value]
    for step in fresh + used:
        alone = dict.fromkeys([path, *followers], step)
        with_equals = dict.fromkeys([path, *followers, *equals], step)
        if heads and len(equals) > 1:  # as many query heads as key/value heads stay as many
            yield with_equals
        if not together or len(equals) == 1:
            yield alone
        if not heads and len(equals) > 1:
            yield with_equals
    if not heads:
        yield from _with_heads(data, [path, *followers, *equals], value, splitting)


def _part(path: FieldPath) -> FieldPath:
    """The nested config that a field stands in."""
    return path[:-2] if isinstance(path[-1], int) else path[:-1]


def _beside(data: dict[str, Any], path: FieldPath, counts: Collection[FieldPath]) -> set[int]:
    """Other numbers of heads in the same part of the config."""
    beside = {_get(data, other) for other in counts if _part(other) == _part(path)}
    if isinstance(path[-1], int):  # stages
        beside |= {_get(data, (*path[:-1], place)) for place in range(path[-1] + 1)}
    return beside - {_get(data, path)}


def _with_heads(
    data: dict[str, Any], widths: list[FieldPath], value: int, counts: Collection[FieldPath]
) -> Iterator[dict[FieldPath, int]]:
    """Fewer heads of the same width (rotary sections may fix it), and all widths with them."""
    for path in counts:
        number = _get(data, path)
        if value % number:
            continue
        taken = _beside(data, path, counts)
        for step in sorted(_LADDERS[0][1]):
            if step < number and step % 2 <= number % 2 and step not in taken:
                yield {**dict.fromkeys(widths, value * step // number), path: step}


def _only_rows(known: ConfigMap, path: FieldPath) -> bool:
    """Whether a field sets nothing but the number of entries of embeddings."""
    model = known.unpruned
    places = [place for place, one in known.expressions.items() if path in one.fields]
    return (
        bool(places)
        and not isinstance(model, Refusal)
        and all(
            dim == 0 and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)
            for name, dim in places
        )
    )


def _stacked(known: ConfigMap, path: FieldPath) -> bool:
    """Whether a field counts weights that are stacked in one tensor (experts)."""
    return any(
        path in expression.fields and dim == 0 and len(known.shapes[name]) == 3
        for (name, dim), expression in known.expressions.items()
    )


def _get(data: Any, path: FieldPath) -> int:
    return int(value_at(data, path))


def _small_tokens(data: dict[str, Any]) -> dict[str, Any]:
    """Special tokens in the first few of the vocabulary, so that the vocabulary can be small."""

    def visit(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        return {
            key: 1
            if key.endswith(_TOKEN) and isinstance(value, int) and value > 2
            else visit(value)
            for key, value in node.items()
        }

    result: dict[str, Any] = visit(data)
    places = [k for k in result if k.startswith(_PLACES) and k.endswith(_TOKEN)]
    result.update({key: 3 + number for number, key in enumerate(places)})  # each another
    return result


def randomise(model: nn.Module) -> None:
    """Random values for every parameter and saved buffer, none of them trivial."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(True)  # fixed position tables have dimensions too
            noise = torch.randn_like(parameter)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.3 * noise)

        for buffer in saved_buffers(model).values():
            buffer.mul_(1 + 0.3 * torch.rand_like(buffer))  # a variance stays above 0
            buffer.add_(0.3 * torch.rand_like(buffer))
