"""What is written into a live model beside its config."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
import torch_pruning as tp
import transformers as hf

from tp_hf_config import ConfigSyncError, HFConfigSyncHook, drop_layers


def beit() -> Any:
    """timm's BEiT, whose keys have a bias of zeros that it does not save."""
    config = hf.TimmWrapperConfig(
        architecture="beit_base_patch16_224",
        model_args={"depth": 2, "embed_dim": 64, "num_heads": 4, "img_size": 64},
        num_labels=5,
    )
    model = hf.TimmWrapperForImageClassification(config)
    tiny.randomise(model)
    return model.eval()


def pruner_of(model: Any) -> tuple[Any, HFConfigSyncHook]:
    hook = HFConfigSyncHook(prune=("model_args.embed_dim",))
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        hooks=[hook],
    )
    return pruner, hook


def test_a_buffer_that_no_build_fills_keeps_its_number() -> None:
    model = beit()
    pruner, hook = pruner_of(model)
    pruner.step()
    names = [f"timm_model.blocks.{number}.attn.k_bias" for number in range(2)]
    assert hook.last_report.buffers == names
    for name in names:
        assert model.get_buffer(name).tolist() == [0.0] * 32
        assert model.get_buffer(name).dtype is torch.float32
    again = type(model)(copy.deepcopy(model.config)).eval()
    again.load_state_dict({f"{key}": value for key, value in model.state_dict().items()})
    pixels = torch.rand(2, 3, 64, 64)
    assert model(pixels).logits.equal(again(pixels).logits)


def test_a_buffer_of_several_numbers_that_no_build_fills_is_refused() -> None:
    model = beit()
    held = model.timm_model.blocks[1].attn.k_bias
    held.copy_(torch.arange(64))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruner, _ = pruner_of(model)
    said = (
        "TimmWrapperForImageClassification with these widths has another shape of "
        r"timm_model\.blocks\.1\.attn\.k_bias\. This buffer is not saved, and its new values "
        "cannot be computed from the config"
    )
    with pytest.raises(ConfigSyncError, match=said):
        pruner.step()
    assert model.config.model_args["embed_dim"] == 64
    assert held.equal(torch.arange(64.0))
    for name, value in model.state_dict().items():
        assert value.equal(before[name]), name


def test_a_field_that_the_config_refuses_leaves_all_as_it_was() -> None:
    """A backbone's config checks its outputs against stages, which may be named by hand."""
    names = "stage10 stage6 stage2 stem stage8 stage7 stage5 stage12 stage2 stage6 stage4 stem stem"
    config = hf.Dinov2Config(
        hidden_size=16,
        num_hidden_layers=6,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        stage_names=names.split(),
        out_features=["stage2"],
        out_indices=[2],
    )
    model = hf.Dinov2ForImageClassification(config).eval()
    before, weights = copy.deepcopy(vars(config)), copy.copy(model.state_dict())
    said = r"Dinov2Config refuses out_features=\['stage1'\]: .*\. Nothing was changed\."
    with pytest.raises(ConfigSyncError, match=said):
        drop_layers(model, layers=[0])
    assert vars(model.config) == before
    assert model.state_dict().keys() == weights.keys()
    assert all(value.equal(weights[name]) for name, value in model.state_dict().items())
