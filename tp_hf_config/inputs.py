"""Small example inputs for any Hugging Face model, from its forward signature and its config."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import nn

from .twins import tensors_in

_TEXT_LENGTH = 8
_TEXT = ("input_ids", "decoder_input_ids")


def example_inputs(
    model: nn.Module, config: Any = None, length: int = _TEXT_LENGTH
) -> dict[str, Any]:
    """Keyword arguments for one small forward pass of ``model``, on its device.

    ``config`` is the model's own unless given (for a module that wraps a Hugging Face model).

    Text gives ``(1, length)`` token ids, vision ``(1, channels, height, width)`` pixels of the
    config's own size, speech ``(1, bins, frames)`` features or ``(1, samples)`` values.
    """
    parameters = inspect.signature(model.forward).parameters
    config = model.config if config is None else config
    parameter = next(model.parameters())
    inputs: dict[str, Any] = {}
    for name in _TEXT:
        if name in parameters:
            ids = torch.arange(1, 1 + length, device=parameter.device)[None]
            inputs[name] = ids % max(2, _setting(config, "vocab_size") or 2)
    makers: dict[str, Callable[[Any], tuple[int, ...]]] = {
        "pixel_values": _pixels,
        "input_features": _features,
        "input_values": lambda _: (1, 4000),
    }
    for name, maker in makers.items():
        if name in parameters:
            shape = maker(config)
            inputs[name] = torch.rand(shape, device=parameter.device).to(parameter.dtype)
    if "image_grid_thw" in parameters and inputs.keys() >= {"pixel_values", "input_ids"}:
        inputs.update(_image_among_text(config, inputs["input_ids"], parameter, parameters))
    if "use_cache" in parameters:
        inputs["use_cache"] = False
    return inputs


def text_alone(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a model that takes several kinds, without images and sound."""
    return {
        name: value
        for name, value in inputs.items()
        if not name.startswith(("pixel", "input_f", "input_v", "image", "mm_"))
    }


def second_sample(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs, and a second sample beside the first."""
    return {
        name: torch.cat([value, value if name.endswith("_thw") else value.flip(-1)])
        if isinstance(value, torch.Tensor)
        else value
        for name, value in inputs.items()
    }


def _image_among_text(
    config: Any, ids: torch.Tensor, parameter: torch.Tensor, wanted: Container[str]
) -> dict[str, Any]:
    """One image as a row of patches, and its tokens in front of the text (Qwen-VL's way).

    An image of ``2 m x 2 m`` patches is merged to four tokens (``m``: ``spatial_merge_size``).
    """
    vision, token = config.vision_config, config.image_token_id
    side = 2 * getattr(vision, "spatial_merge_size", 2)
    channels = next(
        (getattr(vision, key) for key in ("in_channels", "in_chans") if hasattr(vision, key)), 3
    )
    size = channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
    text = ids.masked_fill(ids == token, 1 if token != 1 else 2)
    both = torch.cat([torch.full_like(ids[:, :4], token), text], dim=1)
    pixels = torch.rand(side * side, size, device=parameter.device).to(parameter.dtype)
    grid = torch.tensor([[1, side, side]], device=parameter.device)
    inputs = {"input_ids": both, "pixel_values": pixels, "image_grid_thw": grid}
    if "mm_token_type_ids" in wanted:
        inputs["mm_token_type_ids"] = (both == token).int()
    return inputs


def tensors_with_grad(outputs: Any) -> list[torch.Tensor]:
    """Every differentiable tensor in a model's output, caches and ``None`` left out.

    Torch-Pruning's tracer fails on anything else (its ``utils.flatten_as_list``).
    """
    return [tensor for tensor in tensors_in(outputs) if tensor.grad_fn is not None]


def _setting(config: Any, name: str) -> Any:
    for part in (
        config,
        *(getattr(config, key, None) for key in ("text_config", "vision_config", "audio_config")),
    ):
        value = getattr(part, name, None)
        if value is not None:
            return value
    return None


def _pixels(config: Any) -> tuple[int, ...]:
    size = _setting(config, "image_size") or 224
    if isinstance(size, dict):
        size = (size["height"], size["width"])
    height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
    return (1, _setting(config, "num_channels") or 3, height, width)


def _features(config: Any) -> tuple[int, ...]:
    bins = _setting(config, "num_mel_bins") or 80
    positions = _setting(config, "max_source_positions") or 1500
    return (1, bins, 2 * positions)
