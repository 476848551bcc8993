"""What a pruner's arguments mean on the graph made from the config, which is not traced."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

_NO_TRACE = (
    "Leave it out, or have Torch-Pruning trace the model: pruner_kwargs(model, graph='trace')."
)
_WITHOUT_EFFECT = {
    "customized_pruners": "it cuts the parameters of every layer by itself, and what a layer "
    "notes of its widths follows",
    "unwrapped_parameters": "it knows which dimensions of bare parameters follow a config field",
    "forward_fn": "no forward pass is run to make it",
}
_CONSTRAINTS = ("in_channel_groups", "out_channel_groups", "channel_groups")


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Warn of arguments that are not needed; refuse those that ask for other groups of channels.

    Raises:
        ValueError: channels shall go together that the graph made from the config has apart.
    """
    for name in _CONSTRAINTS:
        if arguments.get(name):
            layers = ", ".join(sorted({type(layer).__name__ for layer in arguments[name]}))
            raise ValueError(
                f"{name}= (for {layers}) on the graph made from the config: which channels of a "
                "layer go together (fused layers, heads, grouped norms) it knows by experiment, "
                f"and others cannot be asked for. {_NO_TRACE}"
            )
    for name, why in _WITHOUT_EFFECT.items():
        if arguments.get(name):
            warnings.warn(
                f"{name}= has no effect on the graph made from the config: {why}. {_NO_TRACE}",
                stacklevel=2,
            )
