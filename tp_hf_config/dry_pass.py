"""A forward pass of a class without data: does it run at some widths, and what does it compute?"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from .around import configs_of
from .dry_run import NoValues, RealNumbers
from .inputs import example_inputs
from .reference import Refusal


class DryPass(NamedTuple):
    """One that came to its end.

    Attributes:
        inputs: what went in, without data.
        guessed: values decide what is computed, and none are known.
    """

    inputs: dict[str, Any]
    guessed: bool


def dry_pass(
    model: nn.Module, watched: AbstractContextManager[Any] | None = None
) -> DryPass | Refusal:
    """Run a model on the meta device; its experts' implementation becomes one without routing.

    Args:
        model: a class built without data.
        watched: a mode that looks at the forward pass.

    Returns:
        The pass, or what the class breaks off with.
    """
    for config in configs_of(model):
        if hasattr(type(config), "_experts_implementation"):
            config._experts_implementation = "batched_mm"  # its shapes depend on no routing
    numbers = RealNumbers()
    try:
        with torch.no_grad(), numbers:
            inputs = example_inputs(model)
            with NoValues(), watched or nullcontext():
                model(**inputs)
    except Exception as error:  # whatever a class's forward pass raises
        return Refusal(" ".join(str(error).split())[:200])
    return DryPass(inputs, numbers.guessed)
