"""Build the tiny model of a class, with every mechanism of it."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial, wraps
from itertools import combinations
from typing import Any, TypeVar

import torch
from torch import nn

from ...fieldmap.field_map import FieldMap
from ...fieldmap.layer_kinds import is_whole_number_list, may_name_layers
from ...fieldmap.learn_field_map import learn
from ...forward.coverage import WorkingInputs, forward_error, unreached_by, working_inputs
from ...forward.observed_pass import (
    AllFloat64,
    PassResult,
    followed_buffers,
    outputs_in_float64,
    watched_results,
)
from ...forward.output_tensors import outputs_of, tensors_in
from ...forward.replay import Replay
from ...forward.run_recipe import RunRecipe, encoder_states_in
from ...model.build import Refusal
from ...model.config_json import (
    OF_NO_EFFECT,
    FieldPath,
    plain_fields,
    with_values,
    without_names,
)
from ...model.shapes import shapes
from ...model.surroundings import same_random_state
from ...model.tensors import compute_unsaved, saved_buffers
from ..twin_test import Proof, TwinTest
from .compute_budget import with_smaller_inputs
from .shrink import shrunken, small_tokens

_LAYERS = 2  # the tiny model has at least this many layers of a kind
_DRAWS = 40  # how often other weights are drawn, so that all of many alike parts are reached
_NO_CHANCE = 4  # if the same parts are left out this often in a row, it is not by chance
_OTHER_ATTENTION = "sdpa"  # the attention to use where eager attention computes NaN
_NAMING = ("layer", "index")  # words in the names of settings that name layers


@dataclass(frozen=True)
class TinyRun:
    model: nn.Module  # random weights, none of them trivial, in float64 and eval mode
    inputs: dict[str, Any]  # of one forward pass of two samples
    partial: bool = False  # it runs on text alone, though the class takes images or sound too
    watched: tuple[PassResult, ...] = ()  # results that count as outputs: no output uses them


@dataclass(frozen=True, eq=False)
class TinyModel:
    """A class at tiny widths; built when it is first run, and learned when that is asked for."""

    learned: Callable[[], FieldMap]  # around the tiny config
    full_field_map: FieldMap  # around the config that the tiny one was made from
    build: Callable[[], TinyRun]  # called once
    answers: dict[Any, Any] = field(default_factory=dict)  # of experiments; see :func:`once`

    @property
    def field_map(self) -> FieldMap:
        return self.learned()

    @cached_property
    def run(self) -> TinyRun:
        return self.build()

    @cached_property
    def _replay(self) -> Replay:
        return Replay(self.model, self.watched)

    @cached_property
    def _proofs(self) -> dict[Proof, bool]:  # shared by all fields: they share groups
        return {}

    @cached_property
    def _followed(self) -> frozenset[str]:
        return followed_buffers(self.model, self.inputs, self.watched, self.recipe)

    @cached_property
    def outputs(self) -> list[torch.Tensor]:
        """The floating point outputs of a pass, watched results last; without a graph."""
        outputs = outputs_in_float64(self.model, self.inputs, self.watched, self.recipe)
        return [output.detach().requires_grad_(output.requires_grad) for output in outputs]

    @cached_property
    def equal_by_chance(self) -> frozenset[frozenset[FieldPath]]:
        return equal_by_chance(self.field_map, self.full_field_map)

    @property
    def model(self) -> nn.Module:
        return self.run.model

    @property
    def inputs(self) -> dict[str, Any]:
        return self.run.inputs

    @property
    def partial(self) -> bool:
        return self.run.partial

    @property
    def watched(self) -> tuple[PassResult, ...]:
        return self.run.watched

    @property
    def encoder_states(self) -> dict[str, torch.Tensor]:
        return encoder_states_in(self.model, self.inputs, self.recipe.encoder_states)

    @property
    def recipe(self) -> RunRecipe:
        return self.field_map.recipe

    def test(
        self, units: int, runs: Sequence[int] = (1,), model: nn.Module | None = None
    ) -> TwinTest:
        """Return the experiments on a width of ``units`` units, with this or another build."""
        given = (units, runs, self.watched, self.recipe)
        if model is not None:
            return TwinTest(model, self.inputs, *given)
        remembered = (self._replay, self._proofs, self.outputs, self._followed)
        return TwinTest(self.model, self.inputs, *given, *remembered)


def equal_by_chance(field_map: FieldMap, full: FieldMap) -> frozenset[frozenset[FieldPath]]:
    """Return the pairs of fields that are equal only in the tiny model, which has few values."""
    widths = [field for field in field_map.values if field in full.values]
    return frozenset(
        frozenset(pair)
        for pair in combinations(widths, 2)
        if field_map.values[pair[0]] == field_map.values[pair[1]]
        and full.values[pair[0]] != full.values[pair[1]]
    )


_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")
_Experiment = Callable[[_Item, TinyModel], _Answer]


def once(experiment: _Experiment[_Item, _Answer]) -> _Experiment[_Item, _Answer]:
    """Run an experiment once for each group or field of a tiny model, and cache its answer."""

    @wraps(experiment)
    def remembered(item: _Item, tiny: TinyModel) -> _Answer:
        key = experiment.__name__, item
        if key not in tiny.answers:
            tiny.answers[key] = experiment(item, tiny)
        answer: _Answer = tiny.answers[key]
        return answer

    return remembered


def tiny_model(field_map: FieldMap) -> TinyModel | Refusal:
    """Build the tiny model of a class, with every width as small as the class accepts."""
    candidates: list[TinyModel | Refusal] = []
    for together in (False, True):  # some widths may have to remain equal
        tiny = built_tiny_model(field_map, shrunken(field_map, small_tokens(field_map), together))
        if isinstance(tiny, TinyModel) and not tiny.partial:
            return tiny
        candidates.append(tiny)
    return next(
        (candidate for candidate in candidates if isinstance(candidate, TinyModel)), candidates[-1]
    )


def stored_tiny_model(tiny_map: FieldMap, full: FieldMap) -> TinyModel:
    """Return a tiny model whose field map was read from the cache; built anew only if it is run."""

    def build() -> TinyRun:
        tiny = tiny_model(full)
        if isinstance(tiny, Refusal):  # it ran when the cache was written
            raise RuntimeError(
                f"the tiny model of {full.builder.model_class.__name__}: {tiny.reason}"
            )
        return tiny.run

    return TinyModel(lambda: tiny_map, full, build)


_built: OrderedDict[tuple[Any, ...], TinyModel | Refusal] = OrderedDict()
_MOST_BUILT = 8  # tiny models that are kept: configs of many sizes and after each step share them


def built_tiny_model(field_map: FieldMap, data: dict[str, Any]) -> TinyModel | Refusal:
    """Return the class built from a config with random weights, and inputs with which it runs."""
    builder = field_map.builder
    key = (
        builder.model_class,
        repr(sorted(builder.options.items())),
        repr(field_map.recipe),
        repr(without_names(data, OF_NO_EFFECT)),
        *field_map.depth.entry_names,
    )
    if key not in _built:
        _built[key] = _run_tiny_model(field_map, data)
        while len(_built) > _MOST_BUILT:
            _built.popitem(last=False)
    _built.move_to_end(key)
    tiny = _built[key]
    return tiny if isinstance(tiny, Refusal) else replace(tiny, full_field_map=field_map)


def _run_tiny_model(field_map: FieldMap, data: dict[str, Any]) -> TinyModel | Refusal:
    builder = field_map.builder
    full = builder.build(data)
    if isinstance(full, Refusal):
        return full
    recipe = with_smaller_inputs(full, field_map.recipe)
    run_map = field_map if recipe == field_map.recipe else replace(field_map, recipe=recipe)
    with same_random_state(0):
        model = builder.build_real(data)
        if isinstance(model, Refusal):
            return model
        randomise(model)
        working = working_inputs(model, recipe)
        data, model, working = _with_layers_named(run_map, data, model, working)
        if isinstance(working, Refusal):
            return working
        scale_convolutions(model, working.inputs, working.recipe)
        working = _reaching_alike(model, working)
        model, recipe = _with_numbers(field_map, data, model, working)
        builder = builder.with_attention(recipe.attention)
        full = builder.build(data)
    if isinstance(full, Refusal):
        return full
    config, entries = builder.config(data), field_map.depth.entries
    learned = cache(partial(learn, builder, config, full, True, recipe, entries=entries))
    watched = () if working.partial else watched_results(model, working.inputs, recipe)
    run = TinyRun(model, working.inputs, working.partial, watched)
    return TinyModel(learned, field_map, lambda: run)


def _reaching_alike(model: nn.Module, working: WorkingInputs) -> WorkingInputs:
    """Draw other weights if chance left out some of many alike parts; return what runs then."""
    # a token takes the best of Switch's eight experts, and some may be best for none
    unreached = _unreached_shares(model, working)
    if not 0 < max(unreached.values(), default=0) < 0.5:
        return working
    before, same = copy.deepcopy(model.state_dict()), 0
    for _ in range(_DRAWS):
        randomise(model, matrices_only=True)
        scale_convolutions(model, working.inputs, working.recipe)
        redrawn = working_inputs(model, working.recipe)
        still = unreached if isinstance(redrawn, Refusal) else _unreached_shares(model, redrawn)
        if not isinstance(redrawn, Refusal) and not still:
            return redrawn
        same = same + 1 if still == unreached else 0
        if same == _NO_CHANCE:
            break
    model.load_state_dict(before)
    return working


def _unreached_shares(model: nn.Module, working: WorkingInputs) -> dict[str, float]:
    """Return name with ``*`` for its last number -> the share not reached, if it is not all."""
    alike = Counter(_numbered(name) for name, _ in model.named_parameters())
    unreached = Counter(map(_numbered, unreached_by(model, working.inputs, working.recipe)))
    return {name: n / alike[name] for name, n in unreached.items() if n < alike[name]}


def _numbered(name: str) -> str:
    return re.sub(r"\d+(?=\D*$)", "*", name)


def _with_numbers(
    field_map: FieldMap, data: dict[str, Any], model: nn.Module, working: WorkingInputs
) -> tuple[nn.Module, RunRecipe]:
    """Return the model and its recipe, with another attention if eager attention computes NaN."""
    if _computes_numbers(model, working):
        return model, working.recipe
    # Nemotron's streaming encoder masks everything in eager attention
    rebuilt = field_map.builder.with_attention(_OTHER_ATTENTION).build_real(data)
    if not isinstance(rebuilt, Refusal):
        rebuilt.load_state_dict(model.state_dict())
        stops = forward_error(rebuilt, working.inputs, working.recipe) is not None
        if not stops and _computes_numbers(rebuilt, working):
            return rebuilt, replace(working.recipe, attention=_OTHER_ATTENTION)
    return model, working.recipe


def _computes_numbers(model: nn.Module, working: WorkingInputs) -> bool:
    with torch.no_grad(), AllFloat64():
        outputs = tensors_in(outputs_of(model, working.inputs, working.recipe))
        return not any(output.isnan().any() for output in outputs)


def _with_layers_named(
    field_map: FieldMap, data: dict[str, Any], model: nn.Module, working: WorkingInputs | Refusal
) -> tuple[dict[str, Any], nn.Module, WorkingInputs | Refusal]:
    """Return the config, the model, and what it runs with; other layers are named if they help."""
    # a model of two layers would not run the modules beside Qwen3-VL's layers 8, 16 and 24, and has
    # no layer 6 for VipLLaVA to read
    unreached = _unreached_count(model, working)
    for named in _numbers_of_layers(field_map, data) if unreached else ():
        trial = with_values(data, named)
        on_meta = field_map.builder.build(trial)
        if isinstance(on_meta, Refusal) or shapes(on_meta) != shapes(model):
            continue
        other = field_map.builder.build_real(trial)
        if isinstance(other, Refusal):
            continue
        randomise(other)
        other_working = working
        if isinstance(working, Refusal) or working.partial:
            other_working = working_inputs(other, field_map.recipe)
        still_unreached = _unreached_count(other, other_working)
        if still_unreached < unreached:
            data, model, working, unreached = trial, other, other_working, still_unreached
    return data, model, working


def _unreached_count(model: nn.Module, working: WorkingInputs | Refusal) -> float:
    """Return how many parameters no output depends on; infinity if the model does not run."""
    if isinstance(working, Refusal):
        return math.inf
    if forward_error(model, working.inputs, working.recipe) is not None:
        return math.inf
    return len(unreached_by(model, working.inputs, working.recipe))


def _numbers_of_layers(field_map: FieldMap, data: dict[str, Any]) -> Iterator[dict[FieldPath, Any]]:
    """Yield changes after which lists and numbers that can name layers name the tiny model's."""
    numbers: dict[str, list[FieldPath]] = {}

    for entry, value in plain_fields(data):
        key = str(entry[-1])
        names_layers = any(word in key for word in _NAMING)
        if may_name_layers(value) or (names_layers and is_whole_number_list(value)):
            yield {entry: list(range(len(value)))}
            yield {entry: [index % _LAYERS for index in range(len(value))]}
            yield {entry: [_LAYERS - 1] * len(value)}
        elif names_layers and type(value) is int:
            # both are set if the config passes it on to one of its parts (MiniCPM-V 4.6)
            numbers.setdefault(key, []).append(entry)
            if entry not in field_map.non_size_fields | field_map.sizes:
                yield {entry: 0}
    for paths in numbers.values():
        if len(paths) > 1:
            yield dict.fromkeys(paths, 0)


_LARGEST = 4.0  # the values of a convolution have at most this root mean square


def randomise(model: nn.Module, matrices_only: bool = False) -> None:
    """Give every parameter and saved buffer random values, none of them trivial, in place."""
    # loading computes these again, with other values for another width (Marian's positions)
    unsaved = compute_unsaved(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(True)  # also fixed position tables: they have dimensions too
            if name in unsaved:
                continue
            if parameter.ndim > 1:
                parameter.copy_(_matrix(model, name, parameter))
            elif not matrices_only:
                parameter.add_(0.3 * torch.randn_like(parameter))

        for buffer in () if matrices_only else saved_buffers(model).values():
            buffer.mul_(1 + 0.3 * torch.rand_like(buffer))  # a variance remains positive
            buffer.add_(0.3 * torch.rand_like(buffer))


def _matrix(model: nn.Module, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Return random values for a matrix, divided by the square root of its fan-in."""
    # convolutions are scaled later, but the model runs before: VITS took 100 s with larger weights
    layer, fan_in = model.get_submodule(name.rpartition(".")[0]), parameter.shape[-1]
    if isinstance(layer, nn.modules.conv._ConvNd):
        fan_in = math.prod(parameter.shape[2:]) * parameter.shape[0 if layer.transposed else 1]
    spread: float = fan_in**0.5
    return torch.randn_like(parameter) / spread


def scale_convolutions(model: nn.Module, inputs: dict[str, Any], recipe: RunRecipe) -> None:
    """Scale convolutions so that values neither grow nor fade from one to the next, in place.

    Convolutions have no norms between them, or batch norms, which do not divide by their input's
    spread here: values would reach 1e17 (DETR) and hide what attention adds. Each weight is divided
    by the :func:`_level` of its output on these inputs, in the order of a pass, as in
    layer-sequential unit-variance initialisation (Mishkin and Matas,
    https://arxiv.org/abs/1511.06422).
    """
    scaled: set[int] = set()

    def scale(layer: nn.modules.conv._ConvNd, _: Any, output: torch.Tensor) -> torch.Tensor:
        if "weight" not in layer._parameters or id(layer.weight) in scaled:
            return output  # computed from others, as by a weight norm; or shared, and scaled before
        scaled.add(id(layer.weight))
        bias = torch.zeros(()) if layer.bias is None else layer.bias
        bias = bias.reshape(-1, *[1] * (output.ndim - 2))
        level = _level(output - bias)
        layer.weight.div_(level)
        return (output - bias) / level + bias

    layers = [m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    if not layers:
        return
    with _attributes_kept(model):
        for layer in layers:
            layer.register_forward_hook(scale)
        forward_error(model, inputs, recipe)


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    # classes install hooks as they run, and set a flag for it: both are undone, as is ``scale``
    before = [
        (module, {k: copy.copy(v) if isinstance(v, dict) else v for k, v in vars(module).items()})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


def _level(output: torch.Tensor) -> float:
    """Return how much the output of a convolution differs from sample to sample."""
    differing = (output - output.mean(dim=0, keepdim=True)).square().mean().sqrt()
    # if samples hardly differ (means over an image), large values would saturate the next gates
    level = float(torch.maximum(differing, output.square().mean().sqrt() / _LARGEST))
    return level if 0 < level < math.inf else 1.0
