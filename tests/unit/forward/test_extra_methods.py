"""Methods beside the forward pass: weights that only those reach are proved and compared too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_pruning as tp
import transformers as hf
from torch import nn

from tp_hf_config import HFConfigSyncHook, prunable
from tp_hf_config.forward.coverage import WorkingInputs, unreached_by, working_inputs
from tp_hf_config.forward.output_tensors import methods_beside, outputs_of
from tp_hf_config.twin.tiny.tiny_model import randomise

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def blip() -> Any:
    """Its text looks at the image in ``get_multimodal_features`` alone."""
    text = {**LAYERS, "hidden_size": 32, "encoder_hidden_size": 40, "vocab_size": 60}
    image = {**LAYERS, "hidden_size": 40, "image_size": 16, "patch_size": 8}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 3, "pad_token_id": 0}
    config = hf.BlipConfig(text_config=text | tokens, vision_config=image, projection_dim=24)
    return hf.BlipModel(config)


def esm() -> Any:
    """Its contacts read the maps of attention of all heads of all layers."""
    sizes = {**LAYERS, "hidden_size": 64, "vocab_size": 60}
    return hf.EsmForMaskedLM(hf.EsmConfig(**sizes, mask_token_id=4, pad_token_id=1))


def working_of(model: nn.Module) -> WorkingInputs:
    working = working_inputs(model)
    assert isinstance(working, WorkingInputs)
    return working


@pytest.mark.parametrize(
    ("make", "methods", "only_there"),
    [
        (blip, ("get_multimodal_features",), "crossattention"),
        (esm, ("predict_contacts",), "contact_head"),
    ],
    ids=["BLIP", "ESM"],
)
def test_what_no_forward_pass_runs_is_run_by_a_method(
    make: Any, methods: tuple[str, ...], only_there: str
) -> None:
    model = make().double().eval()
    model.set_attn_implementation("eager")
    randomise(model)
    working = working_of(model)
    assert working.recipe.methods == methods
    unreached = unreached_by(model, working.inputs, working.recipe)
    assert not any(only_there in name for name in unreached)
    without = unreached_by(model, working.inputs)
    assert any(only_there in name for name in without - unreached)


class Model(nn.Module):
    """A layer for each of several methods."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.config = hf.BertConfig(vocab_size=9)
        self.table, self.head, self.other = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input_ids: Any) -> torch.Tensor:
        return self.table(input_ids)

    def get_head(self, tokens: Any, attention_mask: Any) -> torch.Tensor:
        return self.head(self.table(tokens)) * attention_mask[..., None]

    def get_same(self, input_ids: Any) -> torch.Tensor:
        return self.table(input_ids)

    def get_from_something_else(self, input_ids: Any, image: Any) -> torch.Tensor:
        return self.other(image)

    def get_nothing(self) -> None:
        raise AssertionError("it takes none of the inputs")

    def encode(self, input_ids: Any) -> torch.Tensor:
        raise ValueError("it does not run")

    def set_table(self, table: Any) -> None:
        raise AssertionError("it changes the model")


def test_only_methods_that_make_something_of_the_inputs_and_reach_more_are_taken() -> None:
    model = Model().double()
    working = working_of(model)
    inputs, recipe = working.inputs, working.recipe
    assert list(methods_beside(model, inputs)) == ["encode", "get_head", "get_same"]
    assert recipe.methods == ("get_head",)
    own, beside = outputs_of(model, inputs, recipe)
    assert torch.equal(own, model(**inputs))
    assert torch.equal(beside, model.head(own))
    assert unreached_by(model, inputs, recipe) == {"other.weight", "other.bias"}
    assert torch.equal(outputs_of(model, inputs), own)


def test_widths_of_such_layers_are_offered() -> None:
    found = {width.name: width.reason for width in prunable(esm().eval()).widths}
    for name in ("hidden_size", "num_attention_heads + hidden_size"):
        assert found.get(name, "not found") is None


def test_contacts_of_the_heads_that_are_left() -> None:
    """Columns of the contact head stand by layers, one for each head."""
    torch.manual_seed(0)
    model = esm().eval()
    before = model.esm.contact_head.regression.weight.clone()
    heads = {
        layer: model.esm.encoder.layer[layer].attention.self.query.weight.detach().clone()
        for layer in range(2)
    }
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        hooks=[HFConfigSyncHook(prune="num_attention_heads")],
    )
    pruner.step()
    assert (model.config.num_attention_heads, model.config.hidden_size) == (2, 32)
    left = []
    for layer, full in heads.items():
        query = model.esm.encoder.layer[layer].attention.self.query.weight
        rows = [
            next(r for r in range(64) if torch.isin(row, full[r]).all()) // 16
            for row in query.detach()[::16]
        ]
        left += [4 * layer + head for head in rows]
    assert torch.equal(model.esm.contact_head.regression.weight, before[:, left])
    tokens = torch.arange(6, 12)[None]
    model.set_attn_implementation("eager")
    assert model.predict_contacts(tokens, torch.ones_like(tokens)).shape == (1, 4, 4)
