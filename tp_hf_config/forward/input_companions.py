"""Give the shapes of arguments that follow from other arguments' shapes: masks, grids, sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, Literal

from .input_shapes import PIXELS, Shape, channels_of, crops_of, grid_of, patch_of, side_of, size_of

Form = Mapping[str, Shape]
"""Argument -> its chosen shape."""
Companion = Callable[[Any, Form], Shape | None]
"""Returns an argument's shape from the config and a form; None if the argument is left out."""


def _whole_grid(config: Any, form: Form) -> Shape | None:
    side = grid_of(config)
    return Shape((1, 3), "values", (1, side, side))


def _flat_grid(config: Any, form: Form) -> Shape | None:
    side = grid_of(config)
    return Shape((1, 2), "values", (side, side))


def _pools(config: Any, form: Form) -> Shape | None:
    """Return, for each of four tokens, the numbers of the patches that are pooled into it."""
    patches = prod(form["pixel_values"].size[:-1]) if "pixel_values" in form else 0
    numbers = tuple(number % patches for number in range(16)) if patches else ()
    return Shape((4, 4), "values", numbers) if patches else None


def _pooled_grid(config: Any, form: Form) -> Shape | None:
    """Return rows and columns of those tokens, and zeros for the smaller image: there is none."""
    return Shape((1, 4), "values", (2, 2, 0, 0)) if "pixel_values" in form else None


def _merge(config: Any, form: Form) -> Shape | None:
    return Shape((1,), "values", (grid_of(config) // 2,))


def _like(name: str, what: Literal["numbers", "ones", "mask", "ids"]) -> Companion:
    """Give the argument the same shape as the argument ``name``, filled with ``what``."""

    def companion(config: Any, form: Form) -> Shape | None:
        return Shape(form[name].size, what) if name in form else None

    return companion


def _steps_of(*names: str, what: Literal["mask", "no padding"] = "mask") -> Companion:
    """Give the argument a mask over the time steps of the first of these that is given."""

    def companion(config: Any, form: Form) -> Shape | None:
        steps = next((form[name].steps for name in names if name in form), 0)
        return Shape((1, steps), what) if steps else None

    return companion


def _cutoffs(config: Any, form: Form) -> Shape | None:
    steps = form["input_values"].steps if "input_values" in form else 0
    return Shape((1, 1), "values", (steps,)) if steps else None


def _image_sizes(config: Any, form: Form) -> Shape | None:
    if "image_pixel_values" in form:
        return Shape((1, 2), "values", form["image_pixel_values"].size[-2:])
    if "pixel_values" not in form:
        return None
    crops = crops_of(config)
    return Shape((1, 2), "values", crops[1] if crops else form["pixel_values"].size[-2:])


def _pixel_mask(config: Any, form: Form) -> Shape | None:
    """Return a mask of the pictures, or patches, that are more than padding: all of them."""
    size = form["pixel_values"].size if "pixel_values" in form else ()
    return Shape(size[:2], "mask") if len(size) in (3, 5) else None


def _patch_mask(config: Any, form: Form) -> Shape | None:
    """Return ones for the patches of each crop that are more than padding: all of them."""
    if "image_pixel_values" not in form:
        return None
    crops, (_, height, width) = form["image_pixel_values"].size[:2], patch_of(config)
    rows, columns = form["image_pixel_values"].size[-2:]
    return Shape((*crops, rows // height, columns // width), "ids")


def _sound_lengths(config: Any, form: Form) -> Shape | None:
    """Return the number of steps that are no padding, before an encoder reduces them: all."""
    steps = form["audio_input_features"].steps if "audio_input_features" in form else 0
    return Shape((1,), "values", (steps,)) if steps else None


def _places(config: Any, form: Form) -> Shape | None:
    side = grid_of(config)
    rows = [number for y in range(side) for x in range(side) for number in (x, y)]
    return Shape((1, side * side, 2), "values", tuple(rows)) if "pixel_values" in form else None


def _high_res(config: Any, form: Form) -> Shape | None:
    part = getattr(config, "high_res_vision_config", config)
    side = side_of(part) or (PIXELS, PIXELS)
    return Shape((1, channels_of(part), *side)) if "pixel_values" in form else None


def _past_times(config: Any, form: Form) -> Shape | None:
    width = size_of(config, "num_time_features", default=1)
    return Shape((1, form["past_values"].steps, width))


def _none_padded(config: Any, form: Form) -> Shape | None:
    length = form["past_values"].size[1]
    return Shape((1, length), "values", (0,) * length)


def _future(config: Any, form: Form) -> Shape | None:
    """Return the shape of what follows ``past_values``; no decoder runs without it (Informer)."""
    length = size_of(config, "prediction_length")
    return Shape((1, length, *form["past_values"].size[2:])) if length else None


def _future_times(config: Any, form: Form) -> Shape | None:
    length = size_of(config, "prediction_length")
    width = size_of(config, "num_time_features", default=1)
    return Shape((1, length, width)) if length else None


COMPANIONS: dict[str, Companion] = {
    "grid_thw": _whole_grid,
    "image_grid_thw": _whole_grid,
    "merge_sizes": _merge,
    "image_merge_sizes": _merge,
    "spatial_shapes": _flat_grid,
    "target_sizes": _flat_grid,
    "tgt_sizes": _flat_grid,
    "image_token_pooling": _pools,
    "image_grids": _pooled_grid,
    "image_sizes": _image_sizes,
    "image_attention_mask": _patch_mask,
    "audio_embed_sizes": _sound_lengths,
    "pixel_position_ids": _places,
    "image_position_ids": _places,
    "pixel_attention_mask": _pixel_mask,
    "input_features_mask": _steps_of("input_features"),
    "feature_attention_mask": _steps_of("input_features"),
    "audio_mel_mask": _steps_of("audio_mel", what="no padding"),
    "padding_mask": _steps_of("input_values", "input_features"),
    "protein_attention_mask": _like("protein_input_ids", "ids"),
    "qformer_input_ids": lambda config, form: Shape((1, 4), "ids"),
    "prompt_pixel_values": _like("pixel_values", "numbers"),
    "prompt_masks": _like("pixel_values", "numbers"),
    "high_res_pixel_values": _high_res,
    "task_inputs": lambda config, form: Shape((1, size_of(config, "task_seq_len")), "ids"),
    "input_values_cutoffs": _cutoffs,
    "freq": lambda config, form: Shape((1, 1), "ids"),
    "past_time_features": _past_times,
    "future_values": _future,
    "future_time_features": _future_times,
    "past_observed_mask": _like("past_values", "ones"),
    "past_values_padding": _none_padded,
    "decoder_input_values": _like("input_values", "numbers"),
}
"""Arguments that are given beside those with chosen shapes, and what gives their shapes."""
DISPENSABLE = ("image_sizes", "pixel_attention_mask", "input_features_mask")
"""Arguments that some classes accept, but cannot use in every form."""
