"""The generated classes: loaded by every auto class, computing as the stock ones, pickled."""

from __future__ import annotations

import copy
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import auto_classes_child
import layer_zoo
import pytest
import tiny
import torch
import transformers as hf
import zoo
from auto_classes_child import CASE, outputs_of, weights_of
from differing import pruned

from tp_hf_config.model.config_json import config_nodes
from tp_hf_config.model.layer_class import (
    auto_classes,
    auto_map,
    layer_lists,
    layerwise_class,
    stock_class,
)
from tp_hf_config.model.layer_entries import GLOBAL_READS, layer_lists_of, set_entries

pytestmark = pytest.mark.skipif(
    not layer_zoo.ENTRIES, reason="this Transformers reads no per_layer_config from a config"
)
_ROBERTA = {**zoo._TEXT, "pad_token_id": 1}
_MORE: dict[str, Any] = {
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**_ROBERTA)),
    "bart_decoder": lambda: hf.BartForCausalLM(
        hf.BartConfig(
            vocab_size=96,
            d_model=32,
            decoder_layers=2,
            decoder_attention_heads=4,
            decoder_ffn_dim=64,
            encoder_layers=1,
        )
    ),
    "bert_body": lambda: hf.BertModel(hf.BertConfig(**zoo._TEXT)),
    "llava": lambda: hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            text_config=hf.LlamaConfig(**zoo._GQA),
            vision_config=hf.CLIPVisionConfig(**zoo._VISION),
            image_token_index=90,
        )
    ),
}
# Class -> the fields of which the second layer has less, and the auto classes beside its own.
CLASSES: dict[str, tuple[str, set[str]]] = {
    "llama": ("intermediate_size", {"", "SequenceClassification", "TokenClassification"}),
    "gpt2": ("n_inner", {"", "SequenceClassification", "TokenClassification"}),
    "mixtral": ("intermediate_size", {"", "SequenceClassification", "TokenClassification"}),
    "bert": ("intermediate_size", {"", "MaskedLM", "TokenClassification", "QuestionAnswering"}),
    "bert_body": ("intermediate_size", {"MaskedLM", "SequenceClassification"}),
    "roberta": ("intermediate_size", {"", "SequenceClassification", "CausalLM"}),
    "t5": ("d_ff", {"", "TextEncoding", "SequenceClassification"}),
    "bart": ("encoder_ffn_dim", {"", "SequenceClassification", "QuestionAnswering"}),
    "whisper": ("encoder_ffn_dim", {"", "AudioClassification"}),
    "vit": ("intermediate_size", {"", "MaskedImageModeling"}),
    "wav2vec2": ("intermediate_size", {"", "AudioClassification", "PreTraining"}),
    "qwen2_vl": ("intermediate_size", {""}),
    "llava": ("intermediate_size", {""}),
}


def differing(name: str) -> Any:
    """A class whose second layer is narrower, with random weights."""
    model = _MORE[name]() if name in _MORE else layer_zoo.build(name)
    field = CLASSES[name][0]
    lists = layer_lists_of(model)
    paths = {found.config_path for found in lists}
    generated = layerwise_class(model, {found.name: found.classes for found in lists})
    for path, config in config_nodes(model.config):
        if path in paths and hasattr(config, field):
            value = getattr(config, field)
            vars(config)[GLOBAL_READS] = True
            set_entries(config, {0: {field: value}, 1: {field: value // 2}})
    model.config.auto_map = auto_map(generated)
    made = generated(copy.deepcopy(model.config))
    tiny.randomise(made, 0)
    return made.eval()


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    if model.config.model_type == "llava":
        return {"input_ids": torch.arange(3, 17).view(2, 7)}
    return zoo.inputs(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every class saved, and what a process without this library loads by each auto class."""
    folder = tmp_path_factory.mktemp("differ")
    result: dict[str, Any] = {}
    for name in CLASSES:
        model = differing(name)
        inputs, base = inputs_of(model), model.base_model
        model.save_pretrained(folder / name)
        result[name] = model
        torch.save(
            {
                "inputs": inputs,
                "class": type(model).__name__,
                "base": type(base).__name__.removeprefix("Layerwise"),
                "outputs": outputs_of(model, inputs),
                "body": outputs_of(base, inputs),
                "weights": weights_of(base, layer_lists(type(model))),
            },
            folder / name / CASE,
        )
    results = folder / "results.json"
    folders = [str(folder / name) for name in CLASSES]
    command = [sys.executable, auto_classes_child.__file__, str(results), *folders]
    subprocess.run(command, check=True)
    return {"models": result, "loaded": json.loads(results.read_text()), "folder": folder}


@pytest.mark.parametrize("name", CLASSES)
def test_every_auto_class_loads_it_without_this_library(name: str, saved: dict[str, Any]) -> None:
    model, loaded = saved["models"][name], saved["loaded"][name]
    own = set(auto_classes(type(model.config), stock_class(type(model))))
    beside = {f"AutoModel{'For' * bool(task)}{task}" for task in CLASSES[name][1]}
    assert loaded.keys() >= own | beside
    for auto, found in loaded.items():
        assert "error" not in found, f"{auto}: {found['error']}"
        assert (found["same_outputs"] is True) == (auto in own), auto
        assert found["same_body"] in (True, None), auto
        assert found["lacking"] == [], auto
        assert found["attention"] == model.config._attn_implementation
        assert found["experts"] == model.config._experts_implementation
    assert any(found["same_body"] for found in loaded.values())


def test_a_class_with_layers_that_the_folder_lacks_is_not_beside() -> None:
    """A decoder's folder has no encoder for BartForConditionalGeneration."""
    model = _MORE["bart_decoder"]()
    generated = layerwise_class(model, {each.name: each.classes for each in layer_lists_of(model)})
    named = auto_map(generated)
    assert named.keys() == {"AutoModelForCausalLM", "AutoModel"}


def test_a_class_beside_that_reads_the_value_of_all_layers_loads_too(tmp_path: Path) -> None:
    """BigBird's question answering has a feed-forward layer of its own, as the config says."""
    settings = {**zoo._TEXT, "attention_type": "original_full"}
    layer_zoo._MORE["big_bird"] = lambda: (hf.BigBirdForMaskedLM, hf.BigBirdConfig(**settings))
    model = pruned("big_bird", ["intermediate_size"])
    model.save_pretrained(tmp_path)
    for auto in ("AutoModelForQuestionAnswering", "AutoModelForMaskedLM"):
        loaded = getattr(hf, auto).from_pretrained(tmp_path, trust_remote_code=True)
        layers = loaded.bert.encoder.layer
        assert [layer.intermediate.dense.out_features for layer in layers] == [72, 48]


def test_attention_and_experts_are_chosen_as_of_the_stock_class(saved: dict[str, Any]) -> None:
    """Transformers reads in a class's module whether they may be: the pruning process's choice."""
    assert saved["loaded"]["mixtral"]["AutoModelForCausalLM"]["experts"] == "grouped_mm"
    folder, model = saved["folder"] / "mixtral", saved["models"]["mixtral"]
    chosen = {"attn_implementation": "eager", "experts_implementation": "batched_mm"}
    again = hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **chosen)
    inside = again.model.layers[1]
    for config in (again.config, inside.self_attn.config, inside.mlp.experts.config):
        assert config._attn_implementation == "eager"
        assert config._experts_implementation == "batched_mm"
    again.set_experts_implementation("grouped_mm")
    assert inside.mlp.experts.config._experts_implementation == "grouped_mm"
    for part in (type(again), type(model)):
        for ask in ("_can_set_attn_implementation", "_can_set_experts_implementation"):
            assert getattr(part, ask)() == getattr(hf.MixtralForCausalLM, ask)()
    module = sys.modules[type(again).__module__]
    assert module.MixtralSparseMoeBlock is type(inside.mlp)  # found as in the stock module


def test_a_classifier_is_trained_on_the_body_of_a_pruned_language_model(
    saved: dict[str, Any], tmp_path: Path
) -> None:
    model = saved["models"]["llama"]
    made = hf.AutoModelForSequenceClassification.from_pretrained(
        saved["folder"] / "llama", trust_remote_code=True, num_labels=3
    )
    made.config.pad_token_id = 0
    inputs = zoo.inputs(model)
    assert torch.equal(outputs_of(made.eval().model, inputs)[0], outputs_of(model.model, inputs)[0])
    loss = made(**inputs, labels=torch.tensor([0, 2])).loss
    loss.backward()
    torch.optim.SGD(made.parameters(), 0.1).step()
    made.save_pretrained(tmp_path)
    again = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(again(**inputs).logits, made(**inputs).logits)


def _outputs_of_saved(path: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a model does in another process that got it by ``torch.save``."""
    return outputs_of(torch.load(path, weights_only=False), inputs)[0]


def test_a_live_model_goes_to_another_process_and_into_a_copy(tmp_path: Path) -> None:
    model = differing("llama")
    inputs = zoo.inputs(model)
    before = outputs_of(model, inputs)[0]
    assert torch.equal(outputs_of(copy.deepcopy(model), inputs)[0], before)
    torch.save(model, tmp_path / "model.pt")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        saved = pool.apply(_outputs_of_saved, (str(tmp_path / "model.pt"), inputs))
        passed = pool.apply(outputs_of, (model, inputs))
    assert torch.equal(saved, before)
    assert torch.equal(passed[0], before)
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(again) is type(model)
    assert again.config.per_layer_config[1].intermediate_size == 48
    again.save_pretrained(tmp_path / "folder")
    assert (tmp_path / "folder" / "modeling_layerwise_llama.py").exists()
