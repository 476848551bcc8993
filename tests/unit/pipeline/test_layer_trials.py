"""Layers that differ and dropped layers, tried at tiny size; and what a wrong one looks like."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import layer_zoo
import pytest
import small
import torch
import transformers as hf
import zoo

from tp_hf_config import ConfigSyncError, drop_layers
from tp_hf_config.model.build import Refusal, without_data
from tp_hf_config.pipeline import support
from tp_hf_config.pipeline.support import Subject, attempt, prepared

layer_trials: Any = small.module_of(small.ROOT / "benchmarks" / "support" / "layer_trials.py")
LayerTrial, differ_trial = layer_trials.LayerTrial, layer_trials.differ_trial
reloaded_by_all = layer_trials.reloaded_by_all
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        small.TRANSFORMERS < (5,), reason="the configs of Transformers 4 have other fields"
    ),
]
differing = pytest.mark.skipif(
    not layer_zoo.ENTRIES, reason="this Transformers reads no per_layer_config from a config"
)


@functools.cache
def case_of(name: str) -> Subject:
    """A class of the zoo at tiny size."""
    case = prepared(zoo.build(name), 0)
    assert not isinstance(case, Refusal)
    return case


def dropped(name: str, folder: Path) -> list[Any]:
    case = case_of(name)
    return list(layer_trials.drop_trials(case, layer_trials.lists_of_layers(case), folder))


@differing
@pytest.mark.parametrize(
    ("name", "how", "auto"),
    [
        ("gpt_oss", "global", "AutoModelForCausalLM"),
        ("bert", "firsts-kept", "AutoModelForSequenceClassification"),
    ],
)
def test_layers_differ_and_load_with_their_own_code(
    name: str, how: str, auto: str, tmp_path: Path
) -> None:
    case = case_of(name)
    kind = type(case.model)
    tried = differ_trial(case, tmp_path)
    folder = tmp_path / f"{kind.__name__}-{how}"
    assert tried == LayerTrial("works", how=how, folders=(folder,))
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"][auto].endswith(f".Layerwise{kind.__name__}")
    widths = {entry["intermediate_size"] for entry in config["per_layer_config"].values()}
    assert len(widths) > 1
    assert type(case.model) is kind
    assert reloaded_by_all(kind, folder) is None
    config["per_layer_config"] = dict.fromkeys(
        config["per_layer_config"], config["per_layer_config"]["0"]
    )
    (folder / "config.json").write_text(json.dumps(config))
    assert "cannot be loaded" in str(reloaded_by_all(kind, folder))


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        (False, ("refused", "no config says that")),
        (True, ("failed", "ConfigSyncError after the step: no config says that")),
    ],
)
def test_a_step_that_is_refused_before_the_cut_is_no_failure(
    cut: bool, expected: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(case: Subject, model: Any, pruner: Any, steps: int) -> None:
        if cut:
            pruner.step()
        raise ConfigSyncError("no config says that")

    monkeypatch.setattr(support, "_prune_and_check", refused)
    case = case_of("llama")
    assert attempt(case, copy.deepcopy(case.model), tmp_path) == expected


@differing
def test_layers_without_a_width_of_their_own_are_refused(tmp_path: Path) -> None:
    tried = differ_trial(case_of("swin"), tmp_path)
    assert tried.outcome == "refused"
    assert (
        "SwinForImageClassification has no width that SwinConfig could set for each layer "
        "separately"
    ) in tried.why
    assert list(tmp_path.iterdir()) == []


@differing
def test_layers_that_are_built_like_the_first_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_trials, "layer_lists", lambda model_class: ())
    tried = differ_trial(case_of("llama"), tmp_path)
    assert tried == LayerTrial("refused", "its layers came out alike")


def test_a_layer_of_every_list_goes(tmp_path: Path) -> None:
    first, second = dropped("t5", tmp_path)
    assert (first.outcome, first.how) == ("works", "layer 1 of encoder.block")
    assert (second.outcome, second.how) == ("works", "layer 1 of decoder.block")
    kind = type(case_of("t5").model)
    for tried, field in ((first, "num_layers"), (second, "num_decoder_layers")):
        (folder,) = tried.folders
        config = json.loads((folder / "config.json").read_text())
        full = getattr(case_of("t5").tiny.model.config, field)
        assert config[field] == full - 1
        assert reloaded_by_all(kind, folder) is None
    shutil.copy(second.folders[0] / "config.json", first.folders[0])
    assert "loading reports" in str(reloaded_by_all(kind, first.folders[0]))


def test_another_layer_than_the_dropped_one_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drop_the_first(model: Any, layers: Any, which: str) -> Any:
        return drop_layers(model, [0], which=which)

    monkeypatch.setattr(layer_trials, "drop_layers", drop_the_first)
    (tried,) = dropped("llama", tmp_path)
    assert tried.outcome == "failed"
    assert "off the original with the layer passing on" in tried.why
    assert tried.folders == ()


def test_another_layer_goes_where_the_second_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are refused but the first: the reason is the second's, and the first is tried."""
    asked: list[int] = []

    def refused(model: Any, layers: Any, which: str) -> Any:
        asked.extend(layers)
        if layers != [0] or asked.count(0) > 1:
            raise ConfigSyncError(f"not {layers}")
        return drop_layers(model, layers, which=which)

    monkeypatch.setattr(layer_trials, "drop_layers", refused)
    (tried,) = dropped("llama", tmp_path)
    assert (tried.outcome, tried.how) == ("works", "layer 0 of model.layers")
    assert asked == [1, 0]
    assert dropped("llama", tmp_path) == [
        LayerTrial("refused", "not [1]", how="layer 1 of model.layers")
    ]


def test_a_layer_that_no_output_depends_on_is_told(tmp_path: Path) -> None:
    case = case_of("llama")
    idle = copy.deepcopy(case.model)
    with torch.no_grad():
        for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            idle.model.layers[1].get_parameter(name).zero_()
    (tried,) = layer_trials.drop_trials(replace(case, model=idle), ["model.layers"], tmp_path)
    assert (tried.outcome, tried.to_dict()["unobserved"]) == ("works", True)
    assert "unobserved" not in dropped("llama", tmp_path / "whole")[0].to_dict()


def test_entities_pass_on_with_the_words(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = hf.LukeConfig(**sizes, num_hidden_layers=3, vocab_size=64, entity_vocab_size=32)
    case = prepared(hf.LukeForMaskedLM(config), 0)
    assert not isinstance(case, Refusal)
    assert "entity_ids" in case.tiny.inputs
    (name,) = layer_trials.lists_of_layers(case)
    (tried,) = layer_trials.drop_trials(case, [name], tmp_path)
    assert (tried.outcome, tried.unobserved) == ("works", False)


def test_a_copy_without_a_cache() -> None:
    case = case_of("llama")
    assert not layer_trials._without_cache(case.model).config.use_cache
    assert case.model.config.use_cache


@differing
@pytest.mark.skipif(not hasattr(hf, "Gemma4UnifiedConfig"), reason="it came with Transformers 5")
@pytest.mark.full
def test_layers_that_the_stock_class_makes_differ(tmp_path: Path) -> None:
    """Gemma 4's config writes entries itself: layers with full attention have larger heads."""
    full = without_data(hf.Gemma4UnifiedForConditionalGeneration, hf.Gemma4UnifiedConfig())
    case = prepared(full, 0)
    assert not isinstance(case, Refusal)
    tried = differ_trial(case, tmp_path)
    assert (tried.outcome, tried.how) == ("works", "global")
    entries = json.loads((tried.folders[0] / "config.json").read_text())["text_config"]
    head_dims = {entry["head_dim"] for entry in entries["per_layer_config"].values()}
    assert len(head_dims) == 2
