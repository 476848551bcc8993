"""``plan``: what it predicts is what pruning gives, and what it refuses does fail."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import small
import tiny
import torch
import torch_pruning as tp
import transformers as hf
import zoo
from planned import SMOLLM2, narrow, numbers_of, pruned, steps

from tp_hf_config import (
    ConfigSyncError,
    HFConfigSyncHook,
    UnsupportedModelError,
    Width,
    plan,
    prunable,
)
from tp_hf_config.graph.unit_count import UnitCount
from tp_hf_config.model.build import Refusal, class_of
from tp_hf_config.planning.trajectory import MovingWidth, Trajectory

pytestmark = pytest.mark.usefixtures("every_width")

LLAMA_70B = hf.LlamaConfig(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    dtype="bfloat16",
    architectures=["LlamaForCausalLM"],
)


@pytest.fixture(autouse=True)
def _llama(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Llama that is found for a config checks its widths in Transformers 4 too."""
    monkeypatch.setattr(hf, "LlamaForCausalLM", small.LlamaForCausalLM)


def names(width: Width) -> list[str]:
    """The fields of a width as people write them."""
    return [str(path[-1]) for path in width.fields]


class TestAmounts:
    def test_rounds_down_to_what_the_class_takes(self) -> None:
        unit_count = UnitCount(576, multiple=9)
        assert unit_count.after([0.1, 0.2]) == [513, 459]
        assert unit_count.after([0.1, 0.2], round_to=64) == [576, 576]

    def test_every_class_loses_the_same(self) -> None:
        assert UnitCount(9, channel_groups=3).after([0.2, 0.6, 0.99]) == [6, 3, 3]
        assert UnitCount(64, channel_groups=8, multiple=8).after([0.2], round_to=16) == [48]

    def test_no_group_is_emptied(self) -> None:
        assert UnitCount(6).after([0.5, 1.0]) == [3, 3]

    def test_a_layer_that_lost_enough_is_passed_over(self) -> None:
        """Torch-Pruning looks before a step whether a layer has lost more than it may."""
        unit_count = UnitCount(10, layers=((10, 1),))
        assert unit_count.after([0.2, 0.4, 0.6, 0.8], max_ratio=0.5) == [8, 6, 4, 4]
        assert unit_count.after([0.5, 0.8], max_ratio=0.5) == [5, 1]

    def test_nothing_asked_is_nothing_rounded(self) -> None:
        assert UnitCount(65).after([0.0, 0.001], round_to=8) == [65, 64]

    def test_a_class_that_needs_some_units(self) -> None:
        """A router's top 2 of the experts: never fewer than two are left."""
        assert UnitCount(8, minimum=2).after([0.5, 0.9]) == [4, 2]
        assert UnitCount(8, multiple=4, minimum=3).after([0.9]) == [4]

    def test_channels_of_a_head_are_rounded(self) -> None:
        """Sixteen channels at a time, six a head: eight heads at a time; four a head: four."""
        assert UnitCount(16, run=6).after([0.2], round_to=16) == [8]
        assert UnitCount(16, run=4).after([0.2], round_to=16) == [12]

    @pytest.mark.parametrize("kept", range(1, 64))
    def test_a_ratio_for_each_number(self, kept: int) -> None:
        assert UnitCount(63).after([UnitCount(63).ratio_for(kept)]) == [kept]


class TestNumbers:
    def test_smollm2(self) -> None:
        result = plan(SMOLLM2, pruning_ratio=0.2, iterative_steps=3)
        assert steps(result) == [
            {"hidden_size": 531, "intermediate_size": 1408},
            {"hidden_size": 504, "intermediate_size": 1344},
            {"hidden_size": 459, "intermediate_size": 1216},
        ]
        hidden, ffn = result.widths
        assert (hidden.asked, hidden.reached) == (0.2, 1 - 459 / 576)
        assert (hidden.reachable, ffn.reachable) == (range(9, 585, 9), range(1, 1537))
        assert (hidden.multiple, ffn.multiple) == (1, 64)
        assert result.before.parameters == 134_515_008
        assert result.before.bytes == 4 * 134_515_008
        assert result.after is not None
        assert result.after.parameters == 93_972_447
        assert result.refusal is None

    def test_llama_70b(self) -> None:
        result = plan(LLAMA_70B, pruning_ratio=0.25, head_pruning_ratio=0.5)
        assert result.values == {
            "hidden_size": 6144,
            "intermediate_size": 21504,
            "num_attention_heads": 32,
        }
        assert [width.multiple for width in result.widths] == [256] * 3
        assert result.before.parameters == 70_553_706_496
        assert result.before.bytes == 2 * 70_553_706_496

    def test_a_width_under_its_own_multiple_stays(self) -> None:
        """A multiple of 3 heads and of 8 is 24 at least, and there are 18."""
        sizes = {"hidden_size": 18, "num_attention_heads": 3, "num_key_value_heads": 1}
        result = plan(small.llama(**sizes), round_to=8)
        assert result.values == {"hidden_size": 18, "intermediate_size": 32}
        assert result.widths[0].reachable == range(18, 19)
        assert plan(small.llama(**sizes), round_to=8, target_params=0.8).values == {
            "hidden_size": 18,
            "intermediate_size": 40,
        }

    def test_flops_are_those_of_the_products(self) -> None:
        """Two for each weight of a matrix, and the attention over eight tokens."""
        result = plan(SMOLLM2, prune=["intermediate_size"])
        layer = 576 * (576 + 192 + 192 + 576) + 3 * 576 * 1536
        attention = 2 * 8 * 576
        rotary = 32 if small.TRANSFORMERS < (5,) else 0  # a product there, a cosine table here
        assert result.before.flops == 2 * (30 * (layer + attention) + 576 * 49152 + rotary)
        assert result.after is not None
        assert result.after.flops == result.before.flops - 2 * 30 * 3 * 576 * 768

    def test_a_class_that_does_not_run_without_data(self) -> None:
        class NeedsValues(hf.LlamaForCausalLM):
            def forward(self, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
                outputs = super().forward(input_ids, attention_mask, **kwargs)
                self.lm_head.weight.untyped_storage()[0]
                return outputs

        result = plan(NeedsValues(zoo.build("llama").config), prune=["intermediate_size"])
        assert result.before.flops is None
        assert "FLOPs are unknown, because" in result.notes[0]


class TestWhatIsPlanned:
    def test_a_model_without_weights_is_enough(self) -> None:
        with torch.device("meta"):
            model = hf.LlamaForCausalLM(SMOLLM2)
        assert plan(model).values == plan(SMOLLM2).values

    def test_the_class_of_a_config(self) -> None:
        assert class_of(hf.LlamaConfig()) is hf.LlamaForCausalLM
        assert class_of(hf.T5Config()) is hf.T5ForConditionalGeneration
        assert class_of(hf.ViTConfig()) is hf.ViTForImageClassification
        assert class_of(hf.BertConfig(architectures=["BertModel"])) is hf.BertModel
        assert class_of(hf.CLIPVisionConfig()) is hf.CLIPVisionModel

    def test_a_named_class(self) -> None:
        assert plan(SMOLLM2, model_class=hf.LlamaModel).model == "LlamaModel"

    def test_no_class(self) -> None:
        with pytest.raises(UnsupportedModelError, match="model_class="):
            plan(hf.PretrainedConfig())

    def test_neither_model_nor_config(self) -> None:
        with pytest.raises(TypeError, match="expected a Hugging Face model "):
            plan("llama")  # type: ignore[arg-type]

    def test_a_width_that_cannot_be_pruned(self) -> None:
        assert "not interchangeable" in plan(small.llama()).kept["head_dim"]
        with pytest.raises(UnsupportedModelError, match="head_dim"):
            plan(small.llama(), prune=["head_dim"])

    def test_ratios(self) -> None:
        result = plan(small.llama(), ratios={"hidden_size": 0.25, "intermediate_size": 0.5})
        assert result.values == {"hidden_size": 24, "intermediate_size": 32}
        with pytest.raises(ValueError, match=r"pruning_ratio=1\.5"):
            plan(small.llama(), pruning_ratio=1.5)
        with pytest.raises(UnsupportedModelError, match="not among the fields to prune"):
            plan(small.llama(), prune=["hidden_size"], ratios={"intermediate_size": 0.5})

    def test_heads(self) -> None:
        model = small.llama(num_key_value_heads=2)
        query = plan(model, pruning_ratio=0.0, head_pruning_ratio=0.5)
        assert query.values["num_attention_heads"] == 2
        group = plan(model, pruning_ratio=0.0, head_pruning_ratio=0.5, gqa="group")
        assert group.widths[0].after == {"num_key_value_heads": 1, "num_attention_heads": 2}
        stay = "num_attention_heads is kept: head_pruning_ratio=, the share of heads to prune, is 0"
        assert plan(model, prune_num_heads=True).notes == (stay,)
        assert query.notes == plan(model).notes == ()
        assert plan(model, prune_num_heads=True, target_params=0.5).notes == ()
        one_each = small.llama(num_key_value_heads=4)
        assert "num_key_value_heads" in plan(one_each, head_pruning_ratio=0.5).values
        with pytest.raises(ValueError, match="gqa='heads'"):
            plan(one_each, gqa="heads")  # type: ignore[arg-type]
        with pytest.raises(
            UnsupportedModelError, match=r"num_attention_heads.* is pruned by head_pruning_ratio"
        ):
            plan(model, ratios={"num_attention_heads": 0.5}, head_pruning_ratio=0.25)
        together = {"num_attention_heads": 0.5, "hidden_size": 0.25}
        with pytest.raises(UnsupportedModelError, match="can only be pruned together"):
            plan(small.bert(), prune=["num_attention_heads"], ratios=together)
        with pytest.raises(
            UnsupportedModelError, match=r"num_attention_heads.* is pruned by head_pruning_ratio"
        ):
            tp.pruner.BasePruner(
                model,
                example_inputs=None,
                importance=tp.importance.MagnitudeImportance(),
                prune_num_heads=True,
                hooks=[HFConfigSyncHook(ratios={"num_attention_heads": 0.5})],
            )


NOT_A_MULTIPLE = (
    "('validate_architecture': ValueError: The hidden size ({}) is not a multiple of the number of "
    "attention heads ({}))"
)
THREES = "num_attention_heads has to be a multiple of 3"


class TestRatiosThatCannotBe:
    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            (
                {"ratios": {"hidden_size": 0.25}},
                "every pruned width has its own ratio",
            ),
            ({"target_params": 0.8}, "target_params= finds the ratio by itself"),
        ],
    )
    def test_one_that_no_width_follows(self, settings: dict[str, Any], said: str) -> None:
        model = small.llama(num_key_value_heads=2)
        with pytest.raises(ValueError, match=f"pruning_ratio=0.3: {said}"):
            plan(model, pruning_ratio=0.3, **settings)
        expected = plan(model, **settings).values
        assert plan(model, pruning_ratio=0.0, **settings).values == expected

    @pytest.mark.parametrize(
        "settings",
        [
            {"prune": ["hidden_size"], "ratios": {"hidden_size": 0.25}},
            {"prune": (), "head_pruning_ratio": 0.5},
        ],
    )
    def test_one_beside_listed_widths_is_that_of_the_pruner(self, settings: dict[str, Any]) -> None:
        model = small.llama(num_key_value_heads=2)
        assert plan(model, pruning_ratio=0.3, **settings).values == plan(model, **settings).values

    def test_one_that_some_width_follows(self) -> None:
        fields = ("hidden_size", "intermediate_size")
        result = plan(small.llama(), prune=fields, ratios={fields[0]: 0.25}, pruning_ratio=0.5)
        assert result.values == {"hidden_size": 24, "intermediate_size": 32}

    @pytest.mark.parametrize(
        ("settings", "hidden", "said"),
        [
            ({"pruning_ratio": 0.875}, 4, ()),
            (
                {"pruning_ratio": 0.95},
                32,
                (
                    "hidden_size ends at 32; the ratio 0.95 asks for 1.6: this ratio would remove "
                    "all of it, so nothing is pruned; 0.875 removes the most that is possible",
                ),
            ),
            (
                {"ratios": {"hidden_size": 0.75}, "max_pruning_ratio": 0.5},
                16,
                ("hidden_size ends at 16; the ratio 0.75 asks for 8: max_pruning_ratio is 0.5",),
            ),
            (
                {"prune": ["hidden_size"], "round_to": 64},
                32,
                (
                    "hidden_size ends at 32; the ratio 0.5 asks for 16: no smaller multiple of 64 "
                    "is possible",
                ),
            ),
        ],
    )
    def test_less_goes_than_is_asked_for(
        self, settings: dict[str, Any], hidden: int, said: tuple[str, ...]
    ) -> None:
        model = small.llama()
        result = plan(model, **settings)
        assert (result.values["hidden_size"], result.adjusted) == (hidden, said)
        assert pruned(model, result) == [result.values]

    def test_the_report_says_it_too(self) -> None:
        model, hook = small.llama(), HFConfigSyncHook()
        pruner = tp.pruner.BasePruner(
            model,
            example_inputs=None,
            importance=tp.importance.MagnitudeImportance(),
            pruning_ratio=0.95,
            hooks=[hook],
        )
        pruner.step()
        assert hook.last_report is not None
        assert plan(small.llama(), pruning_ratio=0.95).adjusted[0] in hook.last_report.notes


def test_fields_that_go_together_are_listed_once() -> None:
    """With as many key/value heads as heads, several searches come to one width."""
    widths = prunable(small.llama(num_key_value_heads=4)).widths
    assert [width.name for width in widths if len(width.fields) > 1] == [
        "num_attention_heads + num_key_value_heads"
    ]


class TestAdjusted:
    def test_query_heads(self) -> None:
        """As many go from each of three key/value groups: 7.2 heads are 6; 459 is no multiple."""
        result = plan(SMOLLM2, pruning_ratio=0.2, head_pruning_ratio=0.2)
        assert result.refusal is None
        assert result.values == {
            "num_attention_heads": 6,
            "hidden_size": 450,
            "intermediate_size": 1216,
        }
        assert result.widths[0].reached == 1 - 6 / 9
        assert result.adjusted == (
            "step 1: the ratios ask for num_attention_heads 7.2, hidden_size 459 "
            f"({THREES}; {NOT_A_MULTIPLE.format(459, 7)[1:]}; nearest valid: num_attention_heads "
            "6, hidden_size 450",
        )

    def test_key_value_groups(self) -> None:
        """Two of three is the nearest whole number of them: only the hidden size is adjusted."""
        result = plan(SMOLLM2, pruning_ratio=0.2, head_pruning_ratio=0.2, gqa="group")
        assert result.values == {
            "num_key_value_heads": 2,
            "num_attention_heads": 6,
            "hidden_size": 450,
            "intermediate_size": 1216,
        }
        assert result.adjusted == (
            f"step 1: the ratios ask for hidden_size 459 {NOT_A_MULTIPLE.format(459, 6)}; "
            "nearest valid: hidden_size 450",
        )

    def test_every_step(self) -> None:
        """Nearest to what each step asks for, but heads do not come back."""
        result = plan(SMOLLM2, pruning_ratio=0.0, head_pruning_ratio=0.4, iterative_steps=4)
        assert [step["num_attention_heads"] for step in result.widths[0].steps] == [9, 6, 6, 6]
        words = "step {}: the ratios ask for num_attention_heads {} {}; nearest valid: {}"
        assert result.adjusted == (
            words.format(1, 8.1, f"({THREES})", "num_attention_heads 9"),
            words.format(2, 7.2, f"({THREES})", "num_attention_heads 6"),
            words.format(4, 5.4, f"({THREES})", "num_attention_heads 6"),
        )

    def test_numbers_that_cannot_be_left_at_all(self) -> None:
        """The class takes eight heads of 12; as many have to go from each of three groups."""
        sizes = {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 3}
        result = plan(small.llama(**sizes), prune=["num_attention_heads"], pruning_ratio=0.34)
        assert result.adjusted == (
            "step 1: the ratios ask for num_attention_heads 7.92 (num_attention_heads has to be a "
            "multiple of 3); nearest valid: num_attention_heads 6",
        )

    def test_a_width_of_which_a_step_asks_nothing_stays(self) -> None:
        """The first step left 14 of 24 for 7 heads, as many as the second asks for."""
        sizes = {"hidden_size": 24, "num_attention_heads": 8, "num_key_value_heads": 8}
        model = small.llama(**sizes, head_dim=4, intermediate_size=48)
        settings = {"pruning_ratio": 0.59, "head_pruning_ratio": 0.46, "iterative_steps": 3}
        planned = plan(model, gqa="group", **settings)
        heads, hidden, _ = planned.widths
        assert [step["hidden_size"] for step in hidden.steps] == [14, 14, 8]
        assert [step["num_attention_heads"] for step in heads.steps] == [7, 7, 4]
        hook = HFConfigSyncHook(prune="inner", gqa="group")
        pruner = tp.pruner.MetaPruner(
            model,
            example_inputs=None,
            prune_num_heads=True,
            importance=tp.importance.GroupMagnitudeImportance(),
            hooks=[hook],
            **settings,
        )
        for step in hidden.steps:
            pruner.step()
            assert model.config.hidden_size == step["hidden_size"]
        assert model.config.num_attention_heads == 4

    @pytest.mark.full
    def test_several_widths_that_the_class_rounds(self) -> None:
        """It builds multiples of eight of four times the width: of one alone, 10 and 66."""
        config = hf.MobileViTConfig(image_size=64, hidden_sizes=[24, 32, 40])
        prune = ["neck_hidden_sizes[0]", "neck_hidden_sizes[3]"]
        result = plan(config, prune=prune, pruning_ratio=0.3)
        assert result.refusal is None
        assert result.values == dict(zip(prune, (10, 66), strict=True))
        assert result.adjusted == (
            "step 1: the ratios ask for neck_hidden_sizes[0] 11, neck_hidden_sizes[3] 67 (the "
            "class builds mobilevit.encoder.layer.0.layer.0.conv_3x3.convolution.weight with size "
            "48, but pruning gives 44); nearest valid: neck_hidden_sizes[0] 10, "
            "neck_hidden_sizes[3] 66",
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_widths_that_a_class_builds_and_does_not_run_with(self, dtype: torch.dtype) -> None:
        """DeepSeek-V2 reads keys behind ``kv_lora_rank`` numbers as complex ones, in twos.

        In bfloat16 it runs, as it casts them before, and would not once loaded in float32.
        """
        config = hf.DeepseekV2Config(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            first_k_dense_replace=2,
            kv_lora_rank=32,
            num_attention_heads=4,
            num_key_value_heads=4,
            q_lora_rank=24,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
            dtype=dtype,
        )
        result = plan(config, prune=["kv_lora_rank"], pruning_ratio=0.34)
        assert result.values == {"kv_lora_rank": 20}
        assert result.adjusted == (
            "step 1: the ratios ask for kv_lora_rank 21 (the class does not run then: Tensor must "
            "have a stride divisible by 2 for all but last dimension); nearest valid: kv_lora_rank "
            "20",
        )

    def test_far_away(self) -> None:
        """Of 128 heads 88 shall stay: no number between 64 and 128 divides 8192."""
        config = hf.LlamaConfig(**{**LLAMA_70B.to_dict(), "num_attention_heads": 128})
        config.num_key_value_heads = 1
        result = plan(config, prune=["num_attention_heads"], pruning_ratio=0.3125)
        assert result.values == {"num_attention_heads": 64}

    def test_whole_heads_with_the_hidden_size(self) -> None:
        """BERT's config says no head dim: three of four heads are three quarters of the width."""
        result = plan(tiny.build("bert"), pruning_ratio=0.3, head_pruning_ratio=0.3)
        assert result.values == {
            "num_attention_heads": 3,
            "hidden_size": 48,
            "intermediate_size": 88,
        }
        assert result.widths[0].before == {"num_attention_heads": 4, "hidden_size": 64}
        assert result.adjusted == ()

    @pytest.mark.parametrize("hidden", [6, 12, 18, 42, 66])
    def test_the_pruner_does_the_same(self, hidden: int) -> None:
        """Six heads over two of keys go to four where they can; the hidden size goes with them."""
        model = small.llama(hidden_size=72, num_attention_heads=6, num_key_value_heads=2)
        ratios = {"hidden_size": UnitCount(72).ratio_for(hidden), "num_attention_heads": 0.3}
        result = plan(model, ratios=ratios)
        heads, lowered = (6, 6) if hidden == 6 else (4, hidden // 12 * 12)
        assert result.values == {"hidden_size": lowered, "num_attention_heads": heads}
        assert bool(result.adjusted) == ((hidden, heads) != (lowered, 4))
        assert pruned(model, result) == [result.values]


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A class that takes no other values; what it was asked."""
    asked: list[Any] = []
    refusal = Refusal("never")
    monkeypatch.setattr(Trajectory, "_ask", lambda _, values: asked.append(values) or refusal)
    return asked


class TestRefusals:
    def test_less_goes_if_the_class_takes_nothing_smaller(self) -> None:
        model = narrow()
        result = plan(model, pruning_ratio=0.5, iterative_steps=2)
        assert result.refusal is None
        assert steps(result) == [
            {"hidden_size": 24, "intermediate_size": 24},
            {"hidden_size": 24, "intermediate_size": 16},
        ]
        assert result.adjusted == (
            "step 2: the ratios ask for hidden_size 16 (hidden_size: at least 24 are needed); "
            "nearest valid: hidden_size 24",
        )
        assert pruned(model, result) == steps(result)

    def test_what_is_refused_is_not_carried_out(self, never: list[Any]) -> None:
        model = narrow()
        result = plan(model, pruning_ratio=0.5)
        assert result.after is None
        assert str(result.refusal) == (
            "refused at step 1 (hidden_size 16, intermediate_size 16): never. No settings near "
            "these are accepted: change one ratio at a time."
        )
        with pytest.raises(ConfigSyncError, match="cannot be carried out: refused at step 1"):
            pruned(model, result)

    def test_a_misspelt_field(self) -> None:
        with pytest.raises(UnsupportedModelError) as raised:
            plan(narrow(), prune=["intermedite_size"])
        assert str(raised.value).startswith(
            "Narrow cannot prune intermedite_size: no such width (did you mean intermediate_size?)."
            " Widths that can be pruned: hidden_size, intermediate_size, num_attention_heads"
        )

    def test_no_search_without_end(self, never: list[Any]) -> None:
        """It is asked some hundred times, not for every width there is."""
        settings: dict[str, Any] = {"pruning_ratio": 0.5, "head_pruning_ratio": 0.5}
        assert plan(LLAMA_70B, **settings).refusal is not None
        near = 64 + 2 * 25  # what heads could be; the other widths alone
        assert len(never) <= 4 * (40 + 1) + near
        never.clear()
        assert plan(LLAMA_70B, **settings, iterative_steps=200).refusal is not None
        assert len(never) <= 4 * (40 + 200) + near


class TestTarget:
    @pytest.mark.parametrize("share", [0.5, 0.8])
    def test_at_most_and_near(self, share: float) -> None:
        result = plan(SMOLLM2, target_params=share)
        assert result.target == int(134_515_008 * share)
        assert result.after is not None
        assert 0.97 * result.target < result.after.parameters <= result.target
        assert f"target of {result.target:,} parameters" in str(result)

    @pytest.mark.parametrize(
        ("settings", "why"),
        [
            ({"target_params": 60_000}, "1,872 fewer, because widths are rounded"),
            (
                {"target_params": 60_000, "round_to": 1},
                "2,160 fewer, because only whole units are removed",
            ),
            (
                {"target_params": 70_000, "prune": ["intermediate_size"]},
                "176 fewer, because only whole units are removed",
            ),
        ],
    )
    def test_why_it_is_not_the_number(self, settings: dict[str, Any], why: str) -> None:
        result = plan(tiny.build("llama-gqa"), **settings)
        assert result.after is not None
        assert result.why_not_exactly == why
        line = next(one for one in result.lines() if one.startswith("target of"))
        assert line.startswith(
            f"target of {result.target:,} parameters: {result.after.parameters:,} at one ratio of "
        )
        assert line.endswith(f"; {why}")
        assert result.to_dict()["why_not_exactly"] == why

    def test_exactly_the_number(self) -> None:
        model = tiny.build("llama-gqa")
        reached = plan(model, target_params=60_000).after
        assert reached is not None
        result = plan(model, target_params=reached.parameters)
        assert (result.after, result.why_not_exactly) == (reached, None)

    def test_a_number(self) -> None:
        assert plan(SMOLLM2, target_params=100_000_000).target == 100_000_000

    def test_heads_at_the_common_ratio(self) -> None:
        """No head ratio is given, and heads shall go: the ratio that is sought is theirs too."""
        result = plan(LLAMA_70B, prune_num_heads=True, gqa="group", target_params=0.8)
        assert result.refusal is None
        assert result.values == {
            "num_key_value_heads": 7,
            "num_attention_heads": 56,
            "hidden_size": 7168,
            "intermediate_size": 26304,
        }
        assert result.settings.head_pruning_ratio == result.settings.pruning_ratio
        assert result.after is not None
        assert 0.97 * result.target < result.after.parameters <= result.target

    def test_heads_at_their_own_ratio(self) -> None:
        result = plan(SMOLLM2, head_pruning_ratio=0.3, target_params=0.8)
        assert result.values["num_attention_heads"] == 6
        assert result.settings.head_pruning_ratio == 0.3
        assert result.settings.ratios == {}
        assert result.after is not None
        assert 0.97 * result.target < result.after.parameters <= result.target

    def test_fixed_ratios_stay(self) -> None:
        result = plan(
            SMOLLM2,
            prune=["hidden_size", "intermediate_size"],
            ratios={"hidden_size": 0.0},
            target_params=0.8,
        )
        assert result.values["hidden_size"] == 576
        assert result.settings.ratios == {"hidden_size": 0.0}

    def test_a_width_that_the_class_does_not_take_is_replaced(self) -> None:
        model = narrow()
        result = plan(model, target_params=0.5)
        assert result.values == {"hidden_size": 24, "intermediate_size": 2}
        pruned(model, result)
        assert result.after is not None
        assert numbers_of(model)[0] == result.after.parameters <= result.target

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"prune": (), "gqa": "group"}, "at a head ratio of {0.head_pruning_ratio:g}"),
            (
                {"ratios": {"hidden_size": 0.1}, "gqa": "group"},
                "at a head ratio of {0.head_pruning_ratio:g}, hidden_size 0.1",
            ),
            (
                {"head_pruning_ratio": 0.3},
                "at one ratio of {0.pruning_ratio:g}, a head ratio of 0.3",
            ),
        ],
    )
    def test_the_ratios_that_lead_there(self, settings: dict[str, Any], said: str) -> None:
        result = plan(SMOLLM2, target_params=0.9, **settings)
        line = next(line for line in result.lines() if line.startswith("target of"))
        assert f" parameters: {result.after.parameters:,} " in line  # type: ignore[union-attr]
        assert said.format(result.settings) in line

    def test_out_of_reach(self) -> None:
        with pytest.raises(ValueError, match=r"with one ratio for .*, at least"):
            plan(SMOLLM2, prune=["intermediate_size"], target_params=0.2)

    def test_reached_by_pruning(self) -> None:
        model = tiny.build("llama-gqa")
        result = plan(model, prune_num_heads=True, target_params=0.6, iterative_steps=2)
        pruned(model, result)
        assert result.after is not None
        assert numbers_of(model)[0] == result.after.parameters <= result.target


class TestOutput:
    def test_json(self, never: list[Any]) -> None:
        result = plan(narrow(), pruning_ratio=0.5)
        read = json.loads(json.dumps(result.to_dict()))
        assert read["schema_version"] == 1
        assert set(read["versions"]) == {"tp-hf-config", "torch", "transformers", "torch-pruning"}
        assert read["settings"]["pruning_ratio"] == 0.5
        assert read["widths"][0]["reachable"] == "1 to 32"
        assert read["refusal"] == {
            "step": 1,
            "values": {"hidden_size": 16, "intermediate_size": 16},
            "reason": "never",
        }
        assert read["before"]["parameters"] == numbers_of(narrow())[0]
        assert read["after"] is None
        assert read["adjusted"] == []

    def test_json_of_heads(self) -> None:
        result = plan(SMOLLM2, pruning_ratio=0.2, head_pruning_ratio=0.2)
        read = json.loads(json.dumps(result.to_dict()))
        assert read["settings"]["head_pruning_ratio"] == 0.2
        assert read["widths"][0]["reachable"] == "3, 6, 9"
        assert read["widths"][1]["reachable"] == "9, 18 .. 576"
        assert read["refusal"] is None
        assert read["adjusted"] == list(result.adjusted)

    def test_text(self) -> None:
        lines = str(plan(SMOLLM2, pruning_ratio=0.2, iterative_steps=3)).splitlines()
        assert lines[0] == "LlamaForCausalLM"
        assert "576" in lines[2]
        assert "531 -> ... -> 459" in lines[2]
        assert "parameters: 134,515,008 -> 93,972,447 (69.9%)" in lines

    def test_text_of_heads(self) -> None:
        result = plan(SMOLLM2, pruning_ratio=0.2, head_pruning_ratio=0.2)
        lines = str(result).splitlines()
        assert lines[2].split("  ")[0] == "num_attention_heads"
        assert "0.333 of 0.2" in lines[2]
        assert result.adjusted[0] in result.lines()

    def test_no_line_has_more_than_100_columns(self) -> None:
        prune = ("intermediate_size", "num_key_value_heads", "hidden_size")
        result = plan(SMOLLM2, prune=prune, pruning_ratio=0.2, target="gguf-q4_k_m,tp=2")
        assert max(map(len, result.text(full=True).splitlines())) == 100
        assert max(map(len, result.lines())) > 200
        assert len(str(result).splitlines()) == 8


class TestPrunable:
    def test_a_config_or_a_model_without_weights_shows_the_same(self) -> None:
        model = small.bert()
        shown = prunable(model)
        assert [width.name for width in shown.widths if width.reason is None] == [
            "hidden_size",
            "intermediate_size",
            "num_attention_heads + hidden_size",
        ]
        for source in (model.config, small.bert().to("meta")):
            assert prunable(source, model_class=hf.BertModel) == shown


class TestCarriedOut:
    def test_of_a_live_model(self) -> None:
        model = tiny.build("llama-gqa")
        result = plan(
            model,
            ratios={"hidden_size": 0.25, "intermediate_size": 0.4, "num_attention_heads": 0.5},
            iterative_steps=2,
            round_to=4,
        )
        assert pruned(model, result) == steps(result)
        assert result.after is not None
        assert numbers_of(model) == (result.after.parameters, result.after.bytes)

    def test_of_a_config(self) -> None:
        model = tiny.build("llama-gqa")
        result = plan(model.config, pruning_ratio=0.3)
        assert pruned(model, result) == steps(result)

    def test_of_another_model(self) -> None:
        with pytest.raises(UnsupportedModelError, match="another config"):
            pruned(tiny.build("llama-gqa"), plan(SMOLLM2))

    def test_a_pruner_that_says_otherwise(self) -> None:
        model = small.llama()
        hook = HFConfigSyncHook(plan=plan(model, pruning_ratio=0.25))
        words = (
            "the pruner has pruning_ratio=0.3, but the hook's plan has pruning_ratio=0.25. Leave "
        )
        with pytest.raises(ValueError, match=f"^{words}"):
            tp.pruner.BasePruner(
                model,
                example_inputs=None,
                importance=tp.importance.MagnitudeImportance(),
                pruning_ratio=0.3,
                hooks=[hook],
            )

    def test_a_hook_that_is_told_more(self) -> None:
        result = plan(small.llama())
        with pytest.raises(
            ValueError, match=r"the plan already says what to prune\. Leave out prune="
        ):
            HFConfigSyncHook(plan=result, prune="intermediate_size")

    def test_scheduler(self) -> None:
        model = small.llama()
        result = plan(
            model,
            prune=["intermediate_size"],
            iterative_steps=2,
            iterative_pruning_ratio_scheduler=lambda ratio, steps: [0.0, ratio / 4, ratio],
        )
        assert steps(result) == [{"intermediate_size": 56}, {"intermediate_size": 32}]
        assert pruned(model, result) == steps(result)

    def test_planning_touches_nothing(self) -> None:
        model = small.llama()
        before = small.state_of(model)
        plan(model, target_params=0.7, prune_num_heads=True)
        small.assert_same(before, small.state_of(model))


def test_a_search_does_not_depend_on_what_was_asked_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The class takes no width above 450, which is further from 500 than the search goes."""

    def refused(self: Trajectory, values: dict[Any, int]) -> Refusal | None:
        return None if values["width",] <= 450 else Refusal("too wide")

    monkeypatch.setattr(Trajectory, "_ask", refused)
    field_map: Any = SimpleNamespace(values={("width",): 1000})
    moving = MovingWidth((("width",),), UnitCount(1000), 0.5, (0.5,))
    alone = Trajectory(field_map, (moving,), patience=1)
    assert alone.steps() == [{("width",): 500}]
    for size in range(440, 500):
        alone.refusal_of({("width",): size})
    again = replace(alone)
    assert again.steps() == [{("width",): 500}]
    assert not again.accepted()
    assert replace(alone, patience=2).steps() == [{("width",): 450}]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        (
            "num_hidden_layers",
            10**9,
            "says 1,000,000,000, and no model has more than 10,000 layers.",
        ),
        ("hidden_size", 10**12, "would be [40, 1000000000000], larger than in any model. Corr"),
        ("vocab_size", 10**12, "would be [1000000000000, 32], larger than in any model. Correct "),
        ("intermediate_size", 10**12, "would be [1000000000000, 32], larger than in any model. Co"),
        ("intermediate_size", -3, "Trying to create tensor with negative dimension -3"),
    ],
)
@pytest.mark.parametrize("ask", [prunable, lambda config: plan(config, pruning_ratio=0.2)])
def test_absurd_numbers_end_at_once(field: str, value: int, expected: str, ask: Any) -> None:
    config = copy.deepcopy(small.llama().config)
    setattr(config, field, value)
    with pytest.raises(UnsupportedModelError) as raised:
        ask(config)
    assert expected in str(raised.value)
