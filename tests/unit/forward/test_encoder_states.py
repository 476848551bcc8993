"""Decoders alone: cross-attention reads states of an encoder, an input as wide as a field says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch_pruning as tp
import transformers as hf
from masked_original import assert_same_as_masked, kept_channels
from torch import nn

import tp_hf_config.twin.tiny.tiny_model as tiny_models
from tp_hf_config import (
    HFConfigSyncHook,
    plan,
    prunable,
    supports,
)
from tp_hf_config.fieldmap.learn_field_map import map_of
from tp_hf_config.forward import coverage
from tp_hf_config.forward.find_recipe import find_recipe
from tp_hf_config.forward.inputs import example_inputs
from tp_hf_config.forward.run_recipe import PLAIN, RunRecipe
from tp_hf_config.model.build import Refusal, without_data

_EMBEDDING = "model.decoder.embed_tokens.weight"
_DECODER: dict[str, Any] = {
    "vocab_size": 99,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}


def bart() -> hf.PreTrainedModel:
    config = hf.BartConfig(**_DECODER, encoder_layers=2, encoder_attention_heads=4)
    return _random(hf.BartForCausalLM(config))


def whisper() -> hf.PreTrainedModel:
    sizes = {key: value for key, value in _DECODER.items() if key != "max_position_embeddings"}
    config = hf.WhisperConfig(
        **sizes,
        encoder_layers=2,
        encoder_attention_heads=4,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return _random(hf.WhisperForCausalLM(config))


def trocr() -> hf.PreTrainedModel:
    config = hf.TrOCRConfig(**_DECODER, cross_attention_hidden_size=40)
    return _random(hf.TrOCRForCausalLM(config))


def bert(**settings: Any) -> hf.PreTrainedModel:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    config = hf.BertConfig(vocab_size=99, num_hidden_layers=2, **sizes, **settings)
    return _random(hf.BertLMHeadModel(config))


def bert_decoder() -> hf.PreTrainedModel:
    return bert(is_decoder=True, add_cross_attention=True)


def gpt2() -> hf.PreTrainedModel:
    config = hf.GPT2Config(
        vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, add_cross_attention=True
    )
    return _random(hf.GPT2LMHeadModel(config))


def mllama() -> hf.PreTrainedModel:
    config = hf.MllamaConfig(
        text_config={
            "vocab_size": 99,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "cross_attention_layers": [1],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
        }
    )
    return _random(hf.MllamaForCausalLM(config.text_config))


def _random(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    tiny.randomise(model)
    return model.eval()


Made = Callable[[], hf.PreTrainedModel]


def inputs_of(model: hf.PreTrainedModel, name: str, width: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 99, (2, 7), generator=generator)
    return {"input_ids": ids, name: torch.randn((2, 5, width), generator=generator)}


def half(
    model: nn.Module,
    prune: str = "inner",
    ratios: dict[str, float] | None = None,
    **settings: Any,
) -> HFConfigSyncHook:
    """Prune half, or what a pruner's settings say, in all its steps; the hook."""
    hook = HFConfigSyncHook(prune=prune, ratios=ratios)
    importance = tp.importance.GroupMagnitudeImportance()
    arguments = {"importance": importance, "pruning_ratio": 0.5, **settings}
    pruner = tp.pruner.MetaPruner(model, example_inputs=None, hooks=[hook], **arguments)
    for _ in range(pruner.iterative_steps):
        pruner.step()
    return hook


class TestInputs:
    @pytest.mark.parametrize(
        ("made", "name", "width"),
        [
            (bart, "encoder_hidden_states", 32),
            (whisper, "encoder_outputs", 32),
            (trocr, "encoder_hidden_states", 40),
            (bert_decoder, "encoder_hidden_states", 32),
            (gpt2, "encoder_hidden_states", 32),
            (mllama, "cross_attention_states", 32),
        ],
    )
    def test_a_decoder_is_given_states_as_wide_as_what_reads_them(
        self, made: Made, name: str, width: int
    ) -> None:
        model = made()
        inputs = example_inputs(model, map_of(model).recipe)
        found = {key: tuple(value.shape) for key, value in inputs.items() if key != "use_cache"}
        assert found == {"input_ids": (1, 8), name: (1, 4, width)}

    def test_heads_of_cross_attention_are_seen(self) -> None:
        heads = map_of(bart()).splits.heads
        assert heads["model.decoder.layers.0.encoder_attn.k_proj"] == ((4, 8),)

    def test_a_class_that_reads_none_as_it_is_configured_is_given_none(self) -> None:
        # of the same class with cross-attention
        seen = map_of(bert_decoder()).recipe.encoder_states
        assert seen is not None
        model = bert()
        recipe = map_of(model).recipe
        assert recipe.encoder_states is None
        assert example_inputs(model, recipe).keys() - {"use_cache"} == {"input_ids"}
        inputs = example_inputs(model, RunRecipe(encoder_states=seen))
        assert inputs.keys() - {"use_cache"} == {"input_ids"}

    def test_where_the_tiny_copy_does_not_run_with_states_it_is_given_none(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = coverage.forward_error

        def forward_error(
            model: nn.Module, inputs: dict[str, Any], recipe: RunRecipe = PLAIN
        ) -> Refusal | None:
            if "encoder_hidden_states" in inputs:
                return Refusal("no")
            return plain(model, inputs, recipe)

        monkeypatch.setattr(coverage, "forward_error", forward_error)
        tiny = tiny_models.tiny_model(map_of(bart()))
        assert isinstance(tiny, tiny_models.TinyModel)
        assert (tiny.encoder_states, tiny.partial) == ({}, False)

    def test_tied_weights_stay_alike_at_tiny_size(self) -> None:
        config = hf.MarianConfig(
            **_DECODER, encoder_layers=2, pad_token_id=0, decoder_start_token_id=0, eos_token_id=1
        )
        tiny = tiny_models.tiny_model(map_of(_random(hf.MarianForCausalLM(config))))
        assert isinstance(tiny, tiny_models.TinyModel)
        rows = [tiny.field_map.shapes[name][0] for name in ("lm_head.weight", _EMBEDDING)]
        assert rows[0] == rows[1] < 99

    def test_a_model_with_an_encoder_of_its_own_is_given_none(self) -> None:
        config = hf.BartConfig(
            **_DECODER, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48
        )
        model = without_data(hf.BartForConditionalGeneration, config)
        assert isinstance(model, hf.PreTrainedModel)
        assert find_recipe(model).encoder_states is None


def assert_reported(hook: HFConfigSyncHook, original: nn.Module, pruned: nn.Module) -> None:
    """What the cut list says of linear layers, of all steps, is what their values say."""
    assert hook.cuts is not None
    linear = [name for name, module in original.named_modules() if isinstance(module, nn.Linear)]
    cut = [name for name in linear if hook.cuts.kept(f"{name}.weight")]
    assert cut
    for name in cut:
        before, after = (each.get_submodule(name).weight for each in (original, pruned))
        for dim, kept in hook.cuts.kept(f"{name}.weight").items():
            assert kept.tolist() == kept_channels(before, after)[dim].tolist()


class TestPruned:
    @pytest.mark.parametrize(
        ("made", "field", "name", "width"),
        [
            (bart, "d_model", "encoder_hidden_states", 32),
            (whisper, "d_model", "encoder_outputs", 32),
            (trocr, "d_model", "", 40),
            (trocr, "cross_attention_hidden_size", "encoder_hidden_states", 40),
        ],
    )
    def test_the_pruned_decoder_is_the_masked_original_given_the_channels_that_are_left(
        self, made: Made, field: str, name: str, width: int, tmp_path: Path
    ) -> None:
        model = made()
        original = copy.deepcopy(model)
        hook = half(model, prune=field, iterative_steps=2)
        report = hook.last_report
        assert report is not None
        before = getattr(original.config, field)
        assert getattr(model.config, field) == before // 2
        assert report.inputs.keys() == ({name} if name else set())
        given = name or "encoder_hidden_states"
        inputs = inputs_of(model, given, width)
        left = list(report.inputs.get(name, range(width)))
        assert len(left) == (before // 2 if name else width)
        narrow = {**inputs, given: inputs[given][..., left]}
        assert_same_as_masked(original, model, inputs, narrow)
        assert_reported(hook, original, model)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(again(**narrow).logits, model(**narrow).logits)

    def test_whole_heads_of_cross_attention_go(self) -> None:
        model = whisper()
        original = copy.deepcopy(model)
        report = half(model, prune_num_heads=True, head_pruning_ratio=0.5).last_report
        assert report is not None
        assert (model.config.decoder_attention_heads, model.config.d_model) == (2, 16)
        for attention in ("self_attn", "encoder_attn"):
            name = f"model.decoder.layers.1.{attention}.q_proj.weight"
            rows, _ = kept_channels(original.get_parameter(name), model.get_parameter(name))
            assert len({channel // 8 for channel in rows.tolist()}) == 2
        inputs = inputs_of(model, "encoder_outputs", 32)
        left = list(report.inputs["encoder_outputs"])
        narrow = {**inputs, "encoder_outputs": inputs["encoder_outputs"][..., left]}
        assert_same_as_masked(original, model, inputs, narrow)

    @pytest.mark.filterwarnings("error::tp_hf_config.PrunerSettingsWarning")
    @pytest.mark.parametrize(
        "settings",
        [
            {"ratios": {"d_model": 0.75}, "pruning_ratio": 0.25},
            {"root_module_types": [nn.Linear]},
            {"importance": tp.importance.RandomImportance()},
            {"importance": tp.importance.LAMPImportance()},
        ],
        ids=lambda settings: " ".join(settings),
    )
    def test_settings_of_the_pruner_reach_what_reads_the_states(
        self, settings: dict[str, Any]
    ) -> None:
        model = bart()
        report = half(model, prune="d_model", **settings).last_report
        assert report is not None
        width = 8 if "ratios" in settings else 16
        assert model.config.d_model == width
        assert len(report.inputs["encoder_hidden_states"]) == width
        assert model.model.decoder.layers[1].encoder_attn.k_proj.in_features == width

    def test_states_are_cut_in_the_measurement_too(self) -> None:
        found = supports(bart())
        assert {w.name: (w.outcome, w.why) for w in found.widths} == dict.fromkeys(
            ("d_model", "decoder_ffn_dim", "decoder_attention_heads + d_model"), ("works", "")
        )


class TestSaid:
    def test_prunable_says_which_input_has_to_follow(self) -> None:
        model = bart()
        found = {width.name: width for width in prunable(model).widths}
        assert found["d_model"].encoder_states == ("encoder_hidden_states",)
        assert found["d_model"].to_dict()["inputs"] == ["encoder_hidden_states"]
        assert found["decoder_ffn_dim"].encoder_states == ()
        (row,) = (line for line in str(prunable(model)).splitlines() if line.startswith("d_model"))
        assert row.endswith(
            "units permuted: same outputs; remove the same channels from the input "
            "encoder_hidden_states"
        )

    def test_an_input_is_no_tensor_to_prune(self) -> None:
        model = bart()
        members = {
            dim.name
            for width in prunable(model).widths
            for group in width.groups
            for dim in group.dims
        }
        assert members <= dict(model.named_parameters(remove_duplicate=False)).keys()

    def test_a_plan_says_so(self) -> None:
        assert plan(bart(), prune=["d_model"], pruning_ratio=0.5).notes == (
            "remove the channels that d_model loses from the input encoder_hidden_states too: "
            "report.inputs of a step lists the remaining ones",
        )
        assert plan(bart(), prune=["decoder_ffn_dim"], pruning_ratio=0.5).notes == ()

    def test_a_report_says_which_channels_are_left(self) -> None:
        report = half(bart(), prune="d_model").last_report
        assert report is not None
        left = report.inputs["encoder_hidden_states"]
        assert report.to_dict()["inputs"] == {"encoder_hidden_states": list(left)}
        assert "remove the same channels from the input encoder_hidden_states" in report.graph
        assert (
            "  encoder_hidden_states: this input now has 16 channels; report.inputs lists them"
        ) in str(report).splitlines()

    def test_what_a_wrapper_hands_over_keeps_its_width_by_default(self) -> None:
        class Captioner(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.decoder = trocr()

            def forward(self, **inputs: torch.Tensor) -> Any:
                return self.decoder(**inputs)

        model = Captioner()
        half(model)
        config = model.decoder.config
        assert (config.cross_attention_hidden_size, config.decoder_ffn_dim) == (40, 24)
