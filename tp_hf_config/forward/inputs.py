"""Make small example inputs for any Hugging Face model, from its forward signature and config.

Arguments have the same names all over Transformers, but not the same shapes: :func:`input_forms`
yields the known shapes, likely ones first.

Masks, grids and sizes have shapes that are derived from those of other arguments. Without some
optional arguments parts of a model do not run: global attention, entities beside the words, a voice
before the text. The class has weights that no other input reaches.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import chain, islice
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import UnsupportedModelError, in_one_line
from ..model.meta_run import NoValues
from ..model.surroundings import note_shortage
from .input_shapes import (
    MAIN,
    PIXELS,
    REQUIRED,
    TOWERS,
    Shape,
    channels_of,
    crops_of,
    grid_of,
    held_by,
    patch_of,
    side_of,
    size_of,
)
from .output_tensors import tensors_in
from .run_recipe import PLAIN, STATES, MakeInputs, RunRecipe, random_encoder_states

Form = Mapping[str, Shape]  # argument -> its chosen shape
# argument's shape from config and form; None: leave it out
Companion = Callable[[Any, Form], Shape | None]
Inputs = Mapping[str, Any]
# model and its other inputs -> arguments to add
MakeOptional = Callable[[nn.Module, Inputs], dict[str, Any]]


def _values(*numbers: int) -> Shape:
    return Shape((1, len(numbers)), "values", numbers)


def _beside(name: str, make: Callable[[Any, Shape], Shape | None]) -> Companion:
    return lambda config, form: make(config, form[name]) if name in form else None


def _like(name: str, what: Literal["numbers", "ones", "mask", "ids"]) -> Companion:
    """Give the argument the shape of the argument ``name``, filled with ``what``."""
    return _beside(name, lambda config, other: Shape(other.size, what))


def _steps_of(*names: str, what: Literal["mask", "no padding"] = "mask") -> Companion:
    """Make a mask over the time steps of the first of these arguments that is given."""

    def companion(config: Any, form: Form) -> Shape | None:
        steps = next((form[name].steps for name in names if name in form), 0)
        return Shape((1, steps), what) if steps else None

    return companion


def _whole_grid(config: Any, form: Form) -> Shape:
    return _values(1, grid_of(config), grid_of(config))


def _flat_grid(config: Any, form: Form) -> Shape:
    return _values(grid_of(config), grid_of(config))


def _merge(config: Any, form: Form) -> Shape:
    return Shape((1,), "values", (grid_of(config) // 2,))


def _pools(config: Any, images: Shape) -> Shape:
    """For each of four tokens, the indices of the patches that are pooled into it."""
    patches = prod(images.size[:-1])
    return Shape((4, 4), "values", tuple(number % patches for number in range(16)))


def _image_sizes(config: Any, form: Form) -> Shape | None:
    if "image_pixel_values" in form:
        return _values(*form["image_pixel_values"].size[-2:])
    if "pixel_values" not in form:
        return None
    crops = crops_of(config)
    return _values(*(crops[1] if crops else form["pixel_values"].size[-2:]))


def _pixel_mask(config: Any, images: Shape) -> Shape | None:
    return Shape(images.size[:2], "mask") if len(images.size) in (3, 5) else None


def _patch_mask(config: Any, crops: Shape) -> Shape:
    (_, height, width), (rows, columns) = patch_of(config), crops.size[-2:]
    return Shape((*crops.size[:2], rows // height, columns // width), "ids")


def _places(config: Any, images: Shape) -> Shape:
    side = grid_of(config)
    rows = [number for y in range(side) for x in range(side) for number in (x, y)]
    return Shape((1, side * side, 2), "values", tuple(rows))


def _high_res(config: Any, images: Shape) -> Shape:
    part = getattr(config, "high_res_vision_config", config)
    return Shape((1, channels_of(part), *(side_of(part) or (PIXELS, PIXELS))))


def _time_features(config: Any, steps: int) -> Shape | None:
    width = size_of(config, "num_time_features", default=1)
    return Shape((1, steps, width)) if steps else None


def _future(config: Any, past: Shape) -> Shape | None:
    """The shape of what follows ``past_values``; no decoder runs without it (Informer)."""
    length = size_of(config, "prediction_length")
    return Shape((1, length, *past.size[2:])) if length else None


COMPANIONS: dict[str, Companion] = {  # argument -> its shape, from the chosen shapes of others
    "grid_thw": _whole_grid,
    "image_grid_thw": _whole_grid,
    "merge_sizes": _merge,
    "image_merge_sizes": _merge,
    "spatial_shapes": _flat_grid,
    "target_sizes": _flat_grid,
    "image_token_pooling": _beside("pixel_values", _pools),
    # rows and columns of those tokens; zeros, because there is no smaller image
    "image_grids": _beside("pixel_values", lambda config, images: _values(2, 2, 0, 0)),
    "image_sizes": _image_sizes,
    "image_attention_mask": _beside("image_pixel_values", _patch_mask),
    "audio_embed_sizes": _beside(  # steps without padding, before an encoder reduces them
        "audio_input_features", lambda config, sound: Shape((1,), "values", (sound.steps,))
    ),
    "pixel_position_ids": _beside("pixel_values", _places),
    "image_position_ids": _beside("pixel_values", _places),
    "pixel_attention_mask": _beside("pixel_values", _pixel_mask),
    "input_features_mask": _steps_of("input_features"),
    "feature_attention_mask": _steps_of("input_features"),
    "audio_mel_mask": _steps_of("audio_mel", what="no padding"),
    "padding_mask": _steps_of("input_values", "input_features"),
    "protein_attention_mask": _like("protein_input_ids", "ids"),
    "qformer_input_ids": lambda config, form: Shape((1, 4), "ids"),
    "prompt_pixel_values": _like("pixel_values", "numbers"),
    "prompt_masks": _like("pixel_values", "numbers"),
    "high_res_pixel_values": _beside("pixel_values", _high_res),
    "task_inputs": lambda config, form: Shape((1, size_of(config, "task_seq_len")), "ids"),
    "input_values_cutoffs": _beside("input_values", lambda config, sound: _values(sound.steps)),
    "freq": lambda config, form: Shape((1, 1), "ids"),
    "past_time_features": _beside(
        "past_values", lambda config, past: _time_features(config, past.steps)
    ),
    "future_values": _beside("past_values", _future),
    "future_time_features": lambda config, form: _time_features(
        config, size_of(config, "prediction_length")
    ),
    "past_observed_mask": _like("past_values", "ones"),
    "past_values_padding": _beside("past_values", lambda config, past: _values(*[0] * past.steps)),
    "decoder_input_values": _like("input_values", "numbers"),
}
# some classes accept these, but cannot use them in every form
DISPENSABLE = ("image_sizes", "pixel_attention_mask", "input_features_mask")


def optional_arguments(model: nn.Module, inputs: Inputs) -> list[MakeOptional]:
    parameters = inspect.signature(model.forward).parameters
    return [
        make
        for name, (companions, make) in _OPTIONAL.items()
        if name in parameters and name not in inputs and inputs.keys() & set(companions)
    ]


def _first_token(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    mask = torch.zeros_like(inputs["input_ids"])
    mask[:, 0] = 1
    return {"global_attention_mask": mask}


def _entities(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Two entities: one of two words, and one of a single word."""
    ids = inputs["input_ids"]
    count = max(2, size_of(model.config, "entity_vocab_size"))
    places = torch.tensor([[0, 1], [2, -1]], device=ids.device)
    return {
        "entity_ids": (torch.arange(1, 3, device=ids.device) % count).repeat(len(ids), 1),
        "entity_position_ids": places.repeat(len(ids), 1, 1),
    }


def _half_image(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Token types, half text and half image: each has experts of its own."""
    kinds = torch.zeros_like(inputs["input_ids"])
    kinds[:, : kinds.shape[1] // 2] = 1
    return {"moe_mm_token_type_ids": kinds}


def _hidden_steps(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """A mask that hides the first two steps of the sound."""
    if "input_features" in inputs:
        steps = inputs["input_features"].shape[1]
    else:
        lengths = getattr(model, "_get_feat_extract_output_lengths", int)
        steps = int(lengths(inputs["input_values"].shape[-1]))
    samples = len(next(value for value in inputs.values() if isinstance(value, Tensor)))
    return {"mask_time_indices": (torch.arange(steps) < 2).repeat(samples, 1)}


def _behind(config: Any, ids: Tensor, name: str, count: int) -> Tensor:
    """Text without special tokens, after ``count`` tokens ``name`` of the config."""
    special = {
        value
        for key, value in vars(config).items()
        if key.endswith("token_id") and isinstance(value, int)
    }
    plain = next(token for token in range(len(special) + 1) if token not in special)
    text = ids.masked_fill(torch.isin(ids, torch.tensor(sorted(special), device=ids.device)), plain)
    return torch.cat([torch.full_like(ids[:, :count], getattr(config, name, 0)), text], dim=1)


def _voice(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Two steps of a voice, and the text after their tokens."""
    config, ids = model.config, inputs["input_ids"]
    width = size_of(config, "audio_prompt_dim", "latent_dim")
    parameter = next(model.parameters())
    voice = torch.rand((len(ids), 2, width), device=ids.device, dtype=parameter.dtype)
    text = _behind(config, ids, "audio_prompt_token_id", 2)
    return {"input_ids": text, "audio_prompt_latents": voice}


def _codes(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Two steps of sound in codebooks, and the text after their tokens."""
    config, ids = model.config, inputs["input_ids"]
    codes = torch.ones_like(ids[:, :2])[..., None].repeat(1, 1, size_of(config, "num_codebooks"))
    return {"input_ids": _behind(config, ids, "audio_token_id", 2), "audio_input_ids": codes}


_IDS = ("input_ids",)
_SOUND = ("input_values", "input_features")
# argument -> inputs that it needs (any one of them), and its maker
_OPTIONAL: dict[str, tuple[tuple[str, ...], MakeOptional]] = {
    "global_attention_mask": (_IDS, _first_token),
    "entity_ids": (_IDS, _entities),
    "moe_mm_token_type_ids": (_IDS, _half_image),
    "audio_prompt_latents": (_IDS, _voice),
    "audio_input_ids": (_IDS, _codes),
    "mask_time_indices": (_SOUND, _hidden_steps),
}


_TEXT_LENGTH = 8
_TEXT = ("input_ids", "decoder_input_ids")
_VIDEOS = "pixel_values_videos"
_MODALITIES = ("image", "video", "audio")
_OWN_COUNT = "feature_attention_mask"
_QUERIES = "image_embeds_position_mask"
_MOST_FORMS = 16
_REVERSED = (*_TEXT, *MAIN, *STATES)


def example_inputs(
    model: nn.Module,
    recipe: RunRecipe = PLAIN,
    config: Any = None,
    length: int = _TEXT_LENGTH,
) -> dict[str, Any]:
    """Keyword arguments for a small forward pass of one sample; see :func:`input_forms`.

    ``config`` is that of the Hugging Face model, if ``model`` wraps one.
    """
    return next(input_forms(model, recipe, config, length, recipe.form))


def given_inputs(model: nn.Module, make_inputs: MakeInputs, config: Any = None) -> dict[str, Any]:
    """The result of the user's ``make_inputs``, in the model's dtype and on its device."""
    config = model.config if config is None else config
    name, kind = function_name(make_inputs), type(config).__name__
    try:
        inputs = make_inputs(config)
    except Exception as error:  # whatever the user's function raises
        message = in_one_line(error).rstrip(".")
        raise UnsupportedModelError(
            f"make_inputs={name} raised {type(error).__name__} for a {kind}: {message}. "
            "It is called with small configs of this class too: take every size from the config "
            "that it is given."
        ) from error
    if not isinstance(inputs, Mapping):
        raise UnsupportedModelError(
            f"make_inputs={name} returned a {type(inputs).__name__} for a {kind}. Return a dict of "
            f"what {type(model).__name__}'s forward pass takes, as {{'input_ids': ids}}."
        )
    parameter = next(model.parameters())

    def converted(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            # sizes are computed from integers, so they need values
            return value.cpu() if parameter.is_meta else value.to(parameter.device)
        if parameter.is_meta:
            return torch.empty(value.shape, dtype=parameter.dtype, device="meta")
        return value.to(parameter.device, parameter.dtype)

    return {argument: tree_map(converted, value) for argument, value in inputs.items()}


def function_name(make_inputs: MakeInputs) -> str:
    return getattr(make_inputs, "__name__", type(make_inputs).__name__)


def text_inputs(model: nn.Module) -> dict[str, Any] | None:
    """Text alone, for a model that takes images or sound too; ``None`` for any other model."""
    parameters = inspect.signature(model.forward).parameters
    if "input_ids" not in parameters or not _main(parameters, model.config):
        return None
    ids = _texts(model, parameters, model.config, _TEXT_LENGTH)[0]
    return {**ids, "use_cache": False} if "use_cache" in parameters else ids


def video_forms(model: nn.Module, recipe: RunRecipe) -> Iterator[dict[str, Any]]:
    if {"pixel_values", _VIDEOS} <= inspect.signature(model.forward).parameters.keys():
        yield from input_forms(model, recipe, first=recipe.form, also=(_VIDEOS,))


def input_forms(
    model: nn.Module,
    recipe: RunRecipe = PLAIN,
    config: Any = None,
    length: int = _TEXT_LENGTH,
    first: int = 0,
    also: Collection[str] = (),
) -> Iterator[dict[str, Any]]:
    """Yield inputs of one small forward pass, in every form that a class may expect.

    Forms before number ``first`` are skipped. Arguments in ``also`` are given even if optional.
    """
    if recipe.make_inputs is not None:
        yield given_inputs(model, recipe.make_inputs, config)
        return
    parameters = inspect.signature(model.forward).parameters
    config = model.config if config is None else config
    plain, *others = _texts(model, parameters, config, length)
    forms = chain(
        ((form, plain) for form in _forms(parameters, config, also)),
        ((next(_forms(parameters, config, also)), text) for text in others),
    )
    for form, text in islice(forms, first, _MOST_FORMS):
        tensors = {name: shape.tensor(model) for name, shape in form.items()}
        given = {**text, **tensors, **random_encoder_states(model, recipe.encoder_states)}
        inputs = _with_placeholders(model, given, parameters, config)
        yield {**inputs, "use_cache": False} if "use_cache" in parameters else inputs


def _forms(
    parameters: Mapping[str, Any], config: Any, also: Collection[str]
) -> Iterator[dict[str, Shape]]:
    """Yield forms: the shapes of all arguments but text."""
    main = _main(parameters, config, also)
    for chosen in _combinations([*main.values()]):
        form = complete = dict(zip(main, chosen, strict=True))
        for name, make in COMPANIONS.items() if form else ():
            shape = make(config, form) if name in parameters else None
            if shape is not None:
                complete = {**complete, name: shape}
        yield complete
        if any(name in complete for name in DISPENSABLE):
            yield {name: shape for name, shape in complete.items() if name not in DISPENSABLE}


def _main(
    parameters: Mapping[str, Any], config: Any, also: Collection[str] = ()
) -> dict[str, list[Shape]]:
    held = held_by(config)
    names = [
        name
        for name in MAIN
        if name in parameters and held.get(TOWERS.get(name, ""), config) is not None
    ]
    alone = not names and not any(name in parameters for name in _TEXT)
    for name in REQUIRED:
        wanted = alone or name in also or (name == _VIDEOS and "pixel_values" not in parameters)
        if name in parameters and (wanted or parameters[name].default is inspect.Parameter.empty):
            names.append(name)
    options = {name: {**MAIN, **REQUIRED}[name](config, parameters) for name in names}
    return {name: shapes for name, shapes in options.items() if shapes}


def _combinations(choices: list[list[Shape]]) -> Iterator[tuple[Shape, ...]]:
    """Yield combinations of one option per argument, the first options first.

    Then one argument at a time gets its other options. If several have a choice, all second options
    follow, then all third ones; an argument with fewer options keeps its last one.
    """
    first = [options[0] for options in choices]
    yield tuple(first)
    for place, options in enumerate(choices):
        for option in options[1:]:
            yield (*first[:place], option, *first[place + 1 :])
    if sum(len(options) > 1 for options in choices) > 1:
        for number in range(1, max(map(len, choices))):
            yield tuple(options[min(number, len(options) - 1)] for options in choices)


def _texts(
    model: nn.Module, parameters: Mapping[str, Any], config: Any, length: int
) -> list[dict[str, Tensor]]:
    """Possible texts; for sound in codebooks also one row or column of ids per codebook."""
    device = next(model.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device
    ids = torch.arange(1, 1 + length, device=device)[None] % max(2, size_of(config, "vocab_size"))
    for token in [_token(config, kind) for kind in (*_MODALITIES, "document")]:
        if token is not None:
            ids = ids.masked_fill(ids == token, 1 if token != 1 else 2)
    names = [name for name in _TEXT if name in parameters]
    texts = [dict.fromkeys(names, ids)]
    books = size_of(config, "num_codebooks") or size_of(
        getattr(config, "decoder_config", None), "num_channels"
    )
    if books and names:
        columns = (ids[..., None].repeat(1, 1, count) for count in (books, books + 1))
        several = (ids.repeat(books, 1), *columns)
        texts += [{**texts[0], names[-1]: books_of_ids} for books_of_ids in several]
    if names:  # two texts, for a class that chooses between them
        texts.append(dict.fromkeys(names, torch.stack([ids, ids.roll(1, -1)], 1)))
    return texts


def _token(config: Any, kind: str) -> int | None:
    """The id of the token for an image, a video or a sound, or ``None``."""
    for part in (config, *map(held_by(config).get, ("vision_config", "audio_config"))):
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            token = getattr(part, name, None)
            if isinstance(token, int):
                return token
    return None


def _with_placeholders(
    model: nn.Module, inputs: dict[str, Any], parameters: Mapping[str, Any], config: Any
) -> dict[str, Any]:
    """Add tokens for the features of images and sounds, and the masks that they need."""
    ids = inputs.get("input_ids")
    if ids is None or ids.ndim > 2:
        return inputs
    counts = {kind: _token_count(model, kind, inputs, config) for kind in _MODALITIES}
    places = [
        torch.full_like(ids[:, :1], _token(config, kind) or 0).repeat(1, count)
        for kind, count in counts.items()
    ]
    queries = size_of(config, "latent_query_num") if _QUERIES in parameters else 0
    ids = torch.cat([torch.ones_like(ids[:, :1]).repeat(1, queries), *places, ids], dim=1)
    result = {**inputs, "input_ids": ids}
    if _QUERIES in parameters:
        result[_QUERIES] = torch.arange(ids.shape[1], device=ids.device)[None] < queries
    if "bbox" in parameters:
        result["bbox"] = ids.new_zeros((*ids.shape, 4))
    films = getattr(inputs.get("pixel_values"), "ndim", 0) == 5
    if "image_attention_mask" in parameters and films:
        result["image_attention_mask"] = ids.new_ones((*ids.shape, 1))
    if not any(counts.values()):
        return result
    if _expands_placeholder(model, inputs) and "attention_mask" in parameters:
        result["attention_mask"] = torch.ones_like(ids)
    if "mm_token_type_ids" in parameters:
        kinds = torch.zeros_like(ids)
        for kind in reversed(_MODALITIES):  # images last: a video may have the image's token
            kinds[ids == _token(config, kind)] = 1 + _MODALITIES.index(kind)
        result["mm_token_type_ids"] = kinds
    if "token_type_ids" in parameters:
        image = _token(config, "image")
        result["token_type_ids"] = (ids == (-1 if image is None else image)).to(ids.dtype)
    return result


def _expands_placeholder(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """True if the forward pass repeats a sound's one token itself, by the sound's mask."""
    return _OWN_COUNT in inputs and not hasattr(model, "get_audio_features")


def _token_count(model: nn.Module, kind: str, inputs: Mapping[str, Any], config: Any) -> int:
    """Number of tokens of a kind (image, video, audio) that the text needs."""
    name = f"get_{kind}_features"
    if _token(config, kind) is None:
        return 0
    if kind == "audio" and _expands_placeholder(model, inputs):
        return 1
    methods = [getattr(module, name) for module in model.modules() if hasattr(module, name)]
    if not methods and any(argument.startswith(kind) for argument in inputs):
        return _expected_count(model, kind, inputs, config)
    if not methods and "pixel_values" in inputs:  # one feature for each query, of every frame
        pixels = inputs["pixel_values"]
        return size_of(config, "num_query_tokens") * (pixels.shape[1] if pixels.ndim == 5 else 1)
    return next((count for method in methods if (count := _feature_count(method, inputs))), 0)


def _expected_count(model: nn.Module, kind: str, inputs: Mapping[str, Any], config: Any) -> int:
    """Number of features in the error of a forward pass with one token for them; 0 if none."""
    ids = inputs["input_ids"]
    with_one = torch.cat([torch.full_like(ids[:, :1], _token(config, kind) or 0), ids], dim=1)
    try:
        with torch.no_grad(), NoValues():
            model(**{**inputs, "input_ids": with_one})
    except Exception as error:
        note_shortage(error)
        said = re.search(r"value tensor of shape \[(\d+)", str(error))
        return int(said[1]) if said else 0
    return 0


def _feature_count(method: Callable[..., Any], inputs: Mapping[str, Any]) -> int:
    """Number of features that a method computes from the images (videos, sounds)."""
    accepted = inspect.signature(method).parameters
    others = {name: value for name, value in inputs.items() if name not in _TEXT}
    own = {name: value for name, value in inputs.items() if name in accepted}
    for given in ({name: value for name, value in own.items() if name in others}, own, others):
        try:
            with torch.no_grad(), NoValues():
                features = method(**given)
            break
        except Exception as error:  # some check the text's tokens here, and state the number
            note_shortage(error)
            if expected := re.search(r"features:? (\d+)$", str(error)):
                return int(expected[1])
    else:  # it takes something else; the forward pass will fail
        return 0
    pooled = getattr(features, "pooler_output", features)
    features = getattr(features, "last_hidden_state", features) if pooled is None else pooled
    return sum(
        tensor.numel() // tensor.shape[-1]
        for tensor in tensors_in(features)
        if tensor.is_floating_point() and tensor.ndim > 1
    )


def second_sample(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Add a second sample, with tokens, main inputs and encoder states reversed."""
    packed = "target_sizes" in inputs  # the patches of all images in one row
    result = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            turned = name in _REVERSED or name.endswith("token_type_ids")
            second = value.flip(-1) if turned else value
            dim = -1 if packed and name == "pixel_values" else 0
            result[name] = torch.cat([value, second], dim)
    return result
