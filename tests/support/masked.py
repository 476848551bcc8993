"""The masked check on any model, pruned anyhow: as the library makes it of what it cuts itself."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tp_hf_config.forward.observed_pass import PassResult
from tp_hf_config.forward.run_recipe import PLAIN, RunRecipe
from tp_hf_config.model.build import Refusal
from tp_hf_config.twin.masked_check import difference_of_pass, pruned_pass, run_once


def masked_difference(
    original: nn.Module,
    pruned: nn.Module,
    reference_build: nn.Module,
    inputs: Mapping[str, Any],
    watched: Sequence[PassResult] = (),
    recipe: RunRecipe = PLAIN,
) -> Refusal | None:
    """Return where a pruned model differs from the masked original, or None if nowhere.

    Args:
        original: the model before pruning, every weight random, in float64 and eval mode.
        pruned: the model after pruning.
        reference_build: the class built anew from the pruned model's config. Its weights may have
            any values; its scales count.
        inputs: keyword arguments of one forward pass of the original.
        watched: intermediate results that are compared like outputs.
        recipe: how the class is run.
    """
    pruned_run = pruned_pass(original, pruned, inputs, watched, recipe)
    if isinstance(pruned_run, Refusal):
        return pruned_run
    if reference_build is not pruned:
        run_once(reference_build, pruned_run.inputs, recipe)
    warmed_up = run_once(copy.deepcopy(original), inputs, recipe)
    return difference_of_pass(pruned_run, warmed_up, reference_build, inputs, watched, recipe)
