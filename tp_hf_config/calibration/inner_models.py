"""Find the models of Transformers in any module."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def models_in(module: nn.Module) -> list[PreTrainedModel]:
    """Return the outermost models of Transformers in a module; the module alone if it is one."""
    from transformers import PreTrainedModel

    found: list[PreTrainedModel] = []
    inside: set[nn.Module] = set()
    for each in module.modules():  # a module comes before its parts
        if isinstance(each, PreTrainedModel) and each not in inside:
            found.append(each)
            inside.update(each.modules())
    return found


def is_encoder_decoder(module: nn.Module) -> bool:
    """True if a module is, or contains, a model with an encoder and a decoder.

    A class on the encoder alone (``T5ForTokenClassification``) may have the config of both.
    """
    return any(
        any(name.startswith("decoder") for name in inspect.signature(each.forward).parameters)
        for each in models_in(module)
        if getattr(each.config, "is_encoder_decoder", False)
    )


def takes_token_ids(model: nn.Module) -> bool:
    """True if the main input of a model of Transformers is token ids; False for other modules."""
    return getattr(model, "main_input_name", None) == "input_ids"


def runs_on_text(model: nn.Module) -> bool:
    """True if a model needs nothing but the token ids of a text: no images, no decoder's ids."""
    kinds = getattr(model, "input_modalities", "text")
    alone = kinds == "text" or tuple(kinds) == ("text",)
    return takes_token_ids(model) and alone and not is_encoder_decoder(model)
