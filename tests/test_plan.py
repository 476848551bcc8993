"""``plan``: what it predicts is what pruning gives, and what it refuses does fail."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import small
import tiny
import torch
import torch_pruning as tp
import transformers as hf
import zoo
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

import tp_hf_config
from tp_hf_config import (
    ConfigSyncError,
    HFConfigSyncHook,
    Plan,
    PrunerSettingsWarning,
    UnsupportedModelError,
    Width,
    plan,
    prunable,
)
from tp_hf_config.amounts import Amount
from tp_hf_config.heads import NoValues
from tp_hf_config.inputs import example_inputs
from tp_hf_config.learn import map_of
from tp_hf_config.sizes import flops_of
from tp_hf_config.unbuilt import class_of

SMOLLM2 = hf.LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
LLAMA_70B = hf.LlamaConfig(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    dtype="bfloat16",
)


def pruned(model: Any, plan: Plan) -> list[dict[str, Any]]:
    """Prune as planned; the config's fields after every step."""
    pruner = tp.pruner.BasePruner(
        model,
        **plan.pruner_kwargs(model),
        importance=tp.importance.MagnitudeImportance(),
        hooks=[HFConfigSyncHook(strict=True)],
    )
    after: list[dict[str, Any]] = []
    for _ in range(plan.settings.iterative_steps):
        pruner.step()
        after.append({name: getattr(model.config, name) for name in plan.values})
    return after


def steps(plan: Plan) -> list[dict[str, int]]:
    """Field -> value after every step, all widths together."""
    return [
        {name: value for width in plan.widths for name, value in width.steps[step].items()}
        for step in range(plan.settings.iterative_steps)
    ]


def names(width: Width) -> list[str]:
    """The fields of a width as people write them."""
    return [str(path[-1]) for path in width.fields]


def numbers_of(model: torch.nn.Module) -> tuple[int, int]:
    """Parameters and their bytes, tied ones once."""
    weights = list(model.parameters())
    return sum(w.numel() for w in weights), sum(w.numel() * w.element_size() for w in weights)


class TestAmounts:
    def test_rounds_down_to_what_the_class_takes(self) -> None:
        amount = Amount(576, multiple=9)
        assert amount.after([0.1, 0.2]) == [513, 459]
        assert amount.after([0.1, 0.2], round_to=None) == [518, 460]
        assert amount.after([0.1, 0.2], round_to=64) == [576, 576]

    def test_every_class_loses_the_same(self) -> None:
        assert Amount(9, classes=3).after([0.2, 0.6, 0.99]) == [6, 3, 3]
        assert Amount(64, classes=8, multiple=8).after([0.2], round_to=16) == [48]

    def test_no_group_is_emptied(self) -> None:
        assert Amount(6).after([0.5, 1.0]) == [3, 3]

    def test_a_layer_that_lost_enough_is_passed_over(self) -> None:
        """Torch-Pruning looks before a step whether a layer has lost more than it may."""
        amount = Amount(10, layers=((10, 1),))
        assert amount.after([0.2, 0.4, 0.6, 0.8], max_ratio=0.5) == [8, 6, 4, 4]
        assert amount.after([0.5, 0.8], max_ratio=0.5) == [5, 1]

    def test_nothing_asked_is_nothing_rounded(self) -> None:
        assert Amount(65).after([0.0, 0.001], round_to=8) == [65, 64]

    def test_a_choice_decides_instead_of_rounding(self) -> None:
        amount = Amount(8, choose=lambda wanted, now: min(n for n in (8, 4, 2) if n >= wanted))
        assert amount.after([0.2, 0.6]) == [8, 4]

    @pytest.mark.parametrize("kept", range(1, 64))
    def test_a_ratio_for_each_number(self, kept: int) -> None:
        assert Amount(63).after([Amount(63).ratio_for(kept)]) == [kept]


class TestNumbers:
    def test_smollm2(self) -> None:
        result = plan(SMOLLM2, pruning_ratio=0.2, iterative_steps=3)
        assert steps(result) == [
            {"hidden_size": 531, "intermediate_size": 1433},
            {"hidden_size": 495, "intermediate_size": 1331},
            {"hidden_size": 459, "intermediate_size": 1228},
        ]
        hidden, ffn = result.widths
        assert (hidden.asked, hidden.reached) == (0.2, 1 - 459 / 576)
        assert (hidden.reachable, ffn.reachable) == (range(9, 585, 9), range(1, 1537))
        assert (hidden.multiples, hidden.ranks) == ((), ())
        assert (ffn.multiples, ffn.ranks) == ((), (2, 4))
        assert result.before.parameters == 134_515_008
        assert result.before.bytes == 4 * 134_515_008
        assert result.after is not None
        assert result.after.parameters == 94_468_167
        assert result.refusal is None

    def test_llama_70b(self) -> None:
        result = plan(LLAMA_70B, pruning_ratio=0.25, head_pruning_ratio=0.5)
        assert result.values == {
            "hidden_size": 6144,
            "intermediate_size": 21504,
            "num_attention_heads": 32,
        }
        assert [width.multiples for width in result.widths] == [(64, 128, 256)] * 3
        assert [width.ranks for width in result.widths] == [(2, 4, 8)] * 3
        assert result.before.parameters == 70_553_706_496
        assert result.before.bytes == 2 * 70_553_706_496

    def test_flops_are_those_of_the_products(self) -> None:
        """Two for each weight of a matrix, and the attention over eight tokens."""
        result = plan(SMOLLM2, prune=["intermediate_size"])
        layer = 576 * (576 + 192 + 192 + 576) + 3 * 576 * 1536
        attention = 2 * 8 * 576
        assert result.before.flops == 2 * (30 * (layer + attention) + 576 * 49152)
        assert result.after is not None
        assert result.after.flops == result.before.flops - 2 * 30 * 3 * 576 * 768

    @pytest.mark.parametrize("name", ["llama", "mixtral", "t5", "swin", "gemma3", "whisper"])
    def test_flops_of_few_layers_stand_for_all(self, name: str) -> None:
        cls, config = type(zoo.build(name)), zoo.build(name).config
        for field in ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers"):
            if getattr(config, field, None) == 2:
                setattr(config, field, 5)
        if getattr(config, "layer_types", None):
            config.layer_types = (config.layer_types * 3)[:5]
        with torch.device("meta"):
            model = cls(config).eval()
        known = map_of(model)
        shallow = known.builder.build(known.depth.data)
        full = known.builder.build(known.data)
        assert name == "swin" or len(list(shallow.modules())) < len(list(full.modules()))
        if hasattr(type(config), "_experts_implementation"):
            full.config._experts_implementation = "batched_mm"
        with torch.no_grad(), torch.device("meta"):
            inputs = example_inputs(full)
            with NoValues(), FlopCounterMode(display=False) as counter:
                full(**inputs)
        tokens = sum(inputs[n].numel() for n in ("input_ids", "decoder_input_ids") if n in inputs)
        assert flops_of(known, full, shallow) == counter.get_total_flops() // max(1, tokens)

    def test_a_class_that_does_not_run_without_data(self) -> None:
        result = plan(zoo.build("wav2vec2"), prune=["intermediate_size"])
        assert result.before.flops is None
        assert "FLOPs are not known" in result.notes[0]


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
        with pytest.raises(TypeError, match="AutoConfig"):
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
        assert query.widths[-1].ranks == (2,)
        group = plan(model, pruning_ratio=0.0, head_pruning_ratio=0.5, gqa="group")
        assert group.widths[-1].after == {"num_key_value_heads": 1, "num_attention_heads": 2}
        assert group.widths[-1].ranks == ()
        one_each = small.llama(num_key_value_heads=4)
        assert "num_key_value_heads" in plan(one_each, head_pruning_ratio=0.5).values
        with pytest.raises(UnsupportedModelError, match="query"):
            plan(one_each, gqa="query")


class TestRefusals:
    def test_in_the_class_own_words_with_what_it_takes(self) -> None:
        result = plan(SMOLLM2, pruning_ratio=0.2, head_pruning_ratio=0.2)
        assert result.refusal is not None
        assert "(459) is not a multiple of the number of attention heads (6)" in (
            result.refusal.reason
        )
        assert result.after is None
        assert len(result.refusal.nearest) == 2
        for ratios, values in result.refusal.nearest:
            other = plan(SMOLLM2, ratios=ratios)
            assert other.refusal is None
            assert other.values == values

    def test_a_step_on_the_way(self) -> None:
        """56 heads of 64 do not divide 8192; 48 do not either; 32 do."""
        result = plan(LLAMA_70B, prune=["num_attention_heads"], iterative_steps=2)
        assert result.refusal is not None
        assert (result.refusal.step, result.refusal.values) == (1, {"num_attention_heads": 48})
        assert result.widths[0].reachable == (8, 16, 32, 64)

    def test_no_arguments_for_what_is_refused(self) -> None:
        model = small.llama(hidden_size=48, num_attention_heads=6, num_key_value_heads=2)
        result = plan(model, prune=("hidden_size", "num_attention_heads"), pruning_ratio=0.3)
        with pytest.raises(ConfigSyncError, match="cannot be carried out: refused at step 1"):
            result.pruner_kwargs()

    def test_other_tensors(self) -> None:
        """OPT with two equal widths builds no projection between them."""
        model = zoo.build("opt")
        names = {"word_embed_proj_dim", "hidden_size"}
        widths = {w.name: w.before for w in plan(model, prune=names).widths}
        assert set(widths) == names
        narrow = min(sum(before.values()) for before in widths.values())
        wide = max(names, key=lambda name: widths[name][name])
        ratio = 1 - narrow / widths[wide][wide]
        result = plan(model, ratios={wide: ratio, **dict.fromkeys(names - {wide}, 0.0)})
        assert result.refusal is not None
        assert "other tensors" in result.refusal.reason


class TestTarget:
    @pytest.mark.parametrize("share", [0.5, 0.8])
    def test_at_most_and_near(self, share: float) -> None:
        result = plan(SMOLLM2, target_params=share)
        assert result.target == int(134_515_008 * share)
        assert result.after is not None
        assert 0.97 * result.target < result.after.parameters <= result.target
        assert f"target of {result.target:,} parameters" in str(result)

    def test_a_number(self) -> None:
        assert plan(SMOLLM2, target_params=100_000_000).target == 100_000_000

    def test_legal_heads(self) -> None:
        result = plan(LLAMA_70B, prune_num_heads=True, gqa="group", target_params=0.8)
        assert result.refusal is None
        assert result.values == {
            "hidden_size": 7168,
            "intermediate_size": 25759,
            "num_key_value_heads": 7,
            "num_attention_heads": 56,
        }

    def test_fixed_ratios_stay(self) -> None:
        result = plan(
            SMOLLM2,
            prune=["hidden_size", "intermediate_size"],
            ratios={"hidden_size": 0.0},
            target_params=0.8,
        )
        assert result.values["hidden_size"] == 576
        assert result.settings.ratios == {"hidden_size": 0.0}

    def test_out_of_reach(self) -> None:
        with pytest.raises(ValueError, match="leaves at least"):
            plan(SMOLLM2, prune=["intermediate_size"], target_params=0.2)

    def test_reached_by_pruning(self) -> None:
        model = tiny.build("llama-gqa")
        result = plan(model, prune_num_heads=True, target_params=0.6, iterative_steps=2)
        pruned(model, result)
        assert result.after is not None
        assert numbers_of(model)[0] == result.after.parameters <= result.target


class TestOutput:
    def test_json(self) -> None:
        result = plan(SMOLLM2, pruning_ratio=0.2, head_pruning_ratio=0.2)
        read = json.loads(json.dumps(result.to_dict()))
        assert read["schema_version"] == 1
        assert set(read["versions"]) == {"tp-hf-config", "torch", "transformers", "torch-pruning"}
        assert read["settings"]["ratios"] == {"num_attention_heads": 0.2}
        assert read["widths"][0]["reachable"] == "every 9th from 9 to 576"
        assert read["widths"][2]["reachable"] == "3, 6, 9"
        assert read["refusal"]["step"] == 1
        assert read["refusal"]["nearest"][0]["values"]["hidden_size"] == 450
        assert read["before"]["parameters"] == 134_515_008
        assert read["after"] is None

    def test_text(self) -> None:
        lines = str(plan(SMOLLM2, pruning_ratio=0.2, iterative_steps=3)).splitlines()
        assert lines[0] == "LlamaForCausalLM"
        assert "576" in lines[2]
        assert "531 -> 495 -> 459" in lines[2]
        assert "parameters: 134,515,008 -> 94,468,167 (70.2%)" in lines

    def test_rich(self) -> None:
        console = Console(file=io.StringIO(), width=160)
        console.print(plan(SMOLLM2, pruning_ratio=0.2, head_pruning_ratio=0.2))
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert "every 9th from 9 to 576" in shown
        assert "refused at step 1" in shown


class TestKwargs:
    def test_of_a_live_model(self) -> None:
        model = tiny.build("llama-gqa")
        result = plan(
            model,
            ratios={"hidden_size": 0.25, "intermediate_size": 0.4, "num_attention_heads": 0.5},
            iterative_steps=2,
            round_to=4,
        )
        kwargs = result.pruner_kwargs()
        assert kwargs["iterative_steps"] == 2
        assert pruned(model, result) == steps(result)
        assert result.after is not None
        assert numbers_of(model) == (result.after.parameters, result.after.bytes)

    def test_of_a_config(self) -> None:
        model = tiny.build("llama-gqa")
        result = plan(model.config, pruning_ratio=0.3)
        with pytest.raises(UnsupportedModelError, match="Pass the model to prune"):
            result.pruner_kwargs()
        assert pruned(model, result) == steps(result)

    def test_of_another_model(self) -> None:
        with pytest.raises(UnsupportedModelError, match="another config"):
            plan(SMOLLM2).pruner_kwargs(tiny.build("llama-gqa"))

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


CLASSES = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config),
    "bert": (hf.BertForMaskedLM, hf.BertConfig),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config),
}


@st.composite
def models(draw: st.DrawFn) -> Any:
    """A random tiny model of one of four kinds, and the fields that can be pruned."""
    kind = draw(st.sampled_from(["llama", *CLASSES]))  # the first validates its heads
    key_value = draw(st.sampled_from([1, 2, 3]))
    heads = key_value * draw(st.integers(1, 4))
    per_head = draw(st.sampled_from([4, 6, 8]))
    ffn = draw(st.integers(9, 70))
    common = {"vocab_size": 40, "tie_word_embeddings": draw(st.booleans())}
    cls, config_cls = CLASSES[kind]
    if kind == "t5":
        width = draw(st.integers(8, 50))
        sizes = {"d_model": width, "d_ff": ffn, "d_kv": per_head, "num_heads": heads}
        fields = ("d_model", "d_ff", draw(st.sampled_from(["d_kv", "num_heads"])))
        config = config_cls(**sizes, **common, num_layers=2, decoder_start_token_id=0)
    else:
        fields = ("hidden_size", "intermediate_size")
        sizes = dict(zip(fields, (heads * per_head, ffn), strict=True))
        if kind != "bert":
            common["num_key_value_heads"] = key_value
            fields += (draw(st.sampled_from(["num_attention_heads", "num_key_value_heads"])),)
        config = config_cls(**sizes, **common, num_attention_heads=heads, num_hidden_layers=2)
    return cls(config).eval(), draw(st.sets(st.sampled_from(fields), min_size=2))


@settings(
    max_examples=25,
    phases=(Phase.explicit, Phase.generate),  # shrinking takes minutes
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    models(),
    st.floats(0.02, 0.98),
    st.dictionaries(st.integers(0, 3), st.floats(0, 1), max_size=2),
    st.integers(1, 4),
    st.sampled_from([None, None, 2, 3, 8]),
    st.sampled_from([1.0, 1.0, 0.5]),
)
def test_what_is_planned_is_what_pruning_gives(
    made: Any,
    ratio: float,
    ratios: dict[int, float],
    number: int,
    round_to: int | None,
    max_ratio: float,
) -> None:
    model, chosen = made
    offered = {name for w in prunable(model).widths if not w.reason for name in names(w)}
    fields = sorted(chosen & offered)
    if not fields:
        with pytest.raises(UnsupportedModelError, match="cannot prune"):
            plan(model, prune=chosen)
        return
    own = {fields[i]: value for i, value in ratios.items() if i < len(fields)}
    asked: dict[str, Any] = {
        "pruning_ratio": ratio,
        "iterative_steps": number,
        "max_pruning_ratio": max_ratio,
    }
    result = plan(model, prune=fields, ratios=own, round_to=round_to, **asked)
    event("taken" if result.refusal is None else "refused")
    if result.refusal is None:
        assert pruned(model, result) == steps(result)
        assert result.after is not None
        assert numbers_of(model) == (result.after.parameters, result.after.bytes)
        return
    kwargs = tp_hf_config.pruner_kwargs(
        model, prune=fields, ratios=own, graph="config", round_to=round_to
    )
    kwargs |= {**asked, "importance": tp.importance.MagnitudeImportance()}
    with pytest.warns(PrunerSettingsWarning, match=f"refused at step {result.refusal.step} "):
        pruner = tp.pruner.BasePruner(model, **kwargs, hooks=[HFConfigSyncHook()])
    for _ in range(result.refusal.step - 1):
        pruner.step()
    with pytest.raises(ConfigSyncError):
        pruner.step()


@pytest.mark.filterwarnings("ignore::tp_hf_config.PrunerSettingsWarning")
@pytest.mark.parametrize("hidden", range(6, 72, 6))
def test_refused_exactly_where_pruning_fails(hidden: int) -> None:
    """Six heads over two of keys go to four: some hidden sizes divide by them, some do not."""
    model = small.llama(hidden_size=72, num_attention_heads=6, num_key_value_heads=2)
    ratios = {"hidden_size": Amount(72).ratio_for(hidden), "num_attention_heads": 0.3}
    result = plan(model, ratios=ratios)
    assert result.values == {"hidden_size": hidden, "num_attention_heads": 4}
    assert (result.refusal is None) == (hidden % 4 == 0)
    pruner = tp.pruner.BasePruner(
        model,
        **tp_hf_config.pruner_kwargs(model, ratios=ratios),
        importance=tp.importance.MagnitudeImportance(),
        hooks=[HFConfigSyncHook()],
    )
    if result.refusal is None:
        pruner.step()
        assert (model.config.hidden_size, model.config.num_attention_heads) == (hidden, 4)
        return
    with pytest.raises(ConfigSyncError, match="is not a multiple"):
        pruner.step()
