"""Turn a config into a model without weights: find its class, build it on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import UnsupportedModelError
from .build import Refusal, without_data
from .config_json import FieldPath, field_name
from .shapes import shapes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_MOST_LAYERS = 10_000
_LARGEST = 2**28  # a dimension of a parameter; experiments count its units one by one
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
    reason = too_many_layers(source.to_dict())
    built = without_data(target, source) if reason is None else Refusal(reason)
    for name, shape in () if isinstance(built, Refusal) else shapes(built).items():
        if max(shape, default=0) > _LARGEST:
            built = Refusal(f"{name} would be {list(shape)}, larger than in any model")
            break
    if isinstance(built, Refusal):
        raise UnsupportedModelError(
            f"{target.__name__} cannot be built from this {type(source).__name__}: "
            f"{built.reason.rstrip('.')}. Mend the config, or say which class: model_class=."
        )
    return built


def too_many_layers(data: Mapping[str, Any], path: FieldPath = ()) -> str | None:
    """Return why a config, as JSON, has more layers than any model; ``None``: it has not."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            reason = too_many_layers(value, (*path, key))
            if reason is not None:
                return reason
        elif key == "num_hidden_layers" and isinstance(value, int) and value > _MOST_LAYERS:
            name = field_name((*path, key))
            return f"{name} says {value:,}, and no model has more than {_MOST_LAYERS:,} layers"
    return None


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
