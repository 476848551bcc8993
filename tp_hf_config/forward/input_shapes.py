"""Shapes of a forward pass's arguments, from their names and the config's sizes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

_SAMPLES = 7680  # of sound; the strides of speech encoders divide it, and some frames remain
_FRAMES = 64  # of a spectrogram
PIXELS = 64  # side of an image, if the config gives none
# config fields for the side of an image
IMAGE_SIZES = ("image_size", "img_size", "max_img_size", "resolution", "crop_size")
_NESTED = ("text_config", "vision_config", "audio_config")
_BINS = (  # config fields for the number of features of a sound
    *("feature_projection_input_dim", "num_mel_bins", "n_mel_bins", "n_mels", "feature_size"),
    *("input_feat_per_channel", "input_feat_size", "input_dim", "mel_dim", "input_size"),
)


@dataclass(frozen=True)
class Shape:
    """The shape of one tensor, and what to fill it with."""

    size: tuple[int, ...]  # of one sample; patches of an image have no batch dimension
    # numbers: random in 0 to 1; mask: all True; no padding: all False; ids: all 1
    what: Literal["numbers", "ones", "mask", "no padding", "ids", "values"] = "numbers"
    values: tuple[int, ...] = ()  # integers for what="values", row by row
    steps: int = 0  # length in time, which a mask for the tensor has too

    def tensor(self, model: nn.Module) -> torch.Tensor:
        """The tensor on the model's device; random numbers and ones in its dtype."""
        parameter = next(model.parameters())
        if self.what in ("numbers", "ones"):
            make = torch.rand if self.what == "numbers" else torch.ones
            return make(self.size, device=parameter.device).to(parameter.dtype)
        # integers need values even for a meta model, because sizes are computed from them
        device = torch.device("cpu") if parameter.is_meta else parameter.device
        if self.what == "values":
            return torch.tensor(self.values, device=device).view(self.size)
        value, dtype = {
            "mask": (True, torch.bool),
            "no padding": (False, torch.bool),
            "ids": (1, torch.long),
        }[self.what]
        return torch.full(self.size, value, device=device, dtype=dtype)


# config, names of all arguments -> shapes that an argument may have
Choices = Callable[[Any, Collection[str]], list[Shape]]


def size_of(config: Any, *names: str, default: int = 0) -> int:
    """A size by any of its names, as for :func:`setting`; the last one of a list of sizes."""
    value = setting(config, *names)
    if isinstance(value, (list, tuple)) and value:
        value = value[-1]
    return value if isinstance(value, int) else default


def setting(config: Any, *names: str) -> Any:
    """A setting by any of its names, from the config or a nested one; ``None`` if there is none."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    held = held_by(config)
    others = [key for key, value in held.items() if hasattr(value, "to_json_string")]
    for key in dict.fromkeys((*_NESTED, *others)):
        value = None if held.get(key) is None else setting(held[key], *names)
        if value is not None:
            return value
    return None


def held_by(config: Any) -> dict[str, Any]:
    """The attributes of a config itself; properties may change other attributes when read."""
    # PE audio-video's properties create a config, slowly, and change its text model's attention
    return getattr(config, "__dict__", {})


def _vision(config: Any) -> Any:
    part = getattr(config, "vision_config", None)
    return config if part is None else part


def channels_of(config: Any) -> int:
    return size_of(_vision(config), "num_channels", "in_channels", "in_chans", default=3)


def side_of(config: Any) -> tuple[int, int] | None:
    """Height and width of an image in pixels, or ``None`` if the config gives none."""
    given = setting(config, "model_args") or {}  # timm's arguments
    size = setting(_vision(config), *IMAGE_SIZES) or setting(config, *IMAGE_SIZES)
    size = size or given.get("img_size")
    if isinstance(size, dict):
        size = (size.get("height"), size.get("width"))
    if isinstance(size, int):
        return (size, size)
    return tuple(size)[:2] if size and all(size) else None


def patch_of(config: Any) -> tuple[int, int, int]:
    """Depth in frames, height and width in pixels of a patch."""
    vision = _vision(config)
    size = setting(vision, "patch_size", "spatial_patch_size") or 14
    times = size_of(vision, "temporal_patch_size", "patch_temporal", default=1)
    sides = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return (times, sides[0], sides[-1])


def grid_of(config: Any) -> int:
    """Patches of an image in each direction, so that they merge to four tokens."""
    names = ("spatial_merge_size", "merge_size", "pooling_kernel_size", "downsample_factor")
    return 2 * max(1, size_of(_vision(config), *names, default=2))


def crops_of(config: Any) -> tuple[int, tuple[int, int]] | None:
    """Number of crops of an image, itself included, with height and width; ``None``: no crops."""
    sizes, side = setting(config, "image_grid_pinpoints"), side_of(config)
    if not sizes or side is None:
        return None
    height, width = sizes[0]
    return 1 + (height // side[0]) * (width // side[1]), (height, width)


def _pixels(config: Any, names: Collection[str]) -> list[Shape]:
    own = side_of(config)
    sides = [own] if own else [(PIXELS, PIXELS), (224, 224)]
    channels = channels_of(config)
    frames = size_of(_vision(config), "num_frames", "frames", default=0)
    crops = crops_of(config)
    plain = [Shape((1, channels, *side)) for side in sides]
    count = crops[0] if crops else frames or 1
    several = [Shape((1, count, *shape.size[1:])) for shape in plain]
    pairs = [Shape((1, 2, *shape.size[1:])) for shape in plain]
    films = [*several, *plain] if frames or crops else [*plain, *several]
    number, (times, *patch) = grid_of(config) ** 2, patch_of(config)
    width = channels * times * patch[0] * patch[1]
    squares = (number, channels, *patch)
    patches = [Shape((number, width)), Shape(squares)]
    rows = [Shape((1, number, width)), Shape((1, *squares))]
    whole = size_of(_vision(config), "num_position_embeddings")
    films += [Shape((1, whole, width))] if whole else []
    half = grid_of(config) // 2
    merged = [Shape((number, half * patch[0], half * patch[1], channels))]
    cubes = [Shape((number, times, *patch, channels))]
    least, most = min(sides[0]), max(sides[0])
    others = [Shape((1, channels, side, side)) for side in (least, 2 * PIXELS, 512, 4 * most)]
    single = [Shape((1, 1, *shape.size[2:])) for shape in plain]
    if "grid_thw" in names or "image_grid_thw" in names:
        return [*patches, *rows, *merged, *films]
    if "target_sizes" in names:
        return [Shape((1, channels, patch[0], number * patch[1])), *films]
    if {"spatial_shapes", "pixel_position_ids", "image_position_ids"} & set(names):
        return [*rows, *patches, *films]
    return [*dict.fromkeys([*films, *others, *pairs, *rows, *patches, *cubes, *single])]


def _crop_and_whole(config: Any, names: Collection[str]) -> list[Shape]:
    return [Shape((1, 2, channels_of(config), *(side_of(config) or (PIXELS, PIXELS))))]


def _flattened(config: Any, names: Collection[str]) -> list[Shape]:
    """The shape of flattened patches, each after its row and column."""
    _, height, width = patch_of(config)
    numbers = size_of(_vision(config), "patch_embed_hidden_size")
    numbers = numbers if setting(config, "patch_size") is None else 0
    return [Shape((1, grid_of(config) ** 2, 2 + (numbers or channels_of(config) * height * width)))]


def _features(config: Any, names: Collection[str]) -> list[Shape]:
    audio = getattr(config, "audio_config", None) or config
    bins = size_of(audio, *_BINS) or size_of(config, *_BINS, default=80)
    # all frames, because some classes check the number
    frames = 2 * size_of(audio, "max_source_positions")
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


def _of(*names: str) -> Choices:
    """Give ``(1, 3, size)``, if the config has a size by one of these names."""
    return lambda config, _: [Shape((1, 3, size))] if (size := size_of(config, *names)) else []


def _film(config: Any, names: Collection[str]) -> list[Shape]:
    frames = size_of(_vision(config), "num_frames", "frames_per_clip", default=2)
    own = side_of(config)
    sides = [own] if own else [(336, 336), (PIXELS, PIXELS), (224, 224)]
    return [Shape((1, frames, channels_of(config), *side), steps=frames) for side in sides]


def _rows(config: Any, names: Collection[str]) -> list[Shape]:
    times, height, width = patch_of(config)
    patches = Shape((grid_of(config) ** 2, channels_of(config) * times * height * width))
    inner = size_of(config, "hidden_size", "d_model")
    return [
        patches,
        Shape((1, inner, 16)),
        Shape((1, 16, inner)),
        Shape((grid_of(config) ** 2, inner)),
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


MAIN: dict[str, Choices] = {  # given if the forward pass takes them
    "pixel_values": _pixels,
    "input_features": _features,
    "input_values": _samples,
    "image_pixel_values": _crop_and_whole,
    "audio_input_features": _features,
    "flattened_patches": _flattened,
    "protein_input_ids": _protein,
    "visual_embeds": _of("visual_embedding_dim"),
    "visual_feats": _of("visual_feat_dim"),
    "visual_pos": _of("visual_pos_dim"),
}
REQUIRED: dict[str, Choices] = {  # given only if the forward pass cannot do without them
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
TOWERS = {  # argument -> part of the config without which it is not given
    "pixel_values": "vision_config",
    "input_features": "audio_config",
    "input_values": "audio_config",
    "image_pixel_values": "vision_config",
    "audio_input_features": "audio_config",
}
