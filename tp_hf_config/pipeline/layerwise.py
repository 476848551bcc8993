"""Say how a model whose layers differ is loaded, and what the widths of each layer are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..model.config_json import field_name
from ..model.layer_class import layer_lists
from ..model.layer_entries import values_by_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Layerwise:
    """What is to be known of a saved model whose layers differ.

    Attributes:
        widths: config field -> its value in each layer.
        auto_class: the class of Transformers whose ``from_pretrained`` loads it.
        file: the name of the generated file that builds its layers.
    """

    widths: Mapping[str, tuple[Any, ...]]
    auto_class: str
    file: str

    def loading(self, folder: str) -> str:
        """Return the call that loads it from a folder."""
        return f'{self.auto_class}.from_pretrained("{folder}", trust_remote_code=True)'

    def in_one_line(self, folder: str) -> str:
        """Return how it is loaded from a folder, and why so."""
        return (
            f"layers differ: {self.loading(folder)} runs {self.file}, written by tp-hf-config, "
            "which builds each layer by its own widths; tp-hf-config export gives forms without "
            "code"
        )


def layerwise_of(model: PreTrainedModel) -> Layerwise | None:
    """Return what is to be known of a model whose layers differ; ``None`` if they do not."""
    model_class: Any = type(model)
    if not layer_lists(model_class):
        return None
    return Layerwise(
        {field_name(field): values for field, values in values_by_layer(model).items()},
        model_class._auto_class,
        f"{model_class.__module__.rpartition('.')[2]}.py",
    )
