"""Measure how much each layer of a list changes the hidden states (block influence)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import CalibrationError
from ..forward.layer_passes import hidden_in, hidden_out
from .batches import Batch
from .over_ranks import ALONE, Ranks
from .passes import watched_pass


def layer_influence(
    model: nn.Module, layers: Sequence[nn.Module], batches: Sequence[Batch], ranks: Ranks = ALONE
) -> tuple[float, ...]:
    """Return each layer's block influence: 1 - the cosine of what goes in and what comes out.

    It is the mean over all tokens (ShortGPT, arXiv 2403.03853). A layer of 0 changes nothing.

    ``layers``: the layers, in their order.
    ``ranks``: the ranks that run it, each on batches of its own.

    Raises:
        CalibrationError: a layer does not run on the data, or changes the shape of what goes in.
    """
    sums, tokens = [0.0] * len(layers), [0.0] * len(layers)

    def watch(number: int) -> Any:
        def note(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before, after = hidden_in(args, kwargs), hidden_out(output)
            if before is not None and after is not None and before.shape == after.shape:
                axis = _channel_axis(layer, before.shape)
                cosines = torch.cosine_similarity(before.double(), after.double(), dim=axis)
                sums[number] += float((1 - cosines).sum())
                tokens[number] += cosines.numel()

        return note

    handles = [
        layer.register_forward_hook(watch(number), with_kwargs=True)
        for number, layer in enumerate(layers)
    ]
    try:
        watched_pass(model, batches, what="influence of layers", ranks=ranks)
    finally:
        for handle in handles:
            handle.remove()
    sums, tokens = ranks.sums(sums), ranks.sums(tokens)
    unseen = [number for number, count in enumerate(tokens) if count == 0]
    if unseen:
        raise CalibrationError(
            f"{type(layers[unseen[0]]).__name__} {unseen[0]} passes no hidden states on for the "
            "calibration data, so its influence cannot be measured. Say which layers to drop: "
            "drop_layers(model, layers=[...])"
        )
    return tuple(total / count for total, count in zip(sums, tokens, strict=True))


def _channel_axis(layer: nn.Module, shape: torch.Size) -> int:
    """Return the axis of the channels of a layer's hidden states.

    It is the last but for images, ``(batch, channels, height, width)``, which are told from
    ``(batch, height, width, channels)`` by the first parameter that is as long as one of the two.
    """
    if len(shape) != 4:
        return -1
    for parameter in layer.parameters():
        if shape[1] in parameter.shape:
            return 1
        if shape[-1] in parameter.shape:
            return -1
    return 1
