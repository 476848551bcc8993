"""Architectures that a config gives by their names, as timm's."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import timm
import torch_pruning as tp
import transformers as hf
import zoo

from tp_hf_config import HFConfigSyncHook
from tp_hf_config.model.config_json import _sizes_of, config_json, spelled_out

VIT = {"architecture": "vit_tiny_patch16_224"}
OF_VIT = {
    "patch_size": 16,
    "embed_dim": 192,
    "depth": 12,
    "num_heads": 3,
    "img_size": [224, 224],
}


@pytest.mark.parametrize(
    ("data", "arguments"),
    [
        ({**VIT, "model_args": None}, OF_VIT),
        ({**VIT, "model_args": {"depth": 2}}, {**OF_VIT, "depth": 2}),
        ({"architecture": "resnet18", "model_args": None}, {"layers": [2, 2, 2, 2]}),
        # sizes in descriptions of blocks, which no config field holds
        ({"architecture": "mobilenetv5_300m_enc", "model_args": None}, None),
        # and its function refuses to be given them
        ({"architecture": "efficientnet_b0", "model_args": None}, None),
        ({"architecture": "efficientnet_b0", "model_args": {}}, {}),
        ({"architecture": "no such architecture", "model_args": None}, None),
        ({"architecture": "vit_tiny_patch16_224", "model_args": {"depht": 2}}, {"depht": 2}),
        ({"architecture": None, "model_args": None}, None),
    ],
    ids=repr,
)
def test_the_sizes_that_a_name_stands_for(
    data: dict[str, Any], arguments: dict[str, Any] | None
) -> None:
    nested = {"vision_config": {"model_type": "timm_wrapper", **data}, "hidden_size": 64}
    before = copy.deepcopy(nested)
    expected = {**data, "model_type": "timm_wrapper", "model_args": arguments}
    assert spelled_out(nested) == {"vision_config": expected, "hidden_size": 64}
    assert spelled_out(data) == {**data, "model_args": arguments}
    assert nested == before


def test_features_of_stages_are_spelled_out_too() -> None:
    given = {"features_only": True, "out_indices": [0, 1]}
    data = spelled_out({"architecture": "repvit_m1", "model_args": given})
    assert data["model_args"] == {
        "embed_dim": [48, 96, 192, 384],
        "depth": [2, 2, 14, 2],
        "legacy": True,
        **given,
    }


def test_a_config_without_arguments_has_no_name_to_spell_out() -> None:
    """Other classes call something else their architecture."""
    assert spelled_out(VIT) == VIT


def test_a_name_stays_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    _sizes_of.cache_clear()
    monkeypatch.setitem(sys.modules, "timm", None)
    data = {**VIT, "model_args": None}
    assert spelled_out(data) == data
    _sizes_of.cache_clear()


def test_a_name_stays_where_its_sizes_build_something_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An architecture may look at which arguments it is given."""
    create = timm.create_model

    def created(name: str, **given: Any) -> Any:
        return create(name, **{**given, "depth": 1} if "embed_dim" in given else given)

    _sizes_of.cache_clear()
    monkeypatch.setattr(timm, "create_model", created)
    data = {**VIT, "model_args": None}
    assert spelled_out(data) == data
    _sizes_of.cache_clear()


def pruned(architecture: str, field: str) -> tuple[Any, HFConfigSyncHook]:
    config = hf.TimmWrapperConfig(architecture=architecture, num_labels=5)
    model = hf.TimmWrapperForImageClassification(config).eval()
    hook = HFConfigSyncHook(prune=(field,))
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        hooks=[hook],
    )
    pruner.step()
    return model, hook


@pytest.mark.parametrize(
    ("architecture", "field", "changed", "arguments"),
    [
        ("test_vit", "embed_dim", (64, 32), {"embed_dim": 32}),
        (
            "test_convnext",
            "dims[1]",
            ([24, 32, 48, 64], [24, 16, 48, 64]),
            {"dims": [24, 16, 48, 64]},
        ),
    ],
)
def test_a_config_gets_the_arguments_that_differ_from_its_name(
    architecture: str, field: str, changed: tuple[Any, Any], arguments: dict[str, Any]
) -> None:
    model, hook = pruned(architecture, f"model_args.{field}")
    (name, values) = next(iter(hook.last_report.fields.items()))
    assert (name, values) == (f"model_args.{field.partition('[')[0]}", changed)
    assert model.config.model_args == arguments
    again = type(model)(copy.deepcopy(model.config))
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


def test_what_fails_leaves_a_config_without_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    model = zoo.build("timm_vit")
    model.config.model_args = None
    model = type(model)(model.config).eval()
    hook = HFConfigSyncHook(prune=("model_args.embed_dim",))
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        hooks=[hook],
    )
    before = config_json(model.config)
    monkeypatch.setattr("tp_hf_config.hook.follow.write_ties", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pruner.step()
    assert model.config.model_args is None
    assert config_json(model.config) == before
