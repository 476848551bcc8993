"""Models whose layers differ, as pruning leaves them: the first layer loses another share."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import layer_zoo
import small
import torch_pruning as tp

from tp_hf_config.model.layer_entries import layer_lists_of


def pruned(
    name: str, fields: Iterable[str], first: float = 0.25, others: float = 0.5, **settings: Any
) -> Any:
    """A class of the zoo with these fields pruned, in first layers by another share.

    Args:
        name: its name in the zoo.
        fields: the fields.
        first: the share that the first layers lose.
        others: the share that the other layers lose.
        settings: more settings of the pruner or the hook.
    """
    model = layer_zoo.build(name)
    lists = layer_lists_of(model)
    firsts = [model.base_model.get_submodule(found.name)[0] for found in lists]
    hook, of_pruner = small.split(prune=tuple(fields), per_layer=True, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.MetaPruner(
            model,
            example_inputs=None,
            importance=tp.importance.GroupMagnitudeImportance(),
            pruning_ratio=others,
            pruning_ratio_dict=dict.fromkeys(firsts, first),
            hooks=[hook],
            **of_pruner,
        )
        pruner.step()
    assert type(model).__name__.startswith("Layerwise")
    return model
