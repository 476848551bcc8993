"""What is written into a live model beside its config."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
import torch_pruning as tp
import transformers as hf

from tp_hf_config import ConfigSyncError, HFConfigSyncHook


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
