"""Run a forward pass of a class without data, to see if it runs and what it computes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import in_one_line
from ..model.build import Refusal
from ..model.config_json import configs_of
from ..model.meta_run import NoValues, RealNumbers
from ..model.shortage import note_shortage
from ..model.surroundings import same_random_state
from .inputs import example_inputs
from .run_recipe import RunRecipe


class DryPass(NamedTuple):
    """A forward pass without data that ran to its end.

    Attributes:
        inputs: the keyword arguments of the pass; only whole numbers and masks have data.
        guessed: True if values of tensors without data decide what is computed.
    """

    inputs: dict[str, Any]
    guessed: bool


def dry_pass(
    model: nn.Module, recipe: RunRecipe, watched: AbstractContextManager[Any] | None = None
) -> DryPass | Refusal:
    """Run a model on the meta device, inside ``watched``; return the pass, or the class's error.

    Its experts switch to an implementation without routing.
    """
    for config in configs_of(model):
        if hasattr(type(config), "_experts_implementation"):
            config._experts_implementation = "batched_mm"  # its shapes depend on no routing
    numbers = RealNumbers()
    try:
        with torch.no_grad(), same_random_state(), numbers:
            inputs = example_inputs(model, recipe)
            with NoValues(), watched or nullcontext():
                model(**inputs)
    except Exception as error:  # whatever a class's forward pass raises
        note_shortage(error)
        return Refusal(in_one_line(error)[:200])
    return DryPass(inputs, numbers.guessed)
