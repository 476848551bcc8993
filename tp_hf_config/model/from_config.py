"""Turn a config into a model without weights: find its class, build it on the meta device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import UnsupportedModelError
from .build import Refusal, without_data

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_KINDS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "MODEL_MAPPING",
)
"""Mappings from config class to model class, in the order in which they are asked."""


def module_of(
    source: nn.Module | PreTrainedConfig, model_class: type[PreTrainedModel] | None = None
) -> nn.Module:
    """Return a module as it is, or a config's class built without weights.

    ``model_class``: the class to build from a config; None for the one it belongs to.

    Raises:
        UnsupportedModelError: no class belongs to the config, or the class refuses it.
    """
    if isinstance(source, nn.Module):
        return source
    target = class_of(source) if model_class is None else model_class
    built = without_data(target, source)
    if isinstance(built, Refusal):
        raise UnsupportedModelError(
            f"{target.__name__} cannot be built from this {type(source).__name__}: "
            f"{built.reason.rstrip('.')}. Mend the config, or say which class: model_class=."
        )
    return built


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class that a config belongs to: the one it names, or the auto classes' choice.

    Raises:
        UnsupportedModelError: no class of the installed Transformers belongs to the config.
    """
    import transformers

    for name in getattr(config, "architectures", None) or ():
        named = getattr(transformers, name, None)
        if isinstance(named, type):
            return named
    for kind in _KINDS:
        mapping: Any = getattr(transformers, kind)
        if type(config) in mapping:
            entry: Any = mapping[type(config)]
            return entry[0] if isinstance(entry, (list, tuple)) else entry  # type: ignore[no-any-return]
    raise UnsupportedModelError(
        f"no class of transformers {transformers.__version__} belongs to {type(config).__name__} "
        f"(architectures: {getattr(config, 'architectures', None)}). Say which: model_class=."
    )
