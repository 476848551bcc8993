"""Export to ``"padded"``: stock class, stock config, every layer as wide as the widest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..fieldmap.learn_field_map import map_of
from ..model.build import Refusal
from ..model.config_json import FieldPath, field_name, with_values
from ..model.layer_class import auto_classes, stock_class
from ..model.layer_entries import uniform_json
from .exported import Fields, Ready, Request
from .output import save_model
from .padding import LayerWidths, Padded, largest, layer_widths, pad
from .padding_proof import SameOutputs, prove_padding
from .roundtrip import prove_roundtrip

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prepare(request: Request) -> Ready | Refusal:
    """Pad a model and prove that it computes the same.

    Returns:
        The padded model, ready to be written; or a refusal that says why the stock class cannot
        hold it.
    """
    model = request.model
    result = padded_alike(model, request.multiple_of or 1)
    if isinstance(result, Refusal):
        return result
    padded, widths, values, proof = result
    recipe = map_of(model).recipe

    def write(folder: Path) -> None:
        stock: Any = padded.model
        save_model(stock, folder)
        prove_roundtrip(stock, folder, recipe)

    stock_model = padded.model
    auto = auto_classes(type(stock_model.config), type(stock_model))[0]
    return Ready(
        write,
        _fields(widths, values),
        stock_model.num_parameters(),
        proof,
        loading=f"{auto}.from_pretrained(folder)",
    )


def padded_alike(
    model: PreTrainedModel, multiple_of: int = 1
) -> tuple[Padded, LayerWidths, dict[FieldPath, int], SameOutputs] | Refusal:
    """Pad every layer to the widest, and prove it.

    Args:
        model: a model whose layers differ.
        multiple_of: what a padded width has to be a multiple of, unless it counts heads.

    Returns:
        The padded model of the stock class, the widths before, the fields' values, and the
        comparison of outputs; or a refusal.
    """
    widths = layer_widths(model)
    values = largest(widths, multiple_of)
    if isinstance(values, Refusal):
        return values
    data = with_values(uniform_json(widths.data), values)
    padded = pad(model, widths, stock_class(type(model)), data)
    if isinstance(padded, Refusal):
        return padded
    proof = prove_padding(model, padded)
    return proof if isinstance(proof, Refusal) else (padded, widths, values, proof)


def _fields(widths: LayerWidths, values: dict[FieldPath, int]) -> Fields:
    """Return the fields that changed, with their values by layer before and after."""
    before = {field: tuple(widths.values_of(field)) for field in values}
    return {
        field_name(field): (old, (values[field],) * len(old))
        for field, old in before.items()
        if set(old) != {values[field]}
    }
