"""A model without weights from a config: which class it is, built on the meta device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from .errors import UnsupportedModelError
from .locate import check_followable, find_pretrained
from .reference import Refusal, without_data

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


def model_of(
    source: nn.Module | PreTrainedConfig, model_class: type[PreTrainedModel] | None = None
) -> PreTrainedModel:
    """The Hugging Face model that is meant; of a config, the class without weights.

    Raises:
        UnsupportedModelError: no class for the config, or one that refuses it; no single model.
        TypeError: neither a module nor a config.
    """
    if isinstance(source, nn.Module):
        _, model = find_pretrained(source)
        check_followable(model, weights=False)
        return model
    from transformers import PretrainedConfig

    if not isinstance(source, PretrainedConfig):
        raise TypeError(
            f"{type(source).__name__}: expected a Hugging Face model, a module that contains one, "
            "or a config (AutoConfig.from_pretrained(folder))"
        )
    found = class_of(source) if model_class is None else model_class
    built = without_data(found, source)
    if isinstance(built, Refusal):
        raise UnsupportedModelError(
            f"{found.__name__} cannot be built from this {type(source).__name__}: "
            f"{built.reason.rstrip('.')}. Mend the config, or say which class: model_class=."
        )
    return built


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a config belongs to: the one it names, or what the auto classes make of it.

    Raises:
        UnsupportedModelError: there is none.
    """
    import transformers

    for name in getattr(config, "architectures", None) or ():
        named = getattr(transformers, name, None)
        if isinstance(named, type):
            return named
    for kind in _KINDS:
        mapping: Any = getattr(transformers, kind)
        if type(config) in mapping:
            found: Any = mapping[type(config)]
            return found[0] if isinstance(found, (list, tuple)) else found  # type: ignore[no-any-return]
    raise UnsupportedModelError(
        f"no class of transformers {transformers.__version__} belongs to {type(config).__name__} "
        f"(architectures: {getattr(config, 'architectures', None)}). Say which: model_class=."
    )
