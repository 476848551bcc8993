"""Make masks, grids and sizes whose shapes are derived from those of other arguments.

Without some optional arguments parts of a model do not run: global attention, entities beside the
words, a voice before the text. The class has weights that no other input reaches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .input_shapes import PIXELS, Shape, channels_of, crops_of, grid_of, patch_of, side_of, size_of

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


_TEXT = ("input_ids",)
_SOUND = ("input_values", "input_features")
# argument -> inputs that it needs (any one of them), and its maker
_OPTIONAL: dict[str, tuple[tuple[str, ...], MakeOptional]] = {
    "global_attention_mask": (_TEXT, _first_token),
    "entity_ids": (_TEXT, _entities),
    "moe_mm_token_type_ids": (_TEXT, _half_image),
    "audio_prompt_latents": (_TEXT, _voice),
    "audio_input_ids": (_TEXT, _codes),
    "mask_time_indices": (_SOUND, _hidden_steps),
}
