"""Every refusal: what it says, and that nothing was changed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch_pruning as tp
import transformers as hf
from accelerate import cpu_offload, disk_offload
from torch import nn
from torch.optim.swa_utils import AveragedModel

import tp_hf_config
from tp_hf_config import (
    ConfigSyncError,
    HFConfigSyncHook,
    PrunerSettingsWarning,
    TPHFConfigError,
    UnsupportedModelError,
    calibrate,
    drop_layers,
    plan,
    prunable,
    supports,
)
from tp_hf_config.hook.apply import Changes

pytestmark = [
    pytest.mark.filterwarnings("ignore:pruned groups are recorded"),
]
SYNC_LATER = "Nothing was written. Continue to prune, then call hook.sync()."


def attached(model: nn.Module, **kwargs: Any) -> tuple[HFConfigSyncHook, Any]:
    hook = HFConfigSyncHook()
    arguments = {
        "example_inputs": None,
        "importance": tp.importance.GroupMagnitudeImportance(),
        "pruning_ratio": 0.25,
        **kwargs,
    }
    return hook, tp.pruner.MetaPruner(model, **arguments, hooks=[hook])


def attached_to(model: nn.Module, hook: HFConfigSyncHook, **kwargs: Any) -> Any:
    importance = tp.importance.GroupMagnitudeImportance()
    return tp.pruner.MetaPruner(model, None, importance, **kwargs, hooks=[hook])


def cut(pruner: Any, layer: nn.Linear, idxs: list[int]) -> None:
    pruner.DG.get_pruning_group(layer, tp.prune_linear_out_channels, idxs).prune()


def refused(model: nn.Module) -> str:
    """What is said at construction, whatever is named; nothing is pruned or changed."""
    before = {name: (id(p), tuple(p.shape)) for name, p in model.named_parameters()}
    messages = []
    for hook in (HFConfigSyncHook(prune="inner"), HFConfigSyncHook()):
        with pytest.raises(UnsupportedModelError) as raised:
            attached_to(model, hook)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    assert {name: (id(p), tuple(p.shape)) for name, p in model.named_parameters()} == before
    return messages[0]


def test_the_family_of_errors():
    for error in (ConfigSyncError, UnsupportedModelError):
        assert issubclass(error, TPHFConfigError)
    assert ConfigSyncError("text").conflicts == {}


# At construction


def test_no_pretrained_model():
    assert refused(small.mlp()) == (
        "Sequential contains no transformers.PreTrainedModel, so there is no config to update. "
        "Pass a Hugging Face model, or a module that contains one."
    )


def test_register_refuses_too():
    pruner = small.pruner_of(small.mlp())
    before, graph = dict(vars(pruner)), dict(vars(pruner.DG))
    with pytest.raises(UnsupportedModelError, match="contains no transformers"):
        HFConfigSyncHook().register(pruner)
    assert (vars(pruner), vars(pruner.DG)) == (before, graph)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.document = small.bert(), small.llama()


def test_two_side_by_side():
    assert refused(Pair()) == (
        "Pair contains 2 Hugging Face models side by side: query (BertModel), document "
        "(LlamaForCausalLM). Expected one. Prune them one at a time, each with its own pruner."
    )


PACKED = (
    ": its weights are packed and cannot be pruned. Load the model in float16, bfloat16 or "
    "float32, prune, and quantise the result."
)


def packed_bert() -> Any:
    model = small.bert()
    model.pooler.dense.weight = nn.Parameter(
        torch.zeros(32, 4, dtype=torch.uint8), requires_grad=False
    )
    return model


def test_quantised_by_a_quantizer():
    model = packed_bert()
    model.hf_quantizer = object()
    model.config.quantization_config = {"quant_method": "gptq"}
    assert refused(model) == "BertModel is quantised (gptq)" + PACKED


def test_quantised_says_its_method_from_an_object():
    class Method:
        quant_method = hf.utils.quantization_config.QuantizationMethod.BITS_AND_BYTES

    model = packed_bert()
    model.is_quantized = True
    model.config.quantization_config = Method()
    assert refused(model) == "BertModel is quantised (bitsandbytes)" + PACKED


def test_quantised_without_a_method():
    model = packed_bert()
    model.is_quantized = True
    assert refused(model) == "BertModel is quantised (method unknown)" + PACKED


def read_from_gguf() -> Any:
    """A model as Transformers leaves it that has unpacked the weights of a GGUF file."""

    class Quantizer:
        def remove_quantization_config(self, model: Any) -> None:
            del model.hf_quantizer, model.config.quantization_config
            model.is_quantized = False

    model = small.llama()
    model.hf_quantizer, model.is_quantized = Quantizer(), True
    model.config.quantization_config = {"quant_method": "gguf"}
    return model


@pytest.mark.parametrize(
    "use",
    [
        prunable,
        lambda model: plan(model, pruning_ratio=0.25),
        lambda model: attached_to(model, HFConfigSyncHook()),
        lambda model: calibrate(model, [{"input_ids": torch.arange(8)[None]}] * 2),
        lambda model: drop_layers(model, [0]),
        supports,
    ],
    ids=["prunable", "plan", "hook", "calibrate", "drop_layers", "supports"],
)
@pytest.mark.filterwarnings("ignore::tp_hf_config.CalibrationWarning")
def test_weights_that_were_quantised_in_their_file(use: Any, tmp_path: Path):
    model = read_from_gguf()
    with pytest.warns(UserWarning, match="was loaded from quantised weights") as warned:
        use(model)
    assert str(warned[0].message) == (
        "LlamaForCausalLM was loaded from quantised weights (gguf), which are now plain tensors. "
        "Its quantization_config was removed, so save_pretrained writes plain weights"
    )
    assert Path(warned[0].filename).name == "test_errors.py"
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    hook, pruner = attached(model, pruning_ratio=0.5)
    pruner.step()
    assert hook.last_report.fields["intermediate_size"] == (64, 32)


def test_calibrate_refuses_packed_weights_before_it_runs():
    model = packed_bert()
    model.hf_quantizer = object()
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(UnsupportedModelError) as raised:
        calibrate(model, [{"input_ids": torch.arange(8)[None]}])
    assert str(raised.value) == "BertModel is quantised (gptq)" + PACKED


def test_meta_device():
    """An importance that reads no weights makes a cut list; any other is refused."""
    model = small.bert().to("meta")
    settings = {"pruning_ratio": 0.5, "hooks": [hook := HFConfigSyncHook(prune="inner")]}
    with pytest.raises(UnsupportedModelError) as raised:
        tp.pruner.MetaPruner(model, None, tp.importance.MagnitudeImportance(), **settings).step()
    assert model.config.intermediate_size == 64
    assert hook.cuts is None
    cuts = []
    for each in (model, small.bert()):
        settings["hooks"] = [hook := HFConfigSyncHook(prune="inner")]
        random.seed(0)  # TP 1.5 shuffles by Python's generator, 1.6 by that of torch
        torch.manual_seed(0)
        tp.pruner.MetaPruner(each, None, tp.importance.RandomImportance(), **settings).step()
        cuts.append(hook.cuts)
    assert each.config.intermediate_size == 32
    assert repr(cuts[0].edits) == repr(cuts[1].edits)
    assert str(raised.value) == (
        "BertModel: embeddings.word_embeddings.weight is on the meta device (no data, or offloaded "
        "by accelerate). Load the whole model into memory: from_pretrained(folder) without "
        "device_map offloading. A model that does not fit is pruned from folder to folder: "
        "tp-hf-config prune FOLDER --out OUT --stream."
    )


@pytest.mark.parametrize("kind", ["cpu", "disk"])
@torch.no_grad()
def test_offloaded_by_accelerate(kind: str, tmp_path: Path):
    """The model runs afterwards as it did before."""
    model, batch = small.bert(), {"input_ids": torch.tensor([[1, 2, 3]])}
    expected = model(**batch).last_hidden_state
    if kind == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    message = refused(model)
    assert message.endswith("folder to folder: tp-hf-config prune FOLDER --out OUT --stream.")
    with pytest.raises(UnsupportedModelError) as raised:
        calibrate(model, [batch] * 2)
    assert str(raised.value) == message
    assert torch.equal(model(**batch).last_hidden_state, expected)


def test_sharded():
    model = small.bert()
    model.encoder.layer[1].output.dense.weight.ds_id = 7
    assert refused(model) == (
        "BertModel: encoder.layer.1.output.dense.weight is sharded over several processes by "
        "tensor parallelism or DeepSpeed ZeRO-3. Only models that are sharded by fully_shard "
        "(FSDP2) can be pruned. Prune the model's folder instead, and load the result: "
        "tp-hf-config prune FOLDER, or apply_cuts(folder, cuts, out) with the cut list of an "
        "unsharded model."
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_of_one_byte(dtype: torch.dtype):
    model = small.bert()
    model.pooler.dense.weight = nn.Parameter(torch.zeros(32, 32, dtype=dtype), requires_grad=False)
    assert refused(model) == (
        f"BertModel: pooler.dense.weight holds {dtype}, a quantised storage format. Load the "
        "model in float16, bfloat16 or float32, prune, and quantise the result."
    )


def construction_refused(model: nn.Module) -> str:
    """What is said when the map is made."""
    with pytest.raises(UnsupportedModelError) as raised:
        attached_to(model, HFConfigSyncHook())
    return str(raised.value)


def with_adapters(model: hf.PreTrainedModel) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))


def test_adapters():
    query = "encoder.layer.0.attention.self.query"
    assert construction_refused(with_adapters(small.bert())) == (
        f"BertModel and its config disagree before any pruning: {query}.base_layer.weight: found "
        f"[32, 32], but the config builds no such tensor; {query}.base_layer.bias: found [32], but "
        f"the config builds no such tensor; {query}.lora_A.default.weight: found [2, 32], but the "
        "config builds no such tensor and 5 more. It has PEFT adapters: merge them first "
        "(model.merge_and_unload())."
    )


def test_merged_adapters(tmp_path):
    adapted = with_adapters(small.bert()).eval()
    inputs = {"input_ids": torch.arange(4)[None]}
    before = adapted(**inputs).last_hidden_state
    model = adapted.merge_and_unload()
    torch.testing.assert_close(model(**inputs).last_hidden_state, before)
    hook = HFConfigSyncHook(prune=("intermediate_size",))
    tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        hooks=[hook],
    ).step()
    assert hook.last_report is not None
    assert hook.last_report.fields == {"intermediate_size": (64, 32)}
    model.save_pretrained(tmp_path)
    attention = model.config._attn_implementation
    again = type(model).from_pretrained(tmp_path, attn_implementation=attention).eval()
    for parameter in (*model.parameters(), *again.parameters()):  # aligned alike in memory
        parameter.data = parameter.data.clone()
    assert torch.equal(model(**inputs).last_hidden_state, again(**inputs).last_hidden_state)


def test_config_and_weights_disagree():
    model = small.bert()
    model.config.intermediate_size = 60
    assert construction_refused(model) == (
        "BertModel and its config disagree before any pruning: "
        "encoder.layer.0.intermediate.dense.weight: found [64, 32], the config builds [60, 32]; "
        "encoder.layer.0.intermediate.dense.bias: found [64], the config builds [60]; "
        "encoder.layer.0.output.dense.weight: found [32, 64], the config builds [32, 60] and 3 "
        "more. Attach the hook before pruning, with the config that the model was loaded with."
    )
    assert model.config.intermediate_size == 60


def test_a_model_pruned_before_the_hook_comes():
    model = small.bert()
    pruner = tp.pruner.MetaPruner(
        model,
        {"input_ids": torch.arange(1, 9)[None]},
        tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.25,
        output_transform=lambda output: output.pooler_output,
    )
    pruner.step()
    before, graph = dict(vars(pruner)), dict(vars(pruner.DG))
    with pytest.raises(UnsupportedModelError, match="disagree before any pruning"):
        HFConfigSyncHook().register(pruner)
    assert vars(pruner).keys() == before.keys()
    assert vars(pruner.DG).keys() == graph.keys()


def test_a_config_that_its_class_refuses():
    model = small.llama()
    model.config.hidden_size = 33
    message = construction_refused(model)
    assert message == (
        "LlamaForCausalLM cannot be built from its own config: 'validate_architecture': "
        "ValueError: The hidden size (33) is not a multiple of the number of attention heads (4). "
        "Correct model.config first."
    )


# What the hook is asked to prune


def test_prune_a_field_that_is_none():
    hook = HFConfigSyncHook(prune=("nonsense", "hidden_size", "vocab_size"))
    with pytest.raises(UnsupportedModelError) as raised:
        attached_to(small.bert(), hook)
    assert str(raised.value) == (
        "BertModel cannot prune nonsense: no such width. Widths that can be pruned: hidden_size, "
        "intermediate_size, num_attention_heads + hidden_size."
    )


def test_head_dims_of_a_rotary_model():
    model = small.llama()
    heads = {layer.self_attn.q_proj: 4 for layer in model.model.layers}
    with pytest.warns(PrunerSettingsWarning, match="head dims are kept") as warned:
        attached_to(model, HFConfigSyncHook(prune="inner"), num_heads=heads)
    assert str(warned[0].message) == (
        "prune_head_dims=True, but head dims are kept: LlamaForCausalLM cannot prune head dims: "
        "it encodes positions in its head dims (its position tables are as wide as a head), so "
        "they are not interchangeable (head_dim: units are not interchangeable in "
        "model.layers.*.self_attn.k_proj.weight, model.layers.*.self_attn.q_proj.weight). Leave "
        "prune_head_dims out, or prune whole heads (prune_num_heads=True). Widths that can be "
        "pruned: hidden_size, intermediate_size, num_attention_heads + num_key_value_heads."
    )


# At a sync


def fails_to_sync(hook: HFConfigSyncHook, model: nn.Module) -> ConfigSyncError:
    """The error of a sync that writes nothing, and whose report says so."""
    before, count = small.state_of(model), len(hook.reports)
    with pytest.raises(ConfigSyncError) as raised:
        hook.sync()
    small.assert_same(before, small.state_of(model))
    assert len(hook.reports) == count + 1
    report = hook.last_report
    assert report.error == str(raised.value)
    assert (report.fields, report.attributes, report.buffers, report.ties) == ({}, (), (), ())
    assert report.proof == ""
    assert str(report).endswith(f"; the config is not updated: {raised.value}")
    assert report.to_dict()["error"] == str(raised.value)
    return raised.value


def test_layers_of_different_widths():
    model = small.llama()
    hook, pruner = attached(model)
    layers = model.model.layers
    cut(pruner, layers[0].mlp.up_proj, list(range(16)))
    error = fails_to_sync(hook, model)
    names = [
        [f"model.layers.{i}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
        for i in range(2)
    ]
    assert error.conflicts == {"intermediate_size": {48: names[0], 64: names[1]}}
    assert str(error) == (
        "no LlamaConfig describes LlamaForCausalLM with these widths. intermediate_size: "
        f"{', '.join(names[0])} need 48, {', '.join(names[1])} need 64 (it was 64). One field "
        "sets all of these, so each has to lose the same number of channels: prune them all at "
        "one ratio with local ranking (global_pruning=False), or keep them all (ignored_layers=). "
        + SYNC_LATER
    )
    assert [group.root.name for group in hook.last_report.groups] == ["model.layers.0.mlp.up_proj"]
    model(torch.arange(8)[None])  # the model itself runs on

    cut(pruner, layers[1].mlp.up_proj, list(range(8, 24)))
    report = hook.last_report
    assert report.error is None
    assert report.fields == {"intermediate_size": (64, 48)}
    assert model.config.intermediate_size == 48
    assert [layer.mlp.intermediate_size for layer in layers] == [48, 48]


def test_many_layers_are_counted_not_listed():
    model = small.llama(num_hidden_layers=6)
    hook, pruner = attached(model)
    cut(pruner, model.model.layers[4].mlp.up_proj, [0])
    error = fails_to_sync(hook, model)
    assert "model.layers.4.mlp.down_proj.weight need 63, " in str(error)
    assert "model.layers.0.mlp.down_proj.weight and 12 more need 64" in str(error)
    assert len(error.conflicts["intermediate_size"][64]) == 15


def test_a_class_that_refuses():
    model = small.llama()
    hook, pruner = attached(model)
    cut(pruner, model.model.layers[0].mlp.down_proj, [0, 1, 2])
    assert str(fails_to_sync(hook, model)) == (
        "LlamaConfig refuses the values of the pruned weights (hidden_size 32 -> 29). Its message: "
        "\"'validate_architecture': ValueError: The hidden size (29) is not a multiple of the "
        'number of attention heads (4).". The nearest values that it accepts: hidden_size 28 '
        "or 32. "
        "Choose ratios that give accepted values after every step, or set round_to= to a number "
        "that the class accepts. " + SYNC_LATER
    )
    cut(pruner, model.model.layers[0].mlp.down_proj, [3])
    report = hook.last_report  # 28: it takes that
    assert report.fields["hidden_size"] == (32, 28)


def test_a_wrong_cut_can_be_mended_by_the_next():
    model = small.llama()
    hook, pruner = attached(model, pruning_ratio=0.0)
    for idxs in ([0, 1, 2], [3]):
        cut(pruner, model.model.layers[0].mlp.down_proj, idxs)
        if len(idxs) == 3:
            assert "hidden_size 32 -> 29" in str(fails_to_sync(hook, model))
    assert hook.last_report.fields == {"hidden_size": (32, 28)}


@pytest.mark.parametrize("projection", ["query", "value"])
def test_heads_pruned_unequally(projection: str):
    """The values' dimensions are a group of their own, beside those of queries and keys."""
    model = small.bert()
    hook, pruner = attached(model)
    attention = model.encoder.layer[0].attention.self
    cut(pruner, getattr(attention, projection), [8, 10, 13])  # of the second head
    assert str(fails_to_sync(hook, model)) == (
        f"encoder.layer.0.attention.self.{projection}: its attention heads lost different numbers "
        "of dimensions, so the remaining channels are not equal heads. Pass the number of heads "
        f"to the pruner (num_heads={{layer: heads}}), or keep the layer (ignored_layers=)."
    )


def test_heads_told_nothing_about_are_refused_not_regrouped():
    """Four channels gone, 28 = 4 heads of 7 would fit the shapes and compute something else."""
    model = small.bert()
    hook, pruner = attached(model)
    for layer in model.encoder.layer:
        cut(pruner, layer.attention.self.query, [0, 1, 2, 3])
    cut(pruner, model.encoder.layer[0].output.dense, [0, 1, 2, 3])
    assert "lost different numbers of dimensions" in str(fails_to_sync(hook, model))


EMBEDDED = "roberta.embeddings.word_embeddings"
EMBEDDINGS = f"{EMBEDDED}.weight"
UNTIE = (
    "RobertaForMaskedLM saves tied weights once, so a reload would change one of them. Prune them "
    "in one group, keep them (ignored_layers=), or untie them before pruning "
    "(config.tie_word_embeddings=False)."
)


def test_ties_that_lost_different_channels():
    model = small.roberta()
    assert model.lm_head.decoder.weight is model.get_parameter(EMBEDDINGS)
    hook, _ = attached(model)
    tp.prune_embedding_out_channels(model.get_submodule(EMBEDDED), [0, 1, 2, 3])
    tp.prune_linear_in_channels(model.lm_head.decoder, [4, 5, 6, 7])
    assert str(fails_to_sync(hook, model)) == (
        f"{EMBEDDINGS} and lm_head.decoder.weight are tied, one weight under two names, but lost "
        f"different channels. {UNTIE}"
    )
    assert model.lm_head.decoder.weight is not model.get_parameter(EMBEDDINGS)


def test_ties_of_different_widths():
    model = small.roberta()
    hook, _ = attached(model)
    tp.prune_embedding_out_channels(model.get_submodule(EMBEDDED), [0, 1, 2, 3])
    tp.prune_linear_in_channels(model.lm_head.decoder, [0, 1, 2, 3, 4, 5, 6, 7])
    assert str(fails_to_sync(hook, model)) == (
        f"{EMBEDDINGS} has shape [40, 28] and lm_head.decoder.weight [40, 24], but they are tied, "
        f"one weight under two names. {UNTIE}"
    )


def test_ties_coupled_by_the_hook_do_not_conflict():
    model = small.roberta()
    hook, pruner = attached(model)
    pruner.step()
    assert hook.last_report.error is None
    assert model.lm_head.decoder.weight is model.get_parameter(EMBEDDINGS)
    assert tuple(model.lm_head.decoder.weight.shape) == (40, 24)


def test_ties_are_made_again():
    """Torch-Pruning's own functions, called by a user, untie weights."""
    model = small.llama(tie_word_embeddings=True)
    hook, pruner = attached(model)
    lost = [0, 1, 2, 3]
    group = pruner.DG.get_pruning_group(
        model.model.layers[0].mlp.down_proj, tp.prune_linear_out_channels, lost
    )
    for dep, idxs in group:
        dep.handler(dep.target.module, idxs) if not hasattr(dep.target.module, "owner") else None
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    for name, parameter in model.named_parameters():
        if parameter.shape == (32,):
            module = model.get_submodule(name.rpartition(".")[0])
            module.weight = nn.Parameter(parameter[4:])
    report = hook.sync()
    assert report.ties == ["model.embed_tokens.weight = lm_head.weight"]
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_dimension_that_no_field_sets_alone():
    """The pooler's output alone: hidden size sets it together with all the rest."""
    model = small.bert()
    hook, _ = attached(model)
    tp.prune_linear_out_channels(model.pooler.dense, [0, 1])
    error = fails_to_sync(hook, model)
    assert error.conflicts["hidden_size"][30] == ["pooler.dense.weight", "pooler.dense.bias"]
    assert "hidden_size: pooler.dense.weight, pooler.dense.bias need 30, " in str(error)
    assert " more need 32 (it was 32)." in str(error)


def test_a_square_layer_is_listed_once():
    model = small.bert()
    hook, _ = attached(model)
    tp.prune_linear_out_channels(model.pooler.dense, [0, 1])
    tp.prune_linear_in_channels(model.pooler.dense, [0, 1])
    error = fails_to_sync(hook, model)
    assert error.conflicts["hidden_size"][30] == ["pooler.dense.weight", "pooler.dense.bias"]
    assert "hidden_size: pooler.dense.weight, pooler.dense.bias need 30, " in str(error)


def test_a_tensor_that_the_config_cannot_size():
    model = hf.BertForTokenClassification(small.bert().config)
    hook, _ = attached(model)
    tp.prune_linear_in_channels(model.classifier, [0])
    assert "classifier.weight needs 31" in str(fails_to_sync(hook, model))
    model.classifier.in_features = 32
    model.classifier.weight = nn.Parameter(torch.rand(2, 32))
    model.register_parameter("extra", nn.Parameter(torch.rand(3)))
    message = str(fails_to_sync(hook, model))
    assert message == (
        "no BertConfig describes BertForTokenClassification with these widths: extra: found [3], "
        "but the config builds no such tensor. No field of the config sets these dimensions "
        "separately: keep the layers (ignored_layers=). " + SYNC_LATER
    )


# A module around the model


class Classifier(nn.Module):
    def __init__(self, pooler: bool = False) -> None:
        super().__init__()
        self.backbone = hf.BertModel(small.bert().config, add_pooling_layer=pooler)
        self.head = nn.Linear(32, 3)

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.head(self.backbone(input_ids, **kwargs).last_hidden_state[:, 0])


@pytest.mark.parametrize(
    ("wrap", "name"),
    [(torch.compile, "_orig_mod"), (nn.DataParallel, "module"), (AveragedModel, "module")],
)
def test_a_wrapper_of_torch_is_refused_at_once(wrap: Any, name: str):
    """It returns what the model returns, whose width would stay for its sake, without a word."""
    model = wrap(small.bert())
    message = (
        f"{type(model).__name__} is a wrapper of torch around BertModel. Pass the model inside, "
        f"its .{name}, and wrap the pruned model again after the last step. (To compile, "
        "model.compile() needs no wrapper.)"
    )
    importance = tp.importance.MagnitudeImportance()
    for refused in (
        lambda: tp.pruner.MetaPruner(model, None, importance, hooks=[HFConfigSyncHook()]),
        lambda: prunable(model),
        lambda: plan(model, pruning_ratio=0.5),
        lambda: calibrate(model, [{"input_ids": torch.ones(1, 4, dtype=torch.long)}]),
    ):
        with pytest.raises(UnsupportedModelError) as raised:
            refused()
        assert str(raised.value) == message


@pytest.mark.parametrize("wrap", [nn.Sequential, lambda model: nn.ModuleDict({"inner": model})])
def test_a_container_of_torch_is_no_wrapper(wrap: Any):
    model = small.llama()
    hook = HFConfigSyncHook()
    importance = tp.importance.MagnitudeImportance()
    pruner = tp.pruner.MetaPruner(wrap(model), None, importance, hooks=[hook])
    pruner.step()
    assert model.config.intermediate_size == 32


def test_a_wrapper_works_end_to_end(tmp_path: Any):
    model = Classifier().eval()
    backbone, config = model.backbone, model.backbone.config
    hook = HFConfigSyncHook()
    pruner = tp.pruner.MetaPruner(
        model,
        None,
        ignored_layers=[model.head],
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        iterative_steps=2,
        hooks=[hook],
    )
    for ffn in (48, 32):
        pruner.step()
        assert (config.hidden_size, config.intermediate_size) == (32, ffn)
    assert backbone.config is config
    assert (model.head.in_features, model.head.out_features) == (32, 3)
    assert {group.root.name.partition(".")[0] for group in hook.last_report.groups} == {"backbone"}
    backbone.save_pretrained(tmp_path)
    again = hf.BertModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(backbone(ids).last_hidden_state, again(ids).last_hidden_state)
        assert model(ids).shape == (1, 3)


def test_the_head_of_a_wrapper_may_lose_its_outputs():
    """What is outside the Hugging Face model is none of the config's business."""
    model = Classifier().eval()
    hook, _ = attached(model)
    tp.prune_linear_out_channels(model.head, [0])
    assert hook.sync().fields == {}


# All or nothing


def gemma() -> Any:
    torch.manual_seed(0)
    return hf.GemmaForCausalLM(
        hf.GemmaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=8,
            max_position_embeddings=32,
        )
    ).eval()


@pytest.mark.parametrize("build", [small.llama, gemma, small.bert])
def test_a_failure_at_any_write_takes_everything_back(build: Any, monkeypatch: pytest.MonkeyPatch):
    """Before anything is cut; what fails once more afterwards is done again."""
    model = build()
    hook, pruner = attached(model)
    before = small.state_of(model)
    write, left = Changes.set, 0

    def failing(changes: Changes, target: Any, key: Any, value: Any) -> None:
        nonlocal left
        left -= 1
        write(changes, target, key, value)
        if left == 0:
            raise KeyboardInterrupt("in the middle")  # not a config's refusal

    monkeypatch.setattr(Changes, "set", failing)
    for position in range(1, 200):
        left = position
        with pytest.raises(KeyboardInterrupt, match="in the middle"):
            pruner.step()
        if model.config.hidden_size < 32:
            break
        small.assert_same(before, small.state_of(model))
        assert (hook.reports, pruner.current_step) == ([], 0)
    assert position > 4
    assert model.config.hidden_size == 24
    assert model.config.intermediate_size == 48
    assert len(hook.reports) == 1
    monkeypatch.undo()
    assert hook.sync().fields == {}


def test_an_error_of_the_users_own_in_between_is_not_hidden(monkeypatch: pytest.MonkeyPatch):
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    model = small.llama(tie_word_embeddings=True)
    hook, pruner = attached(model)
    monkeypatch.setattr("tp_hf_config.hook.follow.write_ties", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pruner.step()
    assert (model.config.hidden_size, model.config.intermediate_size) == (32, 64)
    monkeypatch.undo()
    assert hook.sync().fields == {"hidden_size": (32, 24), "intermediate_size": (64, 48)}
    assert model.lm_head.weight is model.model.embed_tokens.weight


class NamedConfig(hf.PretrainedConfig):
    """An architecture that goes by its name, as timm's do."""

    model_type = "named"
    architecture = "small"


class NamedModel(hf.PreTrainedModel):
    """All widths are the architecture's."""

    config_class = NamedConfig

    def __init__(self, config: NamedConfig):
        super().__init__(config)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        self.post_init()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the layers."""
        return self.layers(x)


def test_no_field_sets_a_width():
    model = NamedModel(NamedConfig())
    said = (
        "no field of NamedConfig sets a width of NamedModel, so no config can describe the pruned "
        "model. Prune a class whose config contains its widths."
    )
    for attempt in (
        lambda: tp_hf_config.prunable(model),
        lambda: tp_hf_config.plan(model, pruning_ratio=0.5),
        lambda: tp_hf_config.supports(model),
        lambda: tp.pruner.MetaPruner(
            model,
            example_inputs=torch.ones(1, 8),
            importance=tp.importance.GroupMagnitudeImportance(),
            pruning_ratio=0.5,
            hooks=[HFConfigSyncHook()],
        ),
    ):
        with pytest.raises(UnsupportedModelError) as raised:
            attempt()
        assert str(raised.value) == said
    assert [tuple(p.shape) for p in model.parameters()] == [(16, 8), (16,), (2, 16), (2,)]
