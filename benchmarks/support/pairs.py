"""Which (task, model type) pairs are measured, and from which config each is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TASKS = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq-lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}
BARE = "model"
"""The bare model, of the types that none of the tasks has."""


@dataclass(frozen=True, order=True)
class Pair:
    """One class of transformers.

    Attributes:
        task: a key of ``TASKS``, or ``BARE``.
        type: the model type, as in ``config.json``.
        class_name: the class that the task has for it.
    """

    task: str
    type: str
    class_name: str

    @property
    def name(self) -> str:
        """For file names."""
        return f"{self.task}.{self.type}"


def all_pairs() -> list[Pair]:
    """Every pair of the installed transformers."""
    from transformers.models.auto import modeling_auto

    found: dict[Pair, None] = {}
    for task, mapping in TASKS.items():
        for model_type, name in getattr(modeling_auto, mapping, {}).items():
            found[Pair(task, model_type, _first(name))] = None
    have = {pair.type for pair in found}
    for model_type, name in modeling_auto.MODEL_MAPPING_NAMES.items():
        if model_type not in have:
            found[Pair(BARE, model_type, _first(name))] = None
    return list(found)


def _first(name: Any) -> str:
    return str(name) if isinstance(name, str) else str(name[0])


def config_of(pair: Pair) -> Any:
    """The class's default config; where the default builds no model, the nearest that does."""
    import transformers
    from recipes import RECIPES

    config_class = transformers.CONFIG_MAPPING[pair.type]
    recipe = RECIPES.get(pair.name) or RECIPES.get(pair.type)
    config = config_class() if recipe is None else recipe(config_class)
    # as the auto classes do: a text model is built from the text's part of a larger config
    wanted = getattr(getattr(transformers, pair.class_name), "config_class", None)
    for name, part in getattr(config, "sub_configs", {}).items():
        if part is wanted and not isinstance(config, wanted):
            return getattr(config, name)
    return config
