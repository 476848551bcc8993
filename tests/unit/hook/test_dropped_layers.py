"""Whole layers dropped: arguments, which list, rules, the choice by influence, all or nothing."""

from __future__ import annotations

import copy
import json
from typing import Any

import deep_zoo
import layer_zoo
import pytest
import small
import tiny
import torch
import torch_pruning as tp
import transformers as hf
import zoo

from tp_hf_config import (
    CalibrationError,
    ConfigSyncError,
    DroppedLayers,
    HFConfigSyncHook,
    UnsupportedModelError,
    calibrate,
    drop_layers,
)
from tp_hf_config.calibration.importance import layer_influence
from tp_hf_config.forward.observed_pass import hidden_out
from tp_hf_config.hook import apply

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::tp_hf_config.CalibrationWarning"),
]


def batches(count: int = 9) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(3, 90, (2, 7), generator=generator)} for _ in range(count)]


def pruned(model: Any, prune: Any) -> HFConfigSyncHook:
    hook = HFConfigSyncHook(prune=prune)
    tp.pruner.MetaPruner(
        model,
        None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        hooks=[hook],
    ).step()
    return hook


def assert_same_as_passing_on(original: Any, model: Any, report: DroppedLayers) -> None:
    inputs = zoo.inputs(model)
    expected = deep_zoo.passing_on(original, report.layers, report.dropped)(**inputs)[0]
    assert torch.equal(model(**inputs)[0], expected)


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                {},
                r"pass either the layers to drop, drop_layers\(model, layers=\[14, 25\]\), or "
                "their",
            ),
            ({"layers": [1], "count": 1}, "pass either the layers to drop, .* or their number"),
            (
                {"count": 1},
                "count= drops the layers that change the hidden states least, which is measured "
                "on data",
            ),
            ({"layers": []}, r"layers=\[\] names no layer: model.layers has layers 0 to 3"),
            ({"layers": [4, -1]}, r"layers=\[4, -1\] names layer 4, -1: model.layers has"),
            ({"layers": range(4)}, "names all layers: .* and at least one has to be kept"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, arguments: Any, message: str) -> None:
        model = deep_zoo.build("llama")
        before = small.state_of(model)
        with pytest.raises(ValueError, match=message):
            drop_layers(model, **arguments)
        small.assert_same(before, small.state_of(model))

    def test_a_count_has_to_leave_a_layer(self) -> None:
        model = deep_zoo.build("llama")
        with pytest.raises(ValueError, match=r"count=4: model\.layers has 4 layers"):
            drop_layers(model, count=4, calibration=calibrate(model, batches()))

    def test_numbers_come_in_any_order(self) -> None:
        assert drop_layers(deep_zoo.build("llama"), [2, 0]).dropped == (0, 2)

    def test_a_model_with_several_lists_is_asked_which(self) -> None:
        model = deep_zoo.build("bart")
        message = (
            r"has 2 lists of layers: model\.encoder\.layers, model\.decoder\.layers\. Name one of "
            "them"
        )
        with pytest.raises(UnsupportedModelError, match=message):
            drop_layers(model, [0])
        with pytest.raises(UnsupportedModelError, match=r"which='middle' names no list of layers"):
            drop_layers(model, [0], which="middle")
        assert drop_layers(model, [0], which="decoder").layers == "model.decoder.layers"
        assert drop_layers(model, [0], which="model.encoder.layers").kept == (1, 2, 3)

    def test_a_class_without_such_a_list_is_refused(self) -> None:
        config = hf.AlbertConfig(
            vocab_size=99,
            embedding_size=16,
            hidden_size=32,
            num_attention_heads=4,
            num_hidden_layers=4,
            intermediate_size=64,
        )
        message = r"AlbertModel has no list of layers that its config can shorten"
        with pytest.raises(UnsupportedModelError, match=message):
            drop_layers(hf.AlbertModel(config), [1])

    def test_what_grows_with_the_layers_is_named(self) -> None:
        model = deep_zoo.build("wav2vec2")
        config = copy.deepcopy(model.config)
        config.use_weighted_layer_sum = True
        classes = hf.Wav2Vec2ForSequenceClassification(config)
        with pytest.raises(
            UnsupportedModelError, match="the config also builds another layer_weights"
        ):
            drop_layers(classes, [1])

    def test_a_config_that_does_not_build_the_model_is_refused(self) -> None:
        model = deep_zoo.build("llama")
        model.model.layers = model.model.layers[:3]
        with pytest.raises(UnsupportedModelError, match="disagree before any pruning"):
            drop_layers(model, [0])

    def test_a_model_inside_a_module_is_found(self) -> None:
        model = deep_zoo.build("llama")
        assert drop_layers(torch.nn.Sequential(model), [1]).layers == "model.layers"
        assert model.config.num_hidden_layers == 3


class TestConfig:
    def test_a_rule_becomes_a_list_where_the_class_takes_one(self) -> None:
        model = deep_zoo.build("qwen3_moe", mlp_only_layers=[], decoder_sparse_step=2)
        original = copy.deepcopy(model)
        report = drop_layers(model, [0])
        assert report.fields == {
            "decoder_sparse_step": (2, 1),
            "mlp_only_layers": ([], [1]),
            "num_hidden_layers": (4, 3),
        }
        assert_same_as_passing_on(original, model, report)

    @pytest.mark.parametrize(
        ("dense", "dropped", "named"), [([1], 0, [0, 1]), ([0], 0, [1]), ([1], 2, [0, 1])]
    )
    def test_a_rule_and_a_list_become_one_list(
        self, dense: list[int], dropped: int, named: list[int]
    ) -> None:
        """Every second layer has experts, but for those that the list names."""
        model = deep_zoo.build("qwen3_moe", mlp_only_layers=dense, decoder_sparse_step=2)
        original = copy.deepcopy(model)
        report = drop_layers(model, [dropped])
        assert (model.config.decoder_sparse_step, model.config.mlp_only_layers) == (1, named)
        assert_same_as_passing_on(original, model, report)

    def test_a_list_names_layers_of_several_kinds(self) -> None:
        """The dense layers are of two kinds, as every second layer has a window."""
        model = deep_zoo.build(
            "qwen3_moe",
            num_hidden_layers=5,
            mlp_only_layers=[1],
            decoder_sparse_step=2,
            use_sliding_window=True,
            sliding_window=4,
            max_window_layers=2,
        )
        original = copy.deepcopy(model)
        report = drop_layers(model, [0])
        assert (model.config.decoder_sparse_step, model.config.mlp_only_layers) == (1, [0, 1, 3])
        assert_same_as_passing_on(original, model, report)

    def test_a_rule_that_stays_true_stays(self) -> None:
        model = deep_zoo.build("qwen3_moe", mlp_only_layers=[], decoder_sparse_step=2)
        assert drop_layers(model, [0, 1]).fields == {"num_hidden_layers": (4, 2)}

    def test_windows_by_a_rule(self) -> None:
        model = deep_zoo.build(
            "qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=2
        )
        report = drop_layers(model, [0, 3])
        assert report.fields["layer_types"][1] == ["full_attention", "sliding_attention"]
        assert [layer.self_attn.sliding_window for layer in model.model.layers] == [None, 4]

    def test_a_list_that_is_as_long_by_chance_stays(self) -> None:
        model = deep_zoo.build("wav2vec2", num_hidden_layers=5)
        before = {name: list(getattr(model.config, name)) for name in ("tdnn_dim", "tdnn_kernel")}
        assert drop_layers(model, [1]).fields == {"num_hidden_layers": (5, 4)}
        assert {name: list(getattr(model.config, name)) for name in before} == before

    def test_a_backbone_returns_the_same_stages(self) -> None:
        config = hf.Dinov2Config(**{**zoo._VISION, "num_hidden_layers": 6}, out_indices=[2, 4, 6])
        model = hf.Dinov2Backbone(config).eval()
        original, pixels = copy.deepcopy(model), zoo.inputs(model)
        report = drop_layers(model, [2])
        assert model.config.out_indices == [2, 3, 5]
        assert model.config.stage_names[-1] == "stage5"
        expected = deep_zoo.passing_on(original, report.layers, [2])(**pixels).feature_maps
        assert all(map(torch.equal, model(**pixels).feature_maps, expected))

    def test_a_stage_that_is_returned_twice_is_refused(self) -> None:
        config = hf.Dinov2Config(**{**zoo._VISION, "num_hidden_layers": 6}, out_indices=[2, 3])
        with pytest.raises(ConfigSyncError, match=r"feature_maps\[0\] differs"):
            drop_layers(hf.Dinov2Backbone(config), [2])

    def test_layers_that_compute_by_their_place_are_refused(self) -> None:
        model = deep_zoo.build("gpt2", scale_attn_by_inverse_layer_idx=True)
        before = small.state_of(model)
        with pytest.raises(ConfigSyncError, match=r"logits differs by .* their number or position"):
            drop_layers(model, [0])
        small.assert_same(before, small.state_of(model))
        assert drop_layers(model, [3]).fields == {"n_layer": (4, 3)}

    def test_a_list_of_two_limits_is_none_of_two_layers(self) -> None:
        sizes = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8}
        config = hf.Mamba2Config(**sizes, vocab_size=64, num_hidden_layers=2, chunk_size=8)
        model = hf.Mamba2ForCausalLM(config).eval()
        assert drop_layers(model, [0]).fields == {"num_hidden_layers": (2, 1)}
        assert list(model.config.time_step_limit) == [0.0, float("inf")]

    @pytest.mark.skipif(not hasattr(hf, "MuseSparkConfig"), reason="Transformers has no MuseSpark")
    def test_a_list_that_only_a_forward_pass_reads(self) -> None:
        """Its images do not fit its text, so that it runs on text alone."""
        text = {"hidden_size": 32, "num_hidden_layers": 5, "head_dim": 8, "vocab_size": 32}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "moe_hidden_size": 16}
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
        thetas = {"layer_rope_theta": [5e5, 0, 5e5, 0, 0], "bos_token_id": 1, "eos_token_id": 1}
        vision = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        sound = {"hidden_sizes": [8, 8], "depths": [1, 1], "patch_sizes": [16, 3]}
        config = hf.MuseSparkConfig(
            text_config={**text, **heads, **experts, **thetas},
            vision_config={**vision, "intermediate_size": 16},
            audio_config={**sound, "num_hidden_layers": 2, "out_hidden_size": 32},
            out_hidden_size=100,
            **{f"{kind}_token_id": 3 + n for n, kind in enumerate(("audio", "image", "video"))},
        )
        model = hf.MuseSparkModel(config).eval()
        report = drop_layers(model, [0, 1], which="language_model.layers")
        assert model.config.text_config.layer_rope_theta == [5e5, 0, 0]
        assert report.proof.endswith("whose dropped layers pass their input on unchanged")

    def test_a_class_that_fails_on_initial_weights_is_refused(self) -> None:
        model = hf.RwkvModel(hf.RwkvConfig(vocab_size=99, hidden_size=16, num_hidden_layers=3))
        assert drop_layers(model, [1]).kept == (0, 2)
        with pytest.raises(ConfigSyncError, match=r"2 layers can be loaded, .* division by zero"):
            drop_layers(model, [1])
        assert len(model.blocks) == model.config.num_hidden_layers == 2


class TestState:
    def test_parameters_mode_and_hooks_stay(self) -> None:
        model = deep_zoo.build("llama").train()
        layers = list(model.model.layers)
        kept = [id(parameter) for layer in layers[1:] for parameter in layer.parameters()]
        container = model.model.layers
        drop_layers(model, [0])
        assert model.model.layers is container
        assert list(container) == layers[1:]
        assert [id(parameter) for parameter in container.parameters()] == kept
        assert all(part.training for part in model.modules())
        assert not any(part._forward_hooks for part in model.modules())

    @pytest.mark.parametrize("step", ["write_fields", "_write_values"])
    def test_a_failure_leaves_everything_as_it_was(
        self, step: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = deep_zoo.build("gemma2")
        before = small.state_of(model)

        def fail(*_: Any) -> None:
            raise OSError("out of memory")

        monkeypatch.setattr(apply, step, fail)
        with pytest.raises(OSError, match="out of memory"):
            drop_layers(model, [0])
        small.assert_same(before, small.state_of(model))
        assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]

    @pytest.mark.skipif(not layer_zoo.ENTRIES, reason="layers may differ from 5.15 on")
    def test_a_failure_leaves_layers_that_differ_as_they_were(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = _differing()
        before, inputs = model.config.to_json_string(), zoo.inputs(model)
        logits = model(**inputs).logits

        def fail(*_: Any) -> None:
            raise OSError("out of memory")

        monkeypatch.setattr(apply, "_write_values", fail)
        with pytest.raises(OSError, match="out of memory"):
            drop_layers(model, [0])
        assert model.config.to_json_string() == before
        assert torch.equal(model(**inputs).logits, logits)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_any_dtype(self, dtype: torch.dtype) -> None:
        model = deep_zoo.build("llama").to(dtype)
        original = copy.deepcopy(model)
        assert_same_as_passing_on(original, model, drop_layers(model, [1, 2]))


def _differing() -> Any:
    """A Llama of four layers whose feed-forward widths differ."""
    model = deep_zoo.build("llama")
    hook = HFConfigSyncHook(per_layer=True, prune=("intermediate_size",))
    tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        pruning_ratio=0.3,
        pruning_ratio_dict=dict(zip(model.model.layers, (0.2, 0.4, 0.6, 0.2), strict=True)),
        importance=tp.importance.GroupMagnitudeImportance(),
        hooks=[hook],
    ).step()
    assert len({layer.mlp.up_proj.out_features for layer in model.model.layers}) == 3
    return model


_HYBRID: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
}


def lfm2() -> Any:
    kinds = ["conv", "full_attention", "conv"]
    config = hf.Lfm2Config(**_HYBRID, intermediate_size=48, block_multiple_of=8, layer_types=kinds)
    return hf.Lfm2ForCausalLM(config).eval()


def granite() -> Any:
    config = hf.GraniteMoeHybridConfig(
        **_HYBRID,
        shared_intermediate_size=48,
        layer_types=["mamba", "attention", "mamba"],
        num_local_experts=0,
        num_experts_per_tok=0,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_n_groups=1,
    )
    return hf.GraniteMoeHybridForCausalLM(config).eval()


class TestCache:
    def test_a_cache_for_another_number_of_layers_is_told(self) -> None:
        """T5 of Transformers 5 makes its cache for the encoder's layers."""
        model = deep_zoo.build("t5", num_layers=4)
        report = drop_layers(model, [3], which="encoder")
        inputs, settings = zoo.inputs(model), {"max_new_tokens": 2, "min_new_tokens": 2}
        try:
            model.generate(**inputs, **settings, use_cache=True)
        except IndexError:
            assert "the model no longer generates with a cache" in report.notes[0]
        else:
            assert report.notes == ()
        assert model.generate(**inputs, **settings, use_cache=False) is not None

    @pytest.mark.parametrize("build", [lfm2, granite])
    def test_the_last_layer_that_a_cache_asks_has_to_stay(self, build: Any) -> None:
        """Hybrids ask their attention layers how many tokens the cache has."""
        model = build()
        before = small.state_of(model)
        message = (
            r"fails with the cache that it makes by default: .*\. Keep at least one layer of each "
            "kind"
        )
        with pytest.raises(ConfigSyncError, match=message):
            drop_layers(model, [1])
        small.assert_same(before, small.state_of(model))
        assert drop_layers(model, [2]).notes == ()
        assert model(torch.arange(3, 9)[None]).past_key_values is not None

    def test_generation_is_not_touched(self) -> None:
        model = deep_zoo.build("gemma2")
        state = torch.random.get_rng_state()
        assert drop_layers(model, [0]).notes == ()
        assert torch.equal(torch.random.get_rng_state(), state)


class TestTogetherWithPruning:
    def test_a_second_drop(self) -> None:
        model = deep_zoo.build("gemma2")
        drop_layers(model, [1])
        original = copy.deepcopy(model)
        report = drop_layers(model, [0])
        assert model.config.layer_types == ["sliding_attention", "full_attention"]
        assert_same_as_passing_on(original, model, report)

    @pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "deepseek_v3"])
    def test_widths_are_pruned_afterwards(self, name: str) -> None:
        model = deep_zoo.build(name)
        drop_layers(model, [1])
        hook = pruned(model, prune=("intermediate_size",))
        assert model.config.intermediate_size == 48
        assert hook.last_report.proof
        assert type(model)(copy.deepcopy(model.config)).num_parameters() == model.num_parameters()

    @pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "deepseek_v3"])
    def test_layers_are_dropped_afterwards(self, name: str) -> None:
        model = deep_zoo.build(name)
        pruned(model, prune=("intermediate_size",))
        original = copy.deepcopy(model)
        report = drop_layers(model, [1])
        assert model.config.intermediate_size == 48
        assert_same_as_passing_on(original, model, report)

    @pytest.mark.filterwarnings("ignore:HFConfigSyncHook failed after an interrupted step")
    def test_a_pruner_of_before_says_that_it_is_out_of_date(self) -> None:
        model = deep_zoo.build("llama")
        pruner = tp.pruner.MetaPruner(
            model,
            example_inputs=None,
            importance=tp.importance.GroupMagnitudeImportance(),
            hooks=[HFConfigSyncHook(prune="inner")],
        )
        drop_layers(model, [3])
        with pytest.raises(UnsupportedModelError, match=r"has lost model\.layers\.3 since"):
            pruner.step()

    @pytest.mark.skipif(not layer_zoo.ENTRIES, reason="layers may differ from 5.15 on")
    def test_layers_that_differ(self) -> None:
        model = _differing()
        widths = [layer.mlp.up_proj.out_features for layer in model.model.layers]
        original = copy.deepcopy(model)
        report = drop_layers(model, [1])
        entries = [model.config.per_layer_config[n].intermediate_size for n in range(3)]
        assert entries == [widths[0], *widths[2:]]
        assert type(model).__name__ == "LayerwiseLlamaForCausalLM"
        assert_same_as_passing_on(original, model, report)
        drop_layers(model, [1])
        assert model.config.intermediate_size == widths[0] == widths[3]
        assert type(model) is hf.LlamaForCausalLM  # both that are left are as wide
        assert type(model)(copy.deepcopy(model.config)).num_parameters() == model.num_parameters()


class TestInfluence:
    def test_it_is_one_minus_the_cosine_of_what_goes_in_and_comes_out(self) -> None:
        model, data = deep_zoo.build("llama"), batches(2)
        found = layer_influence(model, list(model.model.layers), data)
        sums = [0.0] * 4
        for batch in data:
            states = model(**batch, output_hidden_states=True).hidden_states
            seen: list[Any] = []
            handle = model.model.layers[-1].register_forward_hook(
                lambda _, __, out, seen=seen: seen.append(hidden_out(out))
            )
            model(**batch)
            handle.remove()
            states = (*states[:-1], seen[0])  # the last one is normalised
            for number in range(4):
                cosine = torch.cosine_similarity(states[number], states[number + 1], dim=-1)
                sums[number] += (1 - cosine).mean().item() / len(data)
        assert found == pytest.approx(sums, abs=1e-5)

    def test_the_layers_that_change_least_go(self) -> None:
        model = deep_zoo.build("llama")
        with torch.no_grad():
            for number in (1, 3):
                model.model.layers[number].self_attn.o_proj.weight.mul_(1e-3)
                model.model.layers[number].mlp.down_proj.weight.mul_(1e-3)
        report = drop_layers(model, count=2, calibration=calibrate(model, batches()))
        assert report.dropped == (1, 3)
        assert max(report.influence[1], report.influence[3]) < 1e-4 < report.influence[0]
        assert f"(1: influence {report.influence[1]:.3f}, 3: " in str(report)

    def test_a_layer_that_no_config_can_miss_is_passed_by(self) -> None:
        model = deep_zoo.build("t5")
        with torch.no_grad():
            for name, parameter in model.encoder.block[0].named_parameters():
                if name.endswith(("o.weight", "wo.weight")):
                    parameter.zero_()
        data = [zoo.inputs(model, seed) for seed in range(9)]
        report = drop_layers(model, count=1, calibration=calibrate(model, data), which="encoder")
        assert report.influence[0] == min(report.influence)
        assert report.dropped != (0,)
        note = (
            "layers 0 change the hidden states less than some of the dropped layers, but were "
            "kept, because no config describes the model without"
        )
        assert note in report.notes[0]

    def test_another_models_calibration_is_refused(self) -> None:
        calibration = calibrate(deep_zoo.build("llama"), batches())
        with pytest.raises(CalibrationError, match="the calibration was measured on another model"):
            drop_layers(deep_zoo.build("llama"), count=1, calibration=calibration)


class TestReport:
    def test_it_says_what_went(self) -> None:
        model = deep_zoo.build("llama")
        report = drop_layers(model, [1, 2])
        lines = str(report).split("\n")
        assert lines[0] == "model.layers: 2 of 4 layers dropped (1, 2)"
        assert lines[1] == "  num_hidden_layers 4 -> 2"
        assert lines[2].startswith(
            "  parameters 136,128 -> 74,432 (54.7%); proved: 21 tensors have"
        )
        assert repr(report).startswith("DroppedLayers(model.layers: 2 of 4")
        assert "<p>num_hidden_layers 4 -&gt; 2</p>" in report._repr_html_()

    def test_it_says_if_no_output_depends_on_the_layer(self) -> None:
        config = hf.Dinov2Config(**{**zoo._VISION, "num_hidden_layers": 6}, out_indices=[1, 2])
        report = drop_layers(hf.Dinov2Backbone(config), [4])
        assert report.proof.endswith(
            "its outputs are unchanged, but on small inputs no output depends on these layers"
        )

    def test_it_is_json(self) -> None:
        report = drop_layers(deep_zoo.build("llama"), [1, 2])
        data = json.loads(json.dumps(report.to_dict()))
        assert data["schema_version"] == 1
        assert (data["dropped"], data["kept"]) == ([1, 2], [0, 3])
        assert data["fields"] == {"num_hidden_layers": {"old": 4, "new": 2}}
        assert data["parameters"]["after"] < data["parameters"]["before"]

    def test_a_class_that_cannot_be_fed_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from tp_hf_config.hook import drop_layers as module

        def fail(*_: Any) -> None:
            raise RuntimeError("no such inputs")

        monkeypatch.setattr(module, "example_inputs", fail)
        report = drop_layers(deep_zoo.build("llama"), [1])
        assert report.proof.endswith("because no small inputs were found: no such inputs")


def test_a_model_in_float64_is_compared_though_its_class_casts_to_float32() -> None:
    model = deep_zoo.build("llama").double()
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, given: given[0].float())
    report = drop_layers(model, [1])
    assert (
        "its outputs equal those of the original whose dropped layers pass their input on"
        in report.proof
    )


def test_a_class_that_insists_on_float32_inside_is_compared_in_float64() -> None:
    """Its attention divides by the layer's number, so it has to be refused."""
    config = hf.ImageGPTConfig(
        vocab_size=17,
        n_positions=16,
        n_embd=16,
        n_layer=4,
        n_head=2,
        reorder_and_upcast_attn=True,
        scale_attn_by_inverse_layer_idx=True,
    )
    model = hf.ImageGPTForImageClassification(config).double().eval()
    tiny.randomise(model)
    with pytest.raises(ConfigSyncError, match="depends on their number or position"):
        drop_layers(model, [2])
    assert config.n_layer == len(model.transformer.h) == 4
