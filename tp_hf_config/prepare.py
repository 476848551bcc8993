"""What a pruner's constructor has to be told about a Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .errors import UnsupportedModelError
from .inputs import example_inputs, tensors_with_grad
from .learn import map_of
from .locate import check_followable, find_pretrained
from .widths import WidthView


def pruner_kwargs(
    model: nn.Module,
    *,
    prune: Iterable[str] | None = None,
    prune_num_heads: bool = False,
    prune_head_dims: bool | None = None,
    round_to: int | None = None,
) -> dict[str, Any]:
    """Arguments for a Torch-Pruning pruner of this model, learned from its class.

    They name the example inputs, how to read the outputs, the layers that must keep their width
    (output layers, grouped-query projections), the head counts, fused layers, and the rounding
    without which the class refuses the config. Every dict and list is fresh.

    Args:
        model: a ``PreTrainedModel``, or a module that contains exactly one.
        prune: config fields to prune (``("intermediate_size",)``); default: every width that
            tracing can prune and the config can say for any ratio.
        prune_num_heads: whole attention heads are going to be pruned
            (``head_pruning_ratio=`` in the constructor).
        prune_head_dims: the same number of dimensions of every head is going to be pruned. By
            default only where the class has no other way to make the hidden size smaller (BERT).
        round_to: a multiple that widths shall have besides what the class asks for.

    Returns:
        Keyword arguments; pass them on with ``**``.

    Raises:
        UnsupportedModelError: no single followable Hugging Face model, or a field in ``prune``
            that cannot be pruned, with the fields that can.
    """
    _, pretrained = find_pretrained(model)
    check_followable(pretrained)
    view = WidthView(pretrained, map_of(pretrained))
    selected = view.select(prune, prune_num_heads)
    coupled = view.coupled(selected)
    if prune_head_dims is None:
        prune_head_dims = bool(coupled) and not prune_num_heads
    if prune_head_dims and view.rotates_head_dims():
        raise UnsupportedModelError(
            f"{type(pretrained).__name__} encodes positions in its head dims (its position tables "
            "are as wide as a head), so they are not interchangeable. Leave prune_head_dims out, "
            "or prune whole heads (prune_num_heads=True)."
        )
    use_heads = prune_num_heads or prune_head_dims
    heads = {
        module: count
        for name, module, count in view.head_layers()
        if use_heads and view.plain_heads(name)
    }
    return {
        "example_inputs": example_inputs(model, pretrained.config),
        "output_transform": tensors_with_grad,
        "num_heads": heads,
        "in_channel_groups": {},
        "out_channel_groups": {**view.fused(selected), **heads},
        "ignored_layers": view.ignored(selected, set(heads)) + _around(model, pretrained),
        "unwrapped_parameters": view.bare_parameters(selected),
        "prune_num_heads": prune_num_heads,
        "prune_head_dims": prune_head_dims,
        **view.rounding(selected, coupled, round_to, prune_num_heads),
    }


def _around(model: nn.Module, pretrained: nn.Module) -> list[nn.Module]:
    """Layers of a wrapper outside the Hugging Face model in it: no config speaks of them."""
    inside = set(pretrained.modules())
    return [
        module
        for module in model.modules()
        if module not in inside and any(True for _ in module.parameters(recurse=False))
    ]
