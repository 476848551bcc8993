"""Which shapes the arguments of a forward pass have, by their names and the config's sizes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import nn

_SAMPLES = 7680  # of sound: what the strides of a speech encoder divide and leave some frames of
_FRAMES = 64  # of a spectrogram
_PIXELS = 64
IMAGE_SIZES = ("image_size", "img_size", "max_img_size", "resolution")
"""What configs call the side of an image."""
_NESTED = ("text_config", "vision_config", "audio_config")


@dataclass(frozen=True)
class Shape:
    """One tensor: its shape, and what is in it.

    Attributes:
        size: of one sample; patches of an image come without a batch dimension.
        what: random numbers from 0 to 1, ones, a mask of all or none, token ids, or ``values`` row
            by row.
        values: for ``what="values"``.
        steps: the length in time, which a mask beside it has.
    """

    size: tuple[int, ...]
    what: Literal["numbers", "ones", "mask", "no padding", "ids", "values"] = "numbers"
    values: tuple[int, ...] = ()
    steps: int = 0

    def made(self, model: nn.Module) -> torch.Tensor:
        """The tensor, on the model's device and in its dtype."""
        parameter = next(model.parameters())
        if self.what in ("numbers", "ones"):
            make = torch.rand if self.what == "numbers" else torch.ones
            return make(self.size, device=parameter.device).to(parameter.dtype)
        # sizes are made from whole numbers: real ones, also for a model without data
        device = torch.device("cpu") if parameter.is_meta else parameter.device
        if self.what == "values":
            return torch.tensor(self.values, device=device).view(self.size)
        if self.what == "no padding":
            return torch.zeros(self.size, device=device, dtype=torch.bool)
        dtype = torch.bool if self.what == "mask" else torch.long
        return torch.ones(self.size, device=device, dtype=dtype)


Form = Mapping[str, Shape]
Choices = Callable[[Any, Collection[str]], list[Shape]]
"""The shapes that an argument may have, for a config and the names of all arguments."""
Beside = Callable[[Any, Form], Shape | None]
"""The shape of an argument beside others whose shapes are chosen."""


def size_of(config: Any, *names: str, default: int = 0) -> int:
    """A size by any of its names, in the config or one that is nested in it."""
    found = setting(config, *names)
    if isinstance(found, (list, tuple)) and found:
        found = found[-1]
    return found if isinstance(found, int) else default


def setting(config: Any, *names: str) -> Any:
    """A setting by any of its names, in the config or one that is nested in it."""
    for part in _parts(config):
        for name in names:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return None


def _parts(config: Any) -> Iterator[Any]:
    yield config
    others = [
        key
        for key, value in getattr(config, "__dict__", {}).items()
        if hasattr(value, "to_json_string")
    ]
    for key in (*_NESTED, *(key for key in others if key not in _NESTED)):
        part = getattr(config, key, None)
        if part is not None:
            yield from _parts(part)


def _vision(config: Any) -> Any:
    return next(p for p in (getattr(config, "vision_config", None), config) if p is not None)


def _channels(config: Any) -> int:
    return size_of(_vision(config), "num_channels", "in_channels", "in_chans", default=3)


def _side(config: Any) -> tuple[int, int] | None:
    given = setting(config, "model_args") or {}  # of timm
    size = setting(_vision(config), *IMAGE_SIZES) or setting(config, *IMAGE_SIZES)
    size = size or given.get("img_size")
    if isinstance(size, dict):
        size = (size.get("height"), size.get("width"))
    if isinstance(size, int):
        return (size, size)
    return tuple(size)[:2] if size and all(size) else None


def _patch(config: Any) -> tuple[int, int, int]:
    """Depth in time, height and width of a patch of an image."""
    vision = _vision(config)
    size = setting(vision, "patch_size", "spatial_patch_size") or 14
    times = size_of(vision, "temporal_patch_size", "patch_temporal", default=1)
    sides = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return (times, sides[0], sides[-1])


def _grid(config: Any) -> int:
    """How many patches an image has in each direction, for it to be merged to four tokens."""
    names = ("spatial_merge_size", "merge_size", "pooling_kernel_size", "downsample_factor")
    return 2 * max(1, size_of(_vision(config), *names, default=2))


def _crops(config: Any) -> tuple[int, tuple[int, int]] | None:
    """Into how many parts an image is cut (the whole one besides), and its size."""
    sizes, side = setting(config, "image_grid_pinpoints"), _side(config)
    if not sizes or side is None:
        return None
    height, width = sizes[0]
    return 1 + (height // side[0]) * (width // side[1]), (height, width)


def _pixels(config: Any, names: Collection[str]) -> list[Shape]:
    own = _side(config)
    sides = [own] if own else [(_PIXELS, _PIXELS), (224, 224)]
    channels = _channels(config)
    frames = size_of(_vision(config), "num_frames", "frames", default=0)
    crops = _crops(config)
    plain = [Shape((1, channels, *side)) for side in sides]
    count = crops[0] if crops else frames or 1
    several = [Shape((1, count, *one.size[1:])) for one in plain]
    pairs = [Shape((1, 2, *one.size[1:])) for one in plain]
    films = [*several, *plain] if frames or crops else [*plain, *several]
    number, (times, *patch) = _grid(config) ** 2, _patch(config)
    width = channels * times * patch[0] * patch[1]
    squares = (number, channels, *patch)
    patches = [Shape((number, width)), Shape(squares)]
    rows = [Shape((1, number, width)), Shape((1, *squares))]
    whole = size_of(_vision(config), "num_position_embeddings")
    films += [Shape((1, whole, width))] if whole else []
    merged = [
        Shape((number, _grid(config) // 2 * patch[0], _grid(config) // 2 * patch[1], channels))
    ]
    cubes = [Shape((number, times, *patch, channels))]
    least, most = min(sides[0]), max(sides[0])
    others = [Shape((1, channels, side, side)) for side in (least, 2 * _PIXELS, 512, 4 * most)]
    single = [Shape((1, 1, *one.size[2:])) for one in plain]
    if "grid_thw" in names or "image_grid_thw" in names:
        return [*patches, *rows, *merged, *films]
    if {"target_sizes", "tgt_sizes"} & set(names):
        return [Shape((1, channels, patch[0], number * patch[1])), *films]
    if {"spatial_shapes", "pixel_position_ids", "image_position_ids"} & set(names):
        return [*rows, *patches, *films]
    return [*dict.fromkeys([*films, *others, *pairs, *rows, *patches, *cubes, *single])]


def _flattened(config: Any, names: Collection[str]) -> list[Shape]:
    """Patches behind their row and column."""
    _, height, width = _patch(config)
    numbers = size_of(_vision(config), "patch_embed_hidden_size")
    numbers = numbers if setting(config, "patch_size") is None else 0
    return [Shape((1, _grid(config) ** 2, 2 + (numbers or _channels(config) * height * width)))]


def _features(config: Any, names: Collection[str]) -> list[Shape]:
    audio = getattr(config, "audio_config", None) or config
    width = (
        "feature_projection_input_dim",
        "num_mel_bins",
        "n_mel_bins",
        "n_mels",
        "feature_size",
        "input_feat_per_channel",
        "input_feat_size",
        "input_dim",
        "mel_dim",
    )
    bins = size_of(audio, *width) or size_of(config, *width, default=80)
    frames = 2 * size_of(audio, "max_source_positions")  # all of them, where the class counts them
    counted = [Shape((1, bins, frames), steps=frames)] if frames else []
    few = 2 * size_of(audio, "n_window") or _FRAMES
    stacked = bins * size_of(audio, "num_stacked_frames", default=4)
    return [
        *counted,
        Shape((1, few, bins), steps=few),
        Shape((1, bins, few), steps=few),
        Shape((1, bins, 3000), steps=3000),
        Shape((1, 1, few, bins), steps=few),
        Shape((1, few, stacked), steps=few),
        Shape((1, few, 128), steps=few),
    ]


def _samples(config: Any, names: Collection[str]) -> list[Shape]:
    bins = size_of(config, "num_mel_bins", default=80)
    samples = 12 * size_of(config, "hop_length") or _SAMPLES
    long = size_of(config, "max_length", default=_FRAMES)
    return [
        Shape((1, samples), steps=samples),
        Shape((1, 1, samples), steps=samples),
        Shape((1, long, bins), steps=long),
        Shape((1, _FRAMES, bins), steps=_FRAMES),
        Shape((1, 16, size_of(config, "hidden_size")), steps=16),
    ]


def _of(*names: str, length: int = 3) -> Choices:
    """``(1, length, size)`` where the size has one of these names."""

    def choices(config: Any, arguments: Collection[str]) -> list[Shape]:
        size = size_of(config, *names)
        return [Shape((1, length, size))] if size else []

    return choices


def _film(config: Any, names: Collection[str]) -> list[Shape]:
    frames = size_of(_vision(config), "num_frames", "frames_per_clip", default=2)
    own = _side(config)
    sides = [own] if own else [(336, 336), (_PIXELS, _PIXELS), (224, 224)]
    return [Shape((1, frames, _channels(config), *side), steps=frames) for side in sides]


def _rows(config: Any, names: Collection[str]) -> list[Shape]:
    """What comes into a tower whose embedding is not its own."""
    times, height, width = _patch(config)
    patches = Shape((_grid(config) ** 2, _channels(config) * times * height * width))
    inner = size_of(config, "hidden_size", "d_model")
    return [
        patches,
        Shape((1, inner, 16)),
        Shape((1, 16, inner)),
        Shape((_grid(config) ** 2, inner)),
        Shape((1, size_of(config, "channels", default=1), _SAMPLES)),
    ]


def _protein(config: Any, names: Collection[str]) -> list[Shape]:
    """Tokens of a protein, none of them special."""
    part = getattr(config, "protein_encoder_config", config)
    special = [getattr(part, f"{name}_token_id", None) or 0 for name in ("pad", "mask", "eos")]
    count = max(1, size_of(part, "vocab_size") - max(special) - 1)
    return [Shape((1, 8), "values", tuple(max(special) + 1 + n % count for n in range(8)))]


def _latents(config: Any, names: Collection[str]) -> list[Shape]:
    width = size_of(config, "hidden_size", "d_model")
    return [Shape((1, width, 16)), Shape((1, 16, width))]


def _past(config: Any, names: Collection[str]) -> list[Shape]:
    lags = setting(config, "lags_sequence") or [0]
    length = size_of(config, "context_length", default=32) + max(lags)
    width = size_of(config, "num_input_channels", "input_size", default=1)
    return [Shape((1, length, width), steps=length), Shape((1, length), steps=length)]


def _whole_grid(config: Any, form: Form) -> Shape | None:
    side = _grid(config)
    return Shape((1, 3), "values", (1, side, side))


def _flat_grid(config: Any, form: Form) -> Shape | None:
    side = _grid(config)
    return Shape((1, 2), "values", (side, side))


def _pools(config: Any, form: Form) -> Shape | None:
    """For each of four tokens the numbers of the patches that it is made of."""
    patches = prod(form["pixel_values"].size[:-1]) if "pixel_values" in form else 0
    numbers = tuple(number % patches for number in range(16)) if patches else ()
    return Shape((4, 4), "values", numbers) if patches else None


def _pooled_grid(config: Any, form: Form) -> Shape | None:
    """Rows and columns of those tokens, and none of a smaller image beside."""
    return Shape((1, 4), "values", (2, 2, 0, 0)) if "pixel_values" in form else None


def _merge(config: Any, form: Form) -> Shape | None:
    return Shape((1,), "values", (_grid(config) // 2,))


def _like(name: str, what: Literal["numbers", "ones", "mask", "ids"]) -> Beside:
    def beside(config: Any, form: Form) -> Shape | None:
        return Shape(form[name].size, what) if name in form else None

    return beside


def _steps_of(*names: str, what: Literal["mask", "no padding"] = "mask") -> Beside:
    """A mask over the time of the first of these arguments that is there."""

    def beside(config: Any, form: Form) -> Shape | None:
        steps = next((form[name].steps for name in names if name in form), 0)
        return Shape((1, steps), what) if steps else None

    return beside


def _cutoffs(config: Any, form: Form) -> Shape | None:
    steps = form["input_values"].steps if "input_values" in form else 0
    return Shape((1, 1), "values", (steps,)) if steps else None


def _image_sizes(config: Any, form: Form) -> Shape | None:
    if "pixel_values" not in form:
        return None
    crops = _crops(config)
    return Shape((1, 2), "values", crops[1] if crops else form["pixel_values"].size[-2:])


def _pixel_mask(config: Any, form: Form) -> Shape | None:
    """Which pictures, or which patches, are more than padding."""
    size = form["pixel_values"].size if "pixel_values" in form else ()
    return Shape(size[:2], "mask") if len(size) in (3, 5) else None


def _places(config: Any, form: Form) -> Shape | None:
    side = _grid(config)
    rows = [number for y in range(side) for x in range(side) for number in (x, y)]
    return Shape((1, side * side, 2), "values", tuple(rows)) if "pixel_values" in form else None


def _high_res(config: Any, form: Form) -> Shape | None:
    part = getattr(config, "high_res_vision_config", config)
    side = _side(part) or (_PIXELS, _PIXELS)
    return Shape((1, _channels(part), *side)) if "pixel_values" in form else None


def _past_times(config: Any, form: Form) -> Shape | None:
    width = size_of(config, "num_time_features", default=1)
    return Shape((1, form["past_values"].steps, width))


def _none_padded(config: Any, form: Form) -> Shape | None:
    length = form["past_values"].size[1]
    return Shape((1, length), "values", (0,) * length)


def _future(config: Any, form: Form) -> Shape | None:
    """What comes after ``past_values``, without which no decoder runs (Informer)."""
    length = size_of(config, "prediction_length")
    return Shape((1, length, *form["past_values"].size[2:])) if length else None


def _future_times(config: Any, form: Form) -> Shape | None:
    length = size_of(config, "prediction_length")
    width = size_of(config, "num_time_features", default=1)
    return Shape((1, length, width)) if length else None


MAIN: dict[str, Choices] = {
    "pixel_values": _pixels,
    "input_features": _features,
    "input_values": _samples,
    "flattened_patches": _flattened,
    "protein_input_ids": _protein,
    "visual_embeds": _of("visual_embedding_dim"),
    "visual_feats": _of("visual_feat_dim"),
    "visual_pos": _of("visual_pos_dim"),
}
"""What a forward pass is given wherever it takes it."""

REQUIRED: dict[str, Choices] = {
    "hidden_states": _rows,
    "pixel_values_videos": _film,
    "past_values": _past,
    "latents": _latents,
    "query_embeds": _of("hidden_size"),
    "inputs_embeds": _of("hidden_size", "d_model"),
    "action_embeds": lambda config, names: _of("hidden_size")(
        getattr(config, "dit_config", config), names
    ),
    "noise_embeds": _of("hidden_size"),
    "context_hidden_states": _of("hidden_size"),
    "audio_mel": _features,
}
"""What it is given where it cannot do without."""

BESIDE: dict[str, Beside] = {
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
"""What it is given beside those."""

DISPENSABLE = ("image_sizes", "pixel_attention_mask", "input_features_mask")
"""What some classes take, but cannot use in every form."""

TOWERS = {
    "pixel_values": "vision_config",
    "input_features": "audio_config",
    "input_values": "audio_config",
}
"""Without which part of a config an argument is of no use."""
