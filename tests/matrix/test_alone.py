"""``hooks=[HFConfigSyncHook()]`` and nothing else: Torch-Pruning's own examples, on tiny models.

Each pruner is given what Torch-Pruning's examples give theirs (examples/LLMs/prune_llm.py and
examples/transformers/prune_hf_*.py, 1.6.1), and the hook; nothing is set by hand afterwards.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import small
import tiny
import torch
import torch_pruning as tp
import transformers as hf
import zoo
from torch import nn

from tp_hf_config import (
    ConfigSyncError,
    HFConfigSyncHook,
    PrunerSettingsWarning,
    SyncReport,
    UnsupportedModelError,
)
from tp_hf_config.graph.config_graph import ConfigGraph

FIVE = small.TRANSFORMERS >= (5,)
L2 = tp.importance.MagnitudeImportance(p=2, group_reduction="mean")


def text() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(3, 11).view(1, 8)}


def image(model: Any) -> torch.Tensor:
    size = model.config.image_size
    return torch.rand(1, 3, size, size)


def heads_of(model: nn.Module, *names: str) -> dict[nn.Module, int]:
    """``num_heads=`` as the examples make it, layer by layer."""
    return {
        layer: getattr(module, "num_attention_heads", None) or model.config.num_attention_heads
        for module in model.modules()
        for name in names
        if (layer := getattr(module, name, None)) is not None
        and not isinstance(layer, nn.Parameter)
    }


def prune(
    model: Any, *, steps: int = 1, cls: Any = None, **settings: Any
) -> tuple[Any, SyncReport]:
    """Prune with a hook and nothing that was learned of the model; the hook's last report."""
    hook = HFConfigSyncHook()
    arguments = {"importance": L2, "pruning_ratio": 0.5, "iterative_steps": steps, **settings}
    pruner = (cls or tp.pruner.BasePruner)(model, **arguments, hooks=[hook])
    for _ in range(steps):
        for group in pruner.step(interactive=True):
            group.prune()
    assert hook.last_report is not None
    return pruner, hook.last_report


def assert_same_again(model: Any, inputs: dict[str, torch.Tensor], folder: Path) -> None:
    """Saved and loaded again, the model has the same weights, and computes the same."""
    model.eval().save_pretrained(folder)
    again, loading = type(model).from_pretrained(folder, output_loading_info=True)
    assert {key: value for key, value in loading.items() if value} == {}
    weights = again.state_dict()
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(one, weights[name]) for name, one in model.state_dict().items())
    with torch.no_grad():
        expected, came = model(**inputs), again.eval()(**inputs)
    assert expected.keys() == came.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, came[key], rtol=1e-5, atol=1e-6)


def randomised(model: Any) -> Any:
    tiny.randomise(model)
    return model.eval()


def said(caught: Any) -> list[str]:
    return [str(one.message) for one in caught if one.category is PrunerSettingsWarning]


class OfMerging(tp.BasePruningFunc):
    """What prune_hf_swin.py has to write for the layer that merges patches."""

    def prune_out_channels(self, layer: Any, idxs: Any) -> Any:
        raise AssertionError("never called")

    prune_in_channels = get_in_channels = get_out_channels = prune_out_channels


class TestExamples:
    """Each of Torch-Pruning's scripts for Hugging Face models."""

    @pytest.mark.parametrize(
        ("name", "kv", "left"), [("llama", 2, 2), ("phi3", 2, 2), ("qwen2", 2, 2)]
    )
    def test_llm(self, name: str, kv: int, left: int, tmp_path: Path) -> None:
        model = zoo.build(name)
        num_heads = heads_of(model, "q_proj", "qkv_proj")
        num_heads |= dict.fromkeys(heads_of(model, "k_proj", "v_proj"), kv)
        fused = {m.gate_up_proj: 2 for m in model.modules() if hasattr(m, "gate_up_proj")}
        pruner, report = prune(
            model,
            example_inputs=text()["input_ids"],
            importance=tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
            global_pruning=False,
            output_transform=lambda output: output.logits,
            ignored_layers=[model.lm_head],
            num_heads=num_heads,
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=0.5,
            out_channel_groups=fused,
            round_to=4,
        )
        assert isinstance(pruner.DG, ConfigGraph)
        assert model.config.hidden_size == 32
        assert model.config.intermediate_size == 48
        assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, kv)
        assert model.lm_head.weight.shape == (zoo.VOCAB, 32)
        assert report.graph.startswith("config graph")
        assert_same_again(model, text(), tmp_path)

    def vit(self, model: Any, **settings: Any) -> tuple[list[str], SyncReport]:
        """prune_hf_vit.py."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, report = prune(
                model,
                **{
                    "example_inputs": image(model),
                    "global_pruning": False,
                    "importance": tp.importance.MagnitudeImportance(p=1),
                    "ignored_layers": [model.classifier],
                    "output_transform": lambda output: output.logits.sum(),
                    "num_heads": heads_of(model, "query", "key", "value", "q_proj", "k_proj"),
                    "prune_head_dims": True,
                    "prune_num_heads": False,
                    "head_pruning_ratio": 0.5,
                    **settings,
                },
            )
        return said(caught), report

    def test_vit(self, tmp_path: Path) -> None:
        model = zoo.build("vit")
        told, _ = self.vit(model)
        assert (model.config.hidden_size, model.config.intermediate_size) == (32, 48)
        assert model.config.num_attention_heads == 4
        assert told == [
            "head_pruning_ratio=0.5 has no effect without prune_num_heads=True, as in "
            "Torch-Pruning: no heads are pruned."
        ]
        assert_same_again(model, {"pixel_values": image(model)}, tmp_path)

    def test_vit_bottleneck(self, tmp_path: Path) -> None:
        """What the residual stream is written by is ignored, so its width stays."""
        model = zoo.build("vit")
        written = [
            module
            for name, module in model.named_modules()
            if name.endswith(("attention.output.dense", "attention.o_proj"))
        ]
        assert len(written) == 2
        told, _ = self.vit(model, ignored_layers=[model.classifier, *written])
        assert (model.config.hidden_size, model.config.intermediate_size) == (64, 48)
        if FIVE:
            assert model.config.head_dim == 8
        (stays,) = [one for one in told if "hidden_size" in one]
        assert stays.startswith(
            "hidden_size is kept at 64: ignored_layers= keeps the outputs of vit."
        )
        assert_same_again(model, {"pixel_values": image(model)}, tmp_path)

    def test_swin(self, tmp_path: Path) -> None:
        from transformers.models.swin.modeling_swin import SwinPatchMerging

        model = zoo.build("swin")
        width = model.config.embed_dim
        with pytest.warns(UserWarning, match="customized_pruners= has no effect") as caught:
            _, report = prune(
                model,
                example_inputs=image(model),
                global_pruning=False,
                num_heads=heads_of(model, "query", "key", "value"),
                output_transform=lambda output: output.logits.sum(),
                ignored_layers=[model.classifier],
                customized_pruners={SwinPatchMerging: OfMerging()},
                root_module_types=(nn.Linear, nn.LayerNorm, SwinPatchMerging),
            )
        assert len(caught) == 1
        assert model.config.embed_dim == width // 2
        assert report.groups
        assert_same_again(model, {"pixel_values": image(model)}, tmp_path)

    def test_bert(self, tmp_path: Path) -> None:
        """The pooler is ignored and as wide as the hidden size; so heads cannot go either."""
        model = randomised(small.bert())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, report = prune(
                model,
                example_inputs=text(),
                num_heads=heads_of(model, "query", "key", "value"),
                prune_head_dims=False,
                prune_num_heads=True,
                head_pruning_ratio=0.5,
                output_transform=lambda output: output.pooler_output.sum(),
                ignored_layers=[model.pooler],
            )
        assert report.fields == {"intermediate_size": (64, 32)}
        assert said(caught) == [
            "num_attention_heads + hidden_size is kept at 4 + 32: ignored_layers= keeps the "
            "outputs of pooler.dense, and one config field sets this width everywhere.",
            "hidden_size is kept at 32: ignored_layers= keeps the outputs of pooler.dense, and one "
            "config field sets this width everywhere.",
        ]
        assert_same_again(model, text(), tmp_path)

    def test_bert_without_ignored_layers(self, tmp_path: Path) -> None:
        model = randomised(small.bert())
        _, report = prune(
            model,
            example_inputs=text(),
            num_heads=heads_of(model, "query", "key", "value"),
            prune_head_dims=False,
            prune_num_heads=True,
            head_pruning_ratio=0.5,
        )
        assert report.fields == {
            "num_attention_heads": (4, 2),
            "hidden_size": (32, 16),
            "intermediate_size": (64, 32),
        }
        assert_same_again(model, text(), tmp_path)


def layers(model: Any, name: str) -> list[Any]:
    """All layers of a name."""
    return [module for path, module in model.named_modules() if path.endswith(name)]


class TestArguments:
    """What each argument of the pruner means is what it means in Torch-Pruning."""

    def told(self, model: Any, **settings: Any) -> tuple[list[str], SyncReport]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, report = prune(model, **{"example_inputs": None, **settings})
        assert all(one.filename == __file__ for one in caught)
        assert report.graph.startswith("config graph")
        return said(caught), report

    @pytest.mark.parametrize("inputs", [None, torch.rand(2, 3), "text", {"input_ids": 1}, object()])
    def test_example_inputs_are_not_looked_at(self, inputs: Any) -> None:
        told, report = self.told(small.llama(), example_inputs=inputs)
        assert told == []
        assert report.fields == {"hidden_size": (32, 16), "intermediate_size": (64, 32)}

    def test_positional_arguments(self) -> None:
        model, hook = small.llama(), HFConfigSyncHook()
        tp.pruner.BasePruner(model, text(), L2, False, 0.25, hooks=[hook]).step()
        assert hook.last_report is not None
        assert hook.last_report.fields == {"hidden_size": (32, 24), "intermediate_size": (64, 48)}

    @pytest.mark.parametrize(
        "cls", [tp.pruner.MetaPruner, tp.pruner.GroupNormPruner, tp.pruner.GrowingRegPruner]
    )
    def test_every_class_of_pruners(self, cls: Any) -> None:
        told, report = self.told(small.llama(), cls=cls)
        assert told == []
        assert report.fields == {"hidden_size": (32, 16), "intermediate_size": (64, 32)}

    def test_a_class_that_sets_arguments_by_itself(self) -> None:
        class Mine(tp.pruner.BasePruner):  # type: ignore[misc]
            def __init__(self, model: Any, importance: Any):
                super().__init__(
                    model, None, importance, pruning_ratio=0.25, ignored_layers=layers(model, "mlp")
                )

        model, hook = small.llama(), HFConfigSyncHook()
        with pytest.warns(
            PrunerSettingsWarning, match="^hidden_size is kept at 32: ignored_layers="
        ):
            pruner = Mine(model, L2, hooks=[hook])
        assert isinstance(pruner.DG, ConfigGraph)
        pruner.step()
        assert hook.last_report is not None
        assert hook.last_report.groups == []

    def test_ignored_layers_of_the_feed_forward(self) -> None:
        model = small.llama()
        told, report = self.told(model, ignored_layers=layers(model, "gate_proj")[:1])
        assert told == [
            "intermediate_size is kept at 64: ignored_layers= keeps the outputs of "
            "model.layers.0.mlp.gate_proj, and one config field sets this width everywhere."
        ]
        assert report.fields == {"hidden_size": (32, 16)}
        assert told[0] in report.notes

    def test_a_layer_that_only_reads_a_width_keeps_nothing(self) -> None:
        model = zoo.build("gpt2")
        told, report = self.told(model, ignored_layers=[model.lm_head, *layers(model, "attn")])
        assert [one.partition(" ")[0] for one in told] == ["n_embd"]
        assert report.fields == {"n_inner": (96, 48)}
        model = zoo.build("gpt2")
        told, report = self.told(model, ignored_layers=layers(model, "mlp.c_proj"))
        assert [one.partition(":")[0] for one in told] == ["n_embd is kept at 64"]
        assert report.fields == {"n_inner": (96, 48)}

    def test_an_ignored_parameter(self) -> None:
        model = small.llama()
        told, report = self.told(model, ignored_layers=[model.model.norm.weight])
        assert told == ["hidden_size is kept at 32: ignored_layers= keeps model.norm.weight."]
        assert report.fields == {"intermediate_size": (64, 32)}

    def test_everything_ignored(self) -> None:
        model = small.llama()
        told, report = self.told(model, ignored_layers=[model])
        assert [one.partition(":")[0] for one in told] == [
            "hidden_size is kept at 32",
            "intermediate_size is kept at 64",
        ]
        assert report.groups == []

    def test_ratios_by_layers_that_torch_pruning_does_not_know(self) -> None:
        """``Conv1D`` is no layer to Torch-Pruning."""
        model = zoo.build("gpt2")
        ratios = dict.fromkeys(layers(model, "c_fc"), 0.25)
        told, report = self.told(model, pruning_ratio_dict=ratios)
        assert told == []
        assert report.fields == {"n_embd": (64, 32), "n_inner": (96, 72)}

    def test_ratios_by_blocks(self) -> None:
        """A feed-forward block puts out the residual stream too."""
        model = small.llama()
        ratios = dict.fromkeys(layers(model, "mlp"), 0.25)
        told, report = self.told(model, pruning_ratio_dict=ratios)
        assert told == []
        assert report.fields == {"hidden_size": (32, 24), "intermediate_size": (64, 48)}

    def test_ratios_by_a_tuple_of_layers(self) -> None:
        model = small.llama()
        told, report = self.told(
            model, pruning_ratio_dict={tuple(layers(model, "mlp.up_proj")): 0.25}
        )
        assert told == []
        assert report.fields == {"hidden_size": (32, 16), "intermediate_size": (64, 48)}

    def test_ratios_by_any_layer_of_a_group(self) -> None:
        """Each layer that loses outputs with the residual stream says how much."""
        names = ("embed_tokens", "o_proj", "down_proj", "input_layernorm", "model.norm")
        for name in names:
            model = small.llama()
            told, report = self.told(
                model, pruning_ratio_dict=dict.fromkeys(layers(model, name), 0.25)
            )
            assert (name, told, report.fields) == (
                name,
                [],
                {"hidden_size": (32, 24), "intermediate_size": (64, 32)},
            )

    def test_ratios_that_decide_nothing(self) -> None:
        model = small.llama()
        told, report = self.told(
            model,
            pruning_ratio_dict={model.lm_head: 0.25, **dict.fromkeys(layers(model, "v_proj"), 0.1)},
        )
        assert told == [
            "pruning_ratio_dict= has no effect for lm_head, model.layers.0.self_attn.v_proj, "
            "model.layers.1.self_attn.v_proj: none of its output channels is pruned."
        ]
        assert report.fields == {"hidden_size": (32, 16), "intermediate_size": (64, 32)}

    def test_two_ratios_for_one_group(self) -> None:
        model = small.llama()
        first, second = layers(model, "o_proj")
        told, report = self.told(model, pruning_ratio_dict={first: 0.25, second: 0.125})
        assert told == [
            "pruning_ratio_dict= has the ratios 0.25, 0.125 for layers that lose the same "
            "channels (hidden_size); Torch-Pruning uses the ratio of the first layer. Give them "
            "one ratio."
        ]
        assert report.fields["hidden_size"] in [(32, 24), (32, 28)]

    def test_head_ratios_by_layer(self) -> None:
        model = small.llama(num_attention_heads=8, num_key_value_heads=4)
        told, report = self.told(
            model,
            prune_num_heads=True,
            head_pruning_ratio_dict=dict.fromkeys(layers(model, "q_proj"), 0.5),
            pruning_ratio=0.25,
        )
        assert told == []
        assert report.fields["num_attention_heads"] == (8, 4)

    def test_heads_without_a_ratio_stay(self) -> None:
        """As in Torch-Pruning; and the hidden size, which could go with them, goes by its own."""
        told, report = self.told(randomised(small.bert()), prune_num_heads=True)
        assert told == [
            "prune_num_heads=True has no effect without head_pruning_ratio=, as in Torch-Pruning: "
            "no heads are pruned."
        ]
        assert report.fields == {"hidden_size": (32, 16), "intermediate_size": (64, 32)}

    def test_heads_without_a_ratio_keep_what_goes_with_them_alone(self) -> None:
        model = randomised(small.bert())
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", PrunerSettingsWarning)
            tp.pruner.BasePruner(
                model,
                example_inputs=None,
                prune_num_heads=True,
                importance=tp.importance.MagnitudeImportance(),
                pruning_ratio=0.5,
                hooks=[HFConfigSyncHook(prune="inner")],
            ).step()
        assert [str(each.message) for each in told if each.category is PrunerSettingsWarning] == [
            "prune_num_heads=True has no effect without head_pruning_ratio=, as in Torch-Pruning: "
            "no heads are pruned, and neither is hidden_size, which is pruned only with heads."
        ]
        assert (model.config.hidden_size, model.config.intermediate_size) == (32, 32)

    def test_heads_of_the_layers_that_are_named(self) -> None:
        """T5's numbers of heads are those of encoder and decoder at once."""
        model = zoo.build("t5")
        mine = heads_of(model.encoder, "q", "k", "v")
        told, report = self.told(
            model,
            num_heads=mine,
            prune_num_heads=True,
            head_pruning_ratio=0.5,
            prune_head_dims=False,
        )
        assert told == [
            "num_heads is kept at 4: num_heads= does not name "
            "decoder.block.0.layer.1.EncDecAttention.q."
        ]
        assert report.fields == {"d_ff": (96, 48), "d_model": (64, 32)}

    def test_head_dims_go_where_heads_are_named(self) -> None:
        model = zoo.build("t5")
        told, report = self.told(model, num_heads=heads_of(model, "q", "k", "v"))
        assert told == []
        assert report.fields == {"d_ff": (96, 48), "d_kv": (12, 6), "d_model": (64, 32)}

    def test_head_dims_that_hold_positions_stay(self) -> None:
        model = small.llama()
        told, report = self.told(model, num_heads=heads_of(model, "q_proj", "k_proj", "v_proj"))
        (stay,) = told
        assert stay.startswith(
            "prune_head_dims=True, but head dims are kept: LlamaForCausalLM cannot "
        )
        assert "it encodes positions in its head dims" in stay
        assert report.fields == {"hidden_size": (32, 16), "intermediate_size": (64, 32)}

    def test_heads_smaller_with_the_hidden_size(self) -> None:
        told, report = self.told(randomised(small.bert()), prune_head_dims=False)
        (stays,) = told
        assert stays.startswith(
            "hidden_size is kept at 32: pruning it would make the heads of "
            "encoder.layer.0.attention.self."
        )
        assert stays.endswith(" smaller, but prune_head_dims=False.")
        assert report.fields == {"intermediate_size": (64, 32)}

    def test_numbers_of_heads_are_the_models(self) -> None:
        model = small.llama()
        wrong = dict.fromkeys(heads_of(model, "q_proj"), 8)
        told, _ = self.told(model, num_heads=wrong, prune_head_dims=False)
        assert told == [
            f"num_heads= says 8 heads for model.layers.{i}.self_attn.q_proj, but it has 4; 4 is "
            "used."
            for i in range(2)
        ]

    def test_groups_of_channels_that_the_model_has(self) -> None:
        model = zoo.build("phi3")
        fused = dict.fromkeys(layers(model, "gate_up_proj"), 2)
        told, report = self.told(model, out_channel_groups=fused)
        assert told == []
        assert report.fields["intermediate_size"] == (96, 48)

    def test_groups_of_channels_that_it_has_not(self) -> None:
        model = zoo.build("phi3")
        before = small.state_of(model)
        for name, layer in (
            ("out_channel_groups", "gate_up_proj"),
            ("in_channel_groups", "mlp.down_proj"),
        ):
            groups = dict.fromkeys(layers(model, layer), 3)
            with pytest.raises(
                ValueError, match=f"^{name}= \\(for Linear\\) cannot be used with the graph"
            ):
                prune(model, example_inputs=None, **{name: groups})
        small.assert_same(before, small.state_of(model))

    def test_round_to(self) -> None:
        told, report = self.told(small.llama(), round_to=12, pruning_ratio=0.3)
        assert told == []
        assert report.fields == {"hidden_size": (32, 12), "intermediate_size": (64, 36)}

    def test_without_round_to_the_classs_own_multiples_hold(self) -> None:
        told, report = self.told(small.llama(), pruning_ratio=0.3)
        assert told == []
        assert report.fields == {"hidden_size": (32, 20), "intermediate_size": (64, 44)}

    def test_root_module_types(self) -> None:
        """Embeddings alone are outputs of the residual stream, of no feed-forward layer."""
        told, report = self.told(small.llama(), root_module_types=[nn.Embedding])
        assert told == [
            "intermediate_size is kept at 64: root_module_types= (Embedding) does not include the "
            "type of model.layers.0.mlp.gate_proj."
        ]
        assert report.fields == {"hidden_size": (32, 16)}

    def test_several_steps(self) -> None:
        model, hook = small.llama(), HFConfigSyncHook()
        pruner = tp.pruner.MetaPruner(
            model,
            text(),
            L2,
            pruning_ratio=0.5,
            iterative_steps=4,
            max_pruning_ratio=0.75,
            hooks=[hook],
        )
        for _ in range(4):
            pruner.step()
        assert [one.fields["hidden_size"] for one in hook.reports] == [
            (32, 28),
            (28, 24),
            (24, 20),
            (20, 16),
        ]

    def test_isomorphic_ranking_of_groups_of_one_field_is_refused(self) -> None:
        model = small.llama()
        hook = HFConfigSyncHook(strict=True)
        with pytest.raises(ConfigSyncError, match="2 groups of intermediate_size are ranked"):
            tp.pruner.MetaPruner(
                model, text(), L2, isomorphic=True, global_pruning=True, hooks=[hook]
            )

    @pytest.mark.parametrize("name", ["pruning_ratio", "head_pruning_ratio", "max_pruning_ratio"])
    @pytest.mark.parametrize("ratio", [30, 20, -0.5, float("nan"), "much"])
    def test_what_is_no_ratio(self, name: str, ratio: Any) -> None:
        model = small.llama()
        error = TypeError if isinstance(ratio, str) else ValueError
        with pytest.raises(error, match=f"^{name}={ratio!r}: expected a share between 0 and 1"):
            prune(model, example_inputs=None, **{name: ratio})

    def test_per_cent(self) -> None:
        with pytest.raises(ValueError, match=r"between 0 and 1 or None \(30 % is 0\.3\)$"):
            prune(small.llama(), example_inputs=None, pruning_ratio=30)
        model = small.llama()
        with pytest.raises(ValueError, match=r"^pruning_ratio_dict\[a Linear\]=30: expected"):
            prune(model, example_inputs=None, pruning_ratio_dict={model.lm_head: 30})

    def test_a_model_inside_another_module(self) -> None:
        class Classifier(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.head = small.bert(add_pooling_layer=False), nn.Linear(32, 3)

        model = Classifier()
        told, report = self.told(model)
        assert told == []
        assert report.fields == {"intermediate_size": (64, 32)}

    def test_the_hook_says_which_graph(self) -> None:
        model = small.llama()
        hook = HFConfigSyncHook()
        tp.pruner.MetaPruner(model, None, L2, pruning_ratio=0.5, hooks=[hook]).step()
        assert hook.last_report is not None
        assert hook.last_report.graph.startswith("config graph: 3 groups")


class OnlyFloats(hf.LlamaForCausalLM):
    """Runs in float32 alone, so no experiment can be made with it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.dtype == torch.float64:
            raise RuntimeError("float32 only")
        return super().forward(*args, **kwargs)


def test_where_no_tiny_model_runs_the_model_is_refused() -> None:
    model = OnlyFloats(small.llama().config).eval()
    before = small.state_of(model)
    with pytest.raises(UnsupportedModelError) as raised:
        tp.pruner.MetaPruner(
            model,
            text(),
            L2,
            pruning_ratio=0.5,
            output_transform=lambda output: output.logits,
            ignored_layers=[*layers(model, "self_attn"), model.lm_head],
            hooks=[HFConfigSyncHook()],
        )
    assert str(raised.value) == (
        "OnlyFloats cannot be pruned: the tiny model does not run: float32 only. To find the "
        "channels that belong together, a tiny model of the class has to run forward and backward "
        "in float64. Load the weights into a class that does: LlamaModel.from_pretrained(...)."
    )
    small.assert_same(before, small.state_of(model))
