"""A config object that another live model holds: noticed when the hook is attached."""

from __future__ import annotations

import copy
import gc
import re
import warnings
from typing import Any

import pytest
import small
import torch_pruning as tp
import transformers as hf
from torch import nn

from tp_hf_config import ConfigSyncError, HFConfigSyncHook, PrunerSettingsWarning, pruner_kwargs
from tp_hf_config.model import live_objects

pytestmark = pytest.mark.usefixtures("every_width")


def attach(model: nn.Module, **hook: Any) -> Any:
    return tp.pruner.MetaPruner(
        model,
        **pruner_kwargs(model),
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.25,
        hooks=[HFConfigSyncHook(**hook)],
    )


def said(name: str, other: str) -> str:
    return (
        f"BasePruner of {name}: another model that is alive ({other}) holds the same config "
        "object, so its config would change too, and its weights not. Build the other one from "
        "copy.deepcopy(config), or prune copy.deepcopy(model). Nothing is pruned yet."
    )


class Around(nn.Module):
    def __init__(self, body: Any):
        super().__init__()
        self.body = body


def test_another_model_of_one_config() -> None:
    teacher = small.llama()
    student = type(teacher)(teacher.config)
    message = said("LlamaForCausalLM", "LlamaForCausalLM")
    with pytest.warns(PrunerSettingsWarning, match=re.escape(message)) as caught:
        attach(student)
    settings = [one for one in caught if one.category is PrunerSettingsWarning]
    assert [one.filename for one in settings] == [__file__]
    before = small.state_of(student), small.state_of(teacher)
    with pytest.raises(ConfigSyncError) as raised:
        attach(student, strict=True)
    assert str(raised.value) == message
    for state, model in zip(before, (student, teacher), strict=True):
        small.assert_same(state, small.state_of(model))
    attach(copy.deepcopy(student), strict=True)


def test_a_model_of_another_class_and_in_a_module_of_ones_own() -> None:
    model = small.bert()
    other = Around(hf.BertForMaskedLM(model.config))
    with pytest.warns(PrunerSettingsWarning, match=re.escape(said("BertModel", "BertForMaskedLM"))):
        attach(model)
    assert other is not None


def test_a_config_inside_the_others() -> None:
    text = small.llama()
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            image_size=16, patch_size=8,
        ),
        text_config=text.config,
        image_token_id=39,
    )  # fmt: skip
    config.text_config = text.config
    other = hf.LlavaForConditionalGeneration(config)
    with pytest.warns(PrunerSettingsWarning, match="alive \\(LlavaForConditionalGeneration\\)"):
        attach(text)
    assert other is not None


def test_parts_of_one_model_share_it() -> None:
    model = small.llama()
    for whole, part in ((model, model), (model, model.model), (Around(model), model)):
        assert whole is not None
        attach(part, strict=True)
    attach(Around(small.bert()), strict=True)


def test_models_that_are_gone_are_none() -> None:
    model = small.llama()
    gone = type(model)(model.config)
    gone.itself = [gone]  # waits for the collector
    gc.disable()
    try:
        del gone
        attach(model, strict=True)
    finally:
        gc.enable()


def test_no_warning_where_each_has_its_own() -> None:
    model, other = small.llama(), small.llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrunerSettingsWarning)
        attach(model).step()
    assert (model.config.hidden_size, other.config.hidden_size) == (24, 32)


def test_the_long_search_is_for_models_that_are_not_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[nn.Module] = []
    search = live_objects._surroundings

    def noting(model: nn.Module) -> live_objects.Surroundings:
        searched.append(model)
        return search(model)

    monkeypatch.setattr(live_objects, "_surroundings", noting)
    model, inside = small.llama(), small.llama()
    around, listed = Around(inside), nn.ModuleDict({"body": small.bert()})
    attach(model)
    assert searched == []
    attach(inside)
    attach(listed["body"])
    attach(model.model)
    assert searched == [inside, listed["body"], model.model]
    assert around is not None
