"""The config builds what the live model has and nothing else: at attach, and at every sync."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch_pruning as tp
import transformers as hf
from torch import nn

from tp_hf_config import (
    ConfigSyncError,
    HFConfigSyncHook,
    UnsupportedModelError,
    plan,
    prunable,
)

pytestmark = pytest.mark.usefixtures("every_width")
IDS = torch.tensor([[3, 5, 7, 11]])
RANDOM = "which the model does not have, so a reload would add {} with random values. "
DISAGREE = " and its config disagree before any pruning: "


def attached(model: nn.Module) -> tuple[HFConfigSyncHook, Any]:
    hook = HFConfigSyncHook()
    return hook, tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.25,
        hooks=[hook],
    )


def refused(model: Any) -> str:
    """What every entrance says; nothing is changed."""
    before = small.state_of(model)
    said = set()
    for entrance in (attached, prunable, plan):
        with pytest.raises(UnsupportedModelError) as raised:
            entrance(model)
        said.add(str(raised.value))
    pruner = tp.pruner.MetaPruner.__new__(tp.pruner.MetaPruner)
    pruner.model, pruner.DG = model, None
    with pytest.raises(UnsupportedModelError) as raised:
        HFConfigSyncHook().attach(pruner)
    said.add(str(raised.value))
    small.assert_same(before, small.state_of(model))
    (message,) = said
    return message


def smollm3(*rope: int) -> Any:
    torch.manual_seed(0)
    config = hf.SmolLM3Config(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=len(rope),
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32,
        no_rope_layers=list(rope), pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return hf.SmolLM3ForCausalLM(config).eval()


def t5() -> Any:
    torch.manual_seed(0)
    config = hf.T5Config(
        vocab_size=40, d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=3,
        num_decoder_layers=4,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config).eval()


# Layers that are gone


def test_layers_that_the_config_still_counts() -> None:
    model = small.llama(num_hidden_layers=4)
    model.model.layers = model.model.layers[:2]
    assert refused(model) == (
        "LlamaForCausalLM" + DISAGREE + "the config builds model.layers.2, model.layers.3, "
        + RANDOM.format("them") + "Set config.num_hidden_layers = 2."
    )  # fmt: skip


def test_what_the_message_says_is_enough(tmp_path: Path) -> None:
    model = small.llama(num_hidden_layers=4)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    hook, pruner = attached(model)
    pruner.step()
    assert hook.last_report.fields == {"hidden_size": (32, 24), "intermediate_size": (64, 48)}
    assert hook.last_report.notes == []
    model.save_pretrained(tmp_path)
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, again(IDS).logits)


def test_one_layer_too_many_of_many() -> None:
    model = small.llama(num_hidden_layers=3)
    model.model.layers = model.model.layers[:2]
    assert refused(model) == (
        "LlamaForCausalLM" + DISAGREE + "the config builds model.layers.2, "
        + RANDOM.format("it") + "Set config.num_hidden_layers = 2."
    )  # fmt: skip


def test_lists_with_an_entry_for_each_layer_are_named_too() -> None:
    model = smollm3(1, 0, 1, 1)
    model.model.layers = model.model.layers[:2]
    lists = [key for key in ("layer_types", "no_rope_layers") if getattr(model.config, key)]
    assert refused(model).endswith(
        "Set config.num_hidden_layers = 2"
        + "".join(f" and config.{key} to the entries of the 2 layers that remain" for key in lists)
        + "."
    )


def test_layers_of_two_stacks() -> None:
    model = t5()
    model.encoder.block, model.decoder.block = model.encoder.block[:1], model.decoder.block[:2]
    assert refused(model) == (
        "T5ForConditionalGeneration" + DISAGREE + "the config builds encoder.block.1, "
        "encoder.block.2, decoder.block.2 and 1 more, " + RANDOM.format("them")
        + "Set config.num_layers = 1 and config.num_decoder_layers = 2."
    )  # fmt: skip


def test_a_layer_that_goes_after_the_hook_was_attached() -> None:
    model = small.llama(num_hidden_layers=3)
    hook, pruner = attached(model)
    pruner.step()
    model.model.layers = model.model.layers[:2]
    before = small.state_of(model)
    with pytest.raises(ConfigSyncError) as synced:
        hook.sync()
    assert str(synced.value) == (
        "LlamaForCausalLM and its config disagree: the config builds model.layers.2, "
        + RANDOM.format("it")
        + "Set config.num_hidden_layers = 2. Nothing was written. Continue to prune, then call "
        "hook.sync()."
    )
    small.assert_same(before, small.state_of(model))
    model.config.num_hidden_layers = 2
    assert hook.sync().proof == (
        "proved: 21 tensors have the shapes that LlamaForCausalLM builds from the new config.json"
    )


def test_a_pruner_of_layers_that_are_gone_does_not_begin_a_step() -> None:
    for change, what in (
        (
            lambda model: setattr(model.model, "layers", model.model.layers[:1]),
            "lost model.layers.1",
        ),
        (lambda model: setattr(model, "gate", nn.Linear(4, 4)), "gained gate"),
    ):
        model = small.llama()
        _, pruner = attached(model)
        change(model)
        before = small.state_of(model)
        with pytest.raises(UnsupportedModelError) as raised:
            pruner.step()
        assert str(raised.value) == (
            f"LlamaForCausalLM has {what} since the hook was attached, so the pruner's groups are "
            "out of date. Make a new pruner for this model. This step pruned nothing."
        )
        small.assert_same(before, small.state_of(model))


# Layers in another order


def test_layers_of_one_kind_in_another_order_are_noted(tmp_path: Path) -> None:
    model = small.llama(num_hidden_layers=3)
    model.model.layers = nn.ModuleList(reversed(model.model.layers))
    hook, pruner = attached(model)
    pruner.step()
    assert hook.last_report.notes == [
        "the layers of model.layers are not in their original order (layer_idx says 2, 1, 0). A "
        "reload numbers them again"
    ]
    model.save_pretrained(tmp_path)
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, again(IDS).logits)


def test_layers_of_another_kind_than_the_config_builds_there() -> None:
    model = smollm3(1, 0, 1, 1)
    model.model.layers = nn.ModuleList(reversed(model.model.layers))
    assert refused(model) == (
        "SmolLM3ForCausalLM" + DISAGREE + "the layers of model.layers are in another order than "
        "they were built in: model.layers.1.self_attn.use_rope "
        "is 1, but the config builds 0 in this place. Put the "
        "config's entries for single layers into the same order."
    )
    model.config.no_rope_layers = [1, 1, 0, 1]
    hook, pruner = attached(model)
    pruner.step()
    assert [note[:60] for note in hook.last_report.notes] == [
        "the layers of model.layers are not in their original order ("
    ]


# Parts that are gone


@pytest.mark.parametrize("kind", [hf.BertForSequenceClassification, hf.LlamaForCausalLM])
def test_a_head_that_was_taken_off(kind: Any) -> None:
    model = kind((small.bert() if kind.__name__.startswith("B") else small.llama()).config).eval()
    head, inner, name = (
        ("classifier", "bert", "Bert")
        if hasattr(model, "classifier")
        else ("lm_head", "model", "Llama")
    )
    setattr(model, head, nn.Identity())
    assert refused(model) == (
        f"{kind.__name__}" + DISAGREE + f"the config builds {head}, " + RANDOM.format("it")
        + f"No number of layers in {name}Config describes this model: put the missing part back, "
          f"or prune only the {name}Model inside (model.{inner})."
    )  # fmt: skip
    hook, pruner = attached(getattr(model, inner))
    pruner.step()
    assert hook.last_report.error is None


# What a constructor is told beside the config


@pytest.mark.parametrize("taken_off", [False, True])
def test_a_part_that_the_class_was_told_to_leave_out(taken_off: bool, tmp_path: Path) -> None:
    model = hf.BertModel(small.bert().config, add_pooling_layer=taken_off).eval()
    model.pooler = None
    hook, pruner = attached(model)
    pruner.step()
    assert hook.last_report.fields == {"hidden_size": (32, 24), "intermediate_size": (64, 48)}
    assert hook.last_report.notes == [
        "BertModel was built with add_pooling_layer=False, which no config stores. Load it with "
        "BertModel.from_pretrained(folder, add_pooling_layer=False); otherwise you get pooler "
        "added with random values"
    ]
    model.save_pretrained(tmp_path)
    again = hf.BertModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).last_hidden_state, again(IDS).last_hidden_state)


def test_a_part_that_the_class_was_told_to_add(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = hf.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=8,
    )  # fmt: skip
    told = {"add_pooling_layer": False, "use_mask_token": True}
    model = hf.ViTModel(config, **told).eval()
    hook, pruner = attached(model)
    pruner.step()
    assert model.embeddings.mask_token.shape == (1, 1, 24)
    assert hook.last_report.notes == [
        "ViTModel was built with add_pooling_layer=False, use_mask_token=True, which no config "
        "stores. Load it with ViTModel.from_pretrained(folder, add_pooling_layer=False, "
        "use_mask_token=True); otherwise you get pooler added with random values and "
        "embeddings.mask_token left out"
    ]
    model.save_pretrained(tmp_path)
    again = hf.ViTModel.from_pretrained(tmp_path, **told).eval()
    assert again.state_dict().keys() == model.state_dict().keys()


def test_tied_weights_and_parts_of_a_model_are_whole() -> None:
    for model in (
        small.llama(tie_word_embeddings=True),
        small.llama().model,
        small.roberta(),
        t5(),
    ):
        hook, pruner = attached(model)
        pruner.step()
        assert hook.last_report.error is None
        assert hook.last_report.notes == []
