"""Spell out an architecture that a config gives by its name: the sizes that the name stands for.

Transformers builds timm's models by ``architecture``, with ``model_args`` in place of the sizes
that the name stands for (``transformers/models/timm_wrapper/configuration_timm_wrapper.py``). With
all of them written out, they are fields like others.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch

from .shortage import note_shortage
from .surroundings import replaced

NAME, ARGUMENTS = "architecture", "model_args"
_BUILD = "build_model_with_cfg"
"""timm's function that every architecture calls with its sizes (``timm/models/_builder.py``)."""
_ENDS = ("in_chans", "num_classes")
"""Arguments that say what goes in and comes out; the second one Transformers gives itself."""


def spelled_out(data: dict[str, Any]) -> dict[str, Any]:
    """Return a config's JSON with the sizes that names of architectures stand for.

    What the config gives itself comes first. An architecture stays as it is if timm is not
    installed, does not have it, or takes its sizes as descriptions of blocks (EfficientNet).
    """
    result = {k: spelled_out(v) if isinstance(v, dict) else v for k, v in data.items()}
    name, given = data.get(NAME), data.get(ARGUMENTS)
    if ARGUMENTS in data and isinstance(name, str) and isinstance(given, (dict, type(None))):
        sizes = json.loads(_sizes_of(name, json.dumps(given or {})))
        result[ARGUMENTS] = {**sizes, **given} if given else sizes or given
    return result


@functools.cache
def _sizes_of(name: str, given: str) -> str:
    """Return the arguments that an architecture gives its class, as JSON; ``{}``: none can be told.

    ``given``: the arguments that a config has for it, as JSON.
    """
    arguments = json.loads(given)
    try:
        import timm

        module = sys.modules[timm.models.model_entrypoint(name).__module__]
        build = getattr(module, _BUILD)
        passed: dict[str, Any] = {}

        def recorded(model_class: Any, *args: Any, **options: Any) -> Any:
            def made(**values: Any) -> Any:
                passed.update(values)
                return model_class(**values)

            return build(made, *args, **options)

        with torch.device("meta"):
            with replaced(module, _BUILD, recorded):
                named = timm.create_model(name, **arguments)
            sizes = {k: v for k, v in passed.items() if _is_setting(v) and k not in _ENDS}
            spelled = timm.create_model(name, **{**sizes, **arguments})
    except Exception as error:  # an architecture may refuse with any exception
        note_shortage(error)
        return "{}"
    in_blocks = any(isinstance(leaf, dict) for value in passed.values() for leaf in _leaves(value))
    return "{}" if in_blocks or str(spelled) != str(named) else json.dumps(sizes)


def _leaves(value: Any) -> Iterator[Any]:
    """Yield what is in lists, however nested, or a value itself."""
    if isinstance(value, (list, tuple)):
        for entry in value:
            yield from _leaves(entry)
    else:
        yield value


def _is_setting(value: Any) -> bool:
    """True for a number or a name, and for a list of those; ``None`` sets nothing."""
    return all(isinstance(leaf, (bool, int, float, str)) for leaf in _leaves(value))
