"""How a class is run, as it was seen: to be kept with what was learned by running it so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..model.build import attention_of
from ..model.disk_cache import load, store
from .encoder_states import States, reads_of
from .extra_methods import methods_of
from .inputs import form_of


@dataclass(frozen=True)
class RunRecipe:
    """How experiments run a class.

    Attributes:
        form: the number of the form of its inputs; None: the first that runs has yet to be found.
        methods: methods that run what the forward pass leaves out.
        attention: the attention to use, if eager attention computes NaN.
        states: the encoder states that it reads, if any.
    """

    form: int | None = None
    methods: tuple[str, ...] = ()
    attention: str | None = None
    states: States | None = None


def stored(cls: type, key: str) -> dict[str, Any] | None:
    """Return an entry of the cache on disk, and run the class as it was run then; None: none."""
    entry: dict[str, Any] | None = load(key)
    if entry is not None:
        follow_recipe(cls, entry["recipe"])
    return entry


def keep(cls: type, key: str, **entry: Any) -> None:
    """Write an entry of the cache on disk, with how the class was run."""
    store(key, {**entry, "recipe": recipe_of(cls)})


def recipe_of(cls: type) -> RunRecipe:
    """Return how a class is run, as far as that was seen."""
    return RunRecipe(
        form_of.get(cls), methods_of.get(cls, ()), attention_of.get(cls), reads_of.get(cls)
    )


def follow_recipe(cls: type, recipe: RunRecipe) -> None:
    """Run a class as a recipe says from now on."""
    if recipe.form is not None:
        form_of[cls] = recipe.form
    if recipe.methods:
        methods_of[cls] = recipe.methods
    if recipe.attention is not None:
        attention_of[cls] = recipe.attention
    if recipe.states is not None:
        reads_of[cls] = recipe.states
