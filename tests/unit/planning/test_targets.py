"""Widths go to numbers that hardware and tools take: the default grid, and targets."""

from __future__ import annotations

from math import lcm
from typing import Any

import gguf
import pytest
import shell
import small
import tiny
import torch_pruning as tp
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from planned import SMOLLM2, changed

from tp_hf_config import HFConfigSyncHook, plan
from tp_hf_config.graph.unit_count import MULTIPLES, NEAR, Grid
from tp_hf_config.planning.quantised import FORMATS
from tp_hf_config.planning.settings import RULES, Target

LLAMA = hf.LlamaConfig(
    vocab_size=1024,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
)
MIXTRAL = hf.MixtralConfig(
    vocab_size=1024,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=8,
    num_local_experts=4,
)


class TestGrid:
    @given(st.integers(16, 4096), st.floats(0.01, 0.99))
    def test_the_largest_multiple_that_is_near(self, units: int, ratio: float) -> None:
        wanted = units * (1 - ratio)
        found = Grid(MULTIPLES).nearest(wanted, 1, units, units)
        near = [
            min((n for n in range(m, units, m)), key=lambda n: abs(n - wanted), default=10**9)
            for m in MULTIPLES
        ]
        first = next((n for n in near if abs(n - wanted) < NEAR * units), None)
        assert (found is None) == (first is None)
        if found is not None and first is not None:
            assert abs(found - wanted) == abs(first - wanted)

    @given(st.integers(16, 2048), st.floats(0.01, 0.98), st.floats(0.001, 0.01))
    def test_a_larger_ratio_leaves_no_more(self, units: int, ratio: float, more: float) -> None:
        grid = Grid(MULTIPLES)
        less, most = (
            grid.nearest(units * (1 - r), 1, units, units) or units * (1 - r)
            for r in (ratio + more, ratio)
        )
        assert less <= most

    def test_in_words(self) -> None:
        result = plan(SMOLLM2, pruning_ratio=0.2, prune="intermediate_size")
        assert result.values == {"intermediate_size": 1216}
        line = "to multiples of 64 (round_to=1: exactly the ratios): intermediate_size 1,216 for "
        assert result.grid == f"{line}1,228"
        assert result.grid in str(result)
        exact = plan(SMOLLM2, pruning_ratio=0.2, prune="intermediate_size", round_to=1)
        assert (exact.values, exact.grid) == ({"intermediate_size": 1228}, None)

    def test_never_more_than_is_allowed(self) -> None:
        result = plan(SMOLLM2, pruning_ratio=0.2, max_pruning_ratio=0.2, prune="intermediate_size")
        assert result.values == {"intermediate_size": 1228}

    def test_steps(self) -> None:
        """A step that ends below its ratio leaves less to the next one."""
        result = plan(SMOLLM2, ratios={"intermediate_size": 0.04}, iterative_steps=4)
        values = [step["intermediate_size"] for width in result.widths for step in width.steps]
        assert values == [1504, 1504, 1472, 1472]

    @pytest.mark.parametrize(
        ("config", "settings", "left"),
        [
            (SMOLLM2, {"prune": (), "head_pruning_ratio": 0.3}, 6),
            (MIXTRAL, {"ratios": {"num_local_experts": 0.25}}, 3),
        ],
    )
    def test_heads_and_experts_are_no_widths(
        self, config: Any, settings: dict[str, Any], left: int
    ) -> None:
        assert [*plan(config, **settings).values.values()] == [left]

    def test_hidden_size_keeps_whole_heads(self) -> None:
        """Of 768, 614 are asked for: 624 is the multiple of 16 and of twelve heads."""
        result = plan(hf.BertConfig(num_hidden_layers=1), ratios={"hidden_size": 0.2})
        assert result.values == {"hidden_size": 624}
        assert result.grid is not None
        assert result.grid.startswith("to multiples of 16 ")

    def test_ranked_together(self) -> None:
        """What each layer loses is known after ranking only; each goes to the grid."""
        model = hf.LlamaForCausalLM(changed(LLAMA, **SMALL))
        hook = HFConfigSyncHook(prune="intermediate_size", per_layer=True)
        tp.pruner.BasePruner(
            model,
            None,
            tp.importance.RandomImportance(),
            pruning_ratio=0.3,
            global_pruning=True,
            hooks=[hook],
        ).step()
        widths = [layer.mlp.down_proj.in_features for layer in model.model.layers]
        assert all(width % 8 == 0 for width in widths)
        assert abs(sum(widths) - 2 * 512 * 0.7) < 2 * 512 * NEAR
        assert hook.last_report is not None
        assert "round_to=1: exactly the ranking" in hook.last_report.notes[-1]


SMALL = {"hidden_size": 64, "intermediate_size": 512, "head_dim": 8, "vocab_size": 64}


class TestRules:
    @pytest.mark.parametrize("ranks", [1, 2])
    @pytest.mark.parametrize("name", [*RULES, "gguf-k,fp8-block,ffn-mult"])
    def test_a_width_goes_to_the_nearest_number_that_all_tools_take(
        self, name: str, ranks: int
    ) -> None:
        rules = [RULES[part] for part in name.split(",")]
        multiple = lcm(*(ranks * n for rule in rules for n in (rule.columns, rule.rows)))
        multiple = lcm(multiple, *(rule.ffn for rule in rules))
        target = name if ranks == 1 else f"{name},tp={ranks}"
        result = plan(LLAMA, ratios={"intermediate_size": 0.21}, target=target)
        wanted = 8192 * (1 - 0.21)
        own = multiple > 1  # else the default grid
        multiple = multiple if own else MULTIPLES[0]
        assert result.values == {"intermediate_size": round(wanted / multiple) * multiple}
        assert result.grid is not None
        assert f"for {target})" in result.grid or not own

    def test_heads_of_every_rank(self) -> None:
        """Rows of the key projections are whole heads; the output's columns are, of a group."""
        settings: dict[str, Any] = {"prune": (), "gqa": "group", "head_pruning_ratio": 0.3}
        left = {
            target: plan(LLAMA, **settings, target=target).values["num_key_value_heads"]
            for target in ("tp=2", "tp=4", "marlin", "marlin,tp=2")
        }
        assert left == {"tp=2": 6, "tp=4": 4, "marlin": 6, "marlin,tp=2": 6}

    def test_experts(self) -> None:
        """Some classes transpose the weights of stacked experts, so both sides keep both rules."""
        result = plan(MIXTRAL, ratios={"intermediate_size": 0.3}, target="marlin-moe")
        assert result.values == {"intermediate_size": 768}

    def test_transposed_weights(self) -> None:
        config = hf.GPT2Config(vocab_size=64, n_layer=1)
        assert plan(config, ratios={"n_inner": 0.3}, target="gguf-k").values == {"n_inner": 2048}

    def test_what_no_width_satisfies(self) -> None:
        result = plan(SMOLLM2, pruning_ratio=0.2, target="gguf-k,tp=2")
        assert result.values == {"intermediate_size": 1024}
        assert result.unmet == (
            "gguf-k: hidden_size 576 is no multiple of 256 (the class takes none that is), "
            "num_key_value_heads + num_attention_heads 3 is no multiple of 8 (the class takes none "
            "that is): llama.cpp stores such weights as Q5_0, Q8_0 or F16",
        )
        assert result.unmet[0] in result.lines()
        assert plan(LLAMA, pruning_ratio=0.2, target="gguf-k,tp=2").unmet == ()
        (line,) = plan(LLAMA, pruning_ratio=0.2, target="tp=3").unmet
        assert line == (
            "tp=3: num_key_value_heads + num_attention_heads 8 is no multiple of 3 (near: 6): "
            "these cannot be divided among the ranks"
        )

    def test_a_rank_is_not_another_tools_concern(self) -> None:
        (line,) = plan(LLAMA, pruning_ratio=0.2, target="attention,int8,tp=3").unmet
        assert line.startswith("tp=3: num_key_value_heads + num_attention_heads 8 is no multiple")

    def test_the_hook_keeps_and_says_it(self) -> None:
        model = hf.LlamaForCausalLM(changed(LLAMA, **SMALL))
        hook = HFConfigSyncHook(prune="intermediate_size", target="gguf-k")
        tp.pruner.BasePruner(
            model, None, tp.importance.RandomImportance(), pruning_ratio=0.3, hooks=[hook]
        ).step()
        assert model.config.intermediate_size == 256
        assert hook.last_report is not None
        moved, size, unmet = hook.last_report.notes[-3:]
        assert size == "gguf-q4_k_m: 0.2 MB -> 0.1 MB (62.5%)"
        assert moved == "to multiples of 256 (for gguf-k): intermediate_size 256 for 358"
        assert unmet.startswith("gguf-k: hidden_size 64 is no multiple of 256")

    def test_ranked_together(self) -> None:
        model = hf.LlamaForCausalLM(changed(LLAMA, **SMALL))
        hook = HFConfigSyncHook(prune="intermediate_size", per_layer=True, target="gguf-32")
        tp.pruner.BasePruner(
            model,
            None,
            tp.importance.RandomImportance(),
            pruning_ratio=0.3,
            global_pruning=True,
            hooks=[hook],
        ).step()
        assert all(layer.mlp.down_proj.in_features % 32 == 0 for layer in model.model.layers)
        assert hook.last_report is not None
        assert "widths are rounded to what gguf-32 takes" in hook.last_report.notes

    def test_a_plan_is_carried_out(self) -> None:
        model = hf.LlamaForCausalLM(changed(LLAMA, **SMALL))
        planned = plan(model, pruning_ratio=0.3, target="gguf-32")
        hook = HFConfigSyncHook(plan=planned)
        tp.pruner.BasePruner(model, None, tp.importance.RandomImportance(), hooks=[hook]).step()
        assert model.config.intermediate_size == planned.values["intermediate_size"] == 352


class TestSizes:
    def test_of_a_target(self) -> None:
        """An eighth of the weights of 12 of 30 layers' down projections are in Q6_K."""
        (size,) = plan(SMOLLM2, pruning_ratio=0.2, target="gguf-k").quantised
        assert size.format == "gguf-q4_k_m"
        assert str(size) == "gguf-q4_k_m: 103.7 MB -> 94.6 MB (91.2%)"
        assert not size.worse

    def test_what_grows_is_said_without_a_target(self) -> None:
        settings: dict[str, Any] = {"pruning_ratio": 0.2, "prune": "intermediate_size"}
        assert plan(SMOLLM2, **settings).quantised == ()  # on the grid: smaller
        exact = plan(SMOLLM2, **settings, round_to=1)
        (size,) = exact.quantised
        assert size.worse
        assert str(size) == (
            "gguf-q4_k_m: 103.7 MB -> 120.7 MB (116.4%), larger than before: target='gguf-q4_k_m' "
            "keeps widths that fit its blocks"
        )
        assert str(size) in exact.lines()
        (refused,) = plan(SMOLLM2, ratios={"hidden_size": 0.03125}).quantised
        assert (refused.after, refused.worse) == (None, True)
        assert str(refused) == (
            "gguf-q4_k_m: llama.cpp's quantiser stops at token_embd.weight, whose rows of 558 "
            "weights are no multiple of 32 (target='gguf-q4_k_m' keeps widths that fit its blocks)"
        )

    def test_what_a_quantiser_refuses(self) -> None:
        sizes = plan(SMOLLM2, pruning_ratio=0.2, target="w4a16,int8").quantised
        assert [size.format for size in sizes] == ["w4a16", "int8"]
        assert "576 inputs, which are no multiple of its groups of 128" in str(sizes[0])
        assert str(sizes[1]) == "int8: 220.2 MB -> 206.8 MB (93.9%)"

    def test_formats_have_rules(self) -> None:
        for name in FORMATS:
            assert Target.of(name).formats == (name,)

    def test_in_the_report_of_a_step(self) -> None:
        model = hf.LlamaForCausalLM(changed(LLAMA, **SMALL))
        hook = HFConfigSyncHook(prune="intermediate_size", target="int8")
        tp.pruner.BasePruner(
            model, None, tp.importance.RandomImportance(), pruning_ratio=0.3, hooks=[hook]
        ).step()
        assert hook.last_report is not None
        assert hook.last_report.notes[-1].startswith("int8: 0.3 MB -> 0.2 MB (78.0%)")


class TestMistakes:
    def test_names(self) -> None:
        with pytest.raises(ValueError, match=r"no target \(did you mean gguf-k\?\)\. Targets: "):
            plan(LLAMA, target="guf-k")
        with pytest.raises(ValueError, match="'tp=0' is no target"):
            HFConfigSyncHook(target="tp=0")

    def test_two_that_say_the_same(self) -> None:
        with pytest.raises(ValueError, match="both say what widths are multiples of"):
            plan(LLAMA, target="gguf-k", round_to=8)
        with pytest.raises(ValueError, match="both say what widths are multiples of"):
            tp.pruner.BasePruner(
                small.llama(),
                None,
                tp.importance.RandomImportance(),
                round_to=8,
                hooks=[HFConfigSyncHook(target="gguf-k")],
            )

    def test_in_the_shell(self, tmp_path: Any, capsys: Any) -> None:
        tiny.build("llama-gqa").config.save_pretrained(tmp_path)
        ratio = ("--pruning-ratio", "0.3")
        code, out, _ = shell.shell(capsys, "plan", tmp_path, *ratio, "--for", "gguf-32,tp=2")
        assert code == 0
        assert "(for gguf-32,tp=2)" in out
        code, _, err = shell.shell(
            capsys, "plan", tmp_path, *ratio, "--for", "gguf-32", "--round-to", "8"
        )
        assert code == 2
        assert "--for and --round-to both say" in err


class TestSources:
    """Rules that an installed package has as Python are read from it."""

    def test_blocks_of_llama_cpp(self) -> None:
        sizes = gguf.GGML_QUANT_SIZES
        kinds = gguf.GGMLQuantizationType
        for kind in (kinds.Q2_K, kinds.Q3_K, kinds.Q4_K, kinds.Q5_K, kinds.Q6_K, kinds.IQ4_XS):
            assert sizes[kind][0] == RULES["gguf-k"].columns
        for kind in (kinds.Q4_0, kinds.Q5_0, kinds.Q8_0, kinds.IQ4_NL):
            assert sizes[kind][0] == RULES["gguf-32"].columns

    def test_every_rule_says_where_it_is_written(self) -> None:
        for rule in RULES.values():
            assert rule.source
            assert rule.read
            assert rule.else_

    def test_several(self) -> None:
        target = Target.of("gguf-k, marlin ,tp=4")
        assert (target.least("columns"), target.least("rows"), target.least("ranks")) == (
            256,
            64,
            4,
        )
