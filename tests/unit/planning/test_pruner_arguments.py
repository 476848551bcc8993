"""Arguments with a mistake in them: each is refused in words, or honoured, or warned of."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import small
import torch
import torch_pruning as tp
import transformers as hf
import zoo
from torch import nn

from tp_hf_config import (
    HFConfigSyncHook,
    PrunerSettingsWarning,
    UnsupportedModelError,
    plan,
    pruner_kwargs,
)

pytestmark = pytest.mark.usefixtures("every_width")

BERT = {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
BOTH = {"hidden_size": (32, 16), "intermediate_size": (64, 32)}


def step(model: Any, kwargs: dict[str, Any], **settings: Any) -> tuple[Any, Any]:
    """One step of a pruner with these arguments; the pruner and the report."""
    hook = HFConfigSyncHook()
    arguments = {"importance": tp.importance.MagnitudeImportance(), "pruning_ratio": 0.5}
    pruner = tp.pruner.MetaPruner(model, **{**arguments, **kwargs, **settings}, hooks=[hook])
    pruner.step()
    return pruner, hook.last_report


class TestMerged:
    """``pruner_kwargs`` takes the pruner's arguments, and puts them together with the model's."""

    def test_arguments_are_passed_on(self) -> None:
        model, hook = small.llama(), HFConfigSyncHook()
        kwargs = pruner_kwargs(
            model,
            importance=tp.importance.MagnitudeImportance(),
            pruning_ratio=0.25,
            iterative_steps=2,
            hooks=[hook],
        )
        pruner = tp.pruner.MetaPruner(model, **kwargs)
        pruner.step()
        pruner.step()
        assert [one.fields["hidden_size"] for one in hook.reports] == [(32, 28), (28, 24)]

    def test_round_to_and_ignored_layers(self) -> None:
        model = small.llama()
        kept = [layer.self_attn for layer in model.model.layers]
        with pytest.warns(PrunerSettingsWarning, match="^hidden_size stays at 32: ignored_layers="):
            kwargs = pruner_kwargs(model, round_to=24, ignored_layers=kept)
        assert kwargs["ignored_layers"] == kept
        _, report = step(model, kwargs)
        assert report.fields == {"intermediate_size": (64, 24)}
        assert report.notes[0].startswith("hidden_size stays at 32")

    def test_example_inputs_of_one_s_own_change_no_choice(self) -> None:
        """What to prune was said to ``pruner_kwargs``, whoever makes the inputs."""
        model = small.llama()
        kwargs = pruner_kwargs(model, prune="intermediate_size")
        _, report = step(
            model, {**kwargs, "example_inputs": {"input_ids": torch.ones(1, 4).long()}}
        )
        assert report.fields == {"intermediate_size": (64, 32)}
        assert report.graph.startswith("config graph: 2 groups")

    def test_layers_around_the_model_stay_ignored(self) -> None:
        model = nn.Sequential(small.bert(), nn.Linear(32, 2))
        bert = model[0]
        kwargs = pruner_kwargs(model, ignored_layers=[bert.embeddings.word_embeddings])
        assert kwargs["ignored_layers"] == [model[1], bert.embeddings.word_embeddings]

    def test_ratios_by_field_and_by_layer(self) -> None:
        model = small.llama()
        by_layer = {layer.mlp.up_proj: 0.25 for layer in model.model.layers}
        kwargs = pruner_kwargs(
            model,
            prune=("hidden_size", "intermediate_size"),
            ratios={"hidden_size": 0.125},
            pruning_ratio_dict=by_layer,
        )
        _, report = step(model, kwargs)
        assert report.fields == {"hidden_size": (32, 28), "intermediate_size": (64, 48)}

    def test_an_argument_that_no_pruner_has(self) -> None:
        with pytest.raises(TypeError) as raised:
            pruner_kwargs(small.llama(), round_too=8)
        assert str(raised.value) == (
            "pruner_kwargs: no pruner takes round_too= (did you mean round_to?)"
        )
        assert pruner_kwargs(small.llama(), reg=0.1)["reg"] == 0.1  # GroupNormPruner has it

    def test_a_less_safe_value_in_its_place(self) -> None:
        model = small.llama()
        kwargs = pruner_kwargs(model, ratios={"intermediate_size": 0.25})
        mine = {layer.mlp.up_proj: 0.5 for layer in model.model.layers}
        with pytest.warns(PrunerSettingsWarning) as told:
            _, report = step(model, kwargs, pruning_ratio_dict=mine)
        assert str(told[0].message) == (
            "pruning_ratio_dict= is not what pruner_kwargs gave, and keeps less of what the model "
            "needs. Give yours to it, which puts both together: pruner_kwargs(model, "
            "pruning_ratio_dict=...)"
        )
        assert report.fields == {"intermediate_size": (64, 32)}


class TestHeads:
    @pytest.mark.parametrize(("told", "made_for"), [(True, False), (False, True)])
    def test_other_than_pruner_kwargs_was_told(self, told: bool, made_for: bool) -> None:
        model = small.llama()
        before = small.state_of(model)
        kwargs = {**pruner_kwargs(model, prune_num_heads=made_for), "prune_num_heads": told}
        with pytest.raises(ValueError, match="prune_num_heads") as raised:
            step(model, kwargs, head_pruning_ratio=0.5)
        assert str(raised.value) == (
            f"prune_num_heads={told}, but pruner_kwargs made its arguments for "
            f"prune_num_heads={made_for}. Tell it: pruner_kwargs(model, prune_num_heads={told})"
        )
        small.assert_same(before, small.state_of(model))

    @pytest.mark.parametrize("heads", [True, False])
    def test_a_ratio_alone_and_none(self, heads: bool) -> None:
        model = small.llama()
        kwargs = pruner_kwargs(model, prune_num_heads=heads)
        ratio = 0.0 if heads else 0.5
        with pytest.warns(PrunerSettingsWarning, match="has no effect without") as told:
            _, report = step(model, kwargs, head_pruning_ratio=ratio)
        settings = [one for one in told if one.category is PrunerSettingsWarning]
        assert [one.filename for one in settings] == [__file__]
        assert report.fields == BOTH

    def test_how_heads_go_says_that_they_go(self) -> None:
        model = small.llama(num_key_value_heads=2)
        kwargs = pruner_kwargs(model, prune=(), gqa="group")
        _, report = step(model, kwargs, head_pruning_ratio=0.5)
        assert report.fields == {"num_key_value_heads": (2, 1), "num_attention_heads": (4, 2)}

    @pytest.mark.parametrize("ask", [plan, pruner_kwargs])
    def test_how_no_heads_go(self, ask: Any) -> None:
        with pytest.raises(ValueError, match=r"^gqa='group' says how attention heads go"):
            ask(small.llama(), gqa="group", prune_num_heads=False)

    def test_a_model_without_heads(self) -> None:
        with pytest.raises(UnsupportedModelError) as raised:
            pruner_kwargs(zoo.build("convnext"), prune_num_heads=True)
        assert str(raised.value) == (
            "ConvNextForImageClassification cannot prune attention heads: no heads were seen. "
            "Widths that can: hidden_sizes[0], hidden_sizes[1]."
        )


class TestNames:
    def test_one_field_may_stand_alone(self) -> None:
        model = small.llama()
        _, report = step(model, pruner_kwargs(model, prune="intermediate_size"))
        assert report.fields == {"intermediate_size": (64, 32)}

    def test_in_a_plan(self) -> None:
        (width,) = plan(small.llama(), prune="intermediate_size").widths
        assert width.name == "intermediate_size"

    @pytest.mark.parametrize(
        "ask",
        [
            lambda model: pruner_kwargs(model, prune="intermediate_sise"),
            lambda model: pruner_kwargs(model, ratios={"intermediate_sise": 0.5}),
            lambda model: pruner_kwargs(
                model, prune="intermediate_size", ratios={"intermediate_sise": 0.5}
            ),
            lambda model: plan(model, prune="intermediate_sise"),
            lambda model: plan(model, ratios={"intermediate_sise": 0.5}),
            lambda model: plan(model, prune="intermediate_size", ratios={"intermediate_sise": 0.5}),
        ],
    )
    def test_misspelt(self, ask: Any) -> None:
        words = re.escape("(did you mean intermediate_size?)")
        with pytest.raises(UnsupportedModelError, match=words):
            ask(small.llama())

    @pytest.mark.parametrize("ratio", [30, -0.5])
    def test_ratios_of_fields(self, ratio: float) -> None:
        for ask in (pruner_kwargs, plan):
            with pytest.raises(ValueError, match=rf"'\]={ratio}: expected a share"):
                ask(small.llama(), ratios={"intermediate_size": ratio})


@pytest.mark.parametrize("ask", [plan, pruner_kwargs])
class TestNothing:
    def test_no_field_and_no_heads(self, ask: Any) -> None:
        with pytest.raises(ValueError, match=r"^prune=\(\) names no field, and no heads"):
            ask(small.llama(), prune=())
        assert ask(small.llama(num_key_value_heads=2), prune=(), gqa="query")

    def test_no_ratios_are_the_default(self, ask: Any) -> None:
        result: Any = ask(small.llama(), ratios={})
        if ask is plan:
            names = {width.name for width in result.widths}
        else:
            graph = result["example_inputs"].graph
            names = {field[-1] for fields in graph.fields for field in fields}
        assert names == set(BOTH)

    def test_a_largest_ratio_that_is_no_share(self, ask: Any) -> None:
        with pytest.raises(ValueError, match=r"^max_pruning_ratio=30: expected a share"):
            ask(small.llama(), max_pruning_ratio=30)


class TestNoModel:
    def test_what_holds_a_model(self) -> None:
        class Pipeline:
            def __init__(self) -> None:
                self.task, self.model = "text", small.bert()

        with pytest.raises(TypeError) as raised:
            pruner_kwargs(Pipeline())  # type: ignore[arg-type]
        assert str(raised.value) == (
            "model=a Pipeline: expected a Hugging Face model (or a module that contains one). Pass "
            "what it holds: its .model"
        )

    def test_packed_weights(self) -> None:
        class Packed(nn.Module):
            """As ``torch.ao.nn.quantized.dynamic.Linear``."""

            def weight(self) -> torch.Tensor:
                return torch.ones(2, 2)

        model = small.bert()
        model.pooler.dense = Packed()
        with pytest.raises(UnsupportedModelError) as raised:
            pruner_kwargs(model)
        assert str(raised.value) == (
            "BertModel: pooler.dense (test_pruner_arguments.Packed) holds packed weights, a "
            "quantised storage format. Load the model in float16, bfloat16 or float32, prune, and "
            "quantise the result."
        )


class TestSteps:
    @pytest.mark.parametrize("interactive", [False, True])
    def test_taylor_without_a_backward_pass(self, interactive: bool) -> None:
        model, hook = small.llama(), HFConfigSyncHook()
        before = small.state_of(model)
        pruner = tp.pruner.MetaPruner(
            model,
            **pruner_kwargs(model, prune="intermediate_size"),
            importance=tp.importance.GroupTaylorImportance(),
            hooks=[hook],
        )
        words = "^GroupTaylorImportance fails .* no parameter has a gradient, .* loss.backward()"
        with pytest.raises(ValueError, match=words):
            list(pruner.step(interactive=interactive) or ())
        small.assert_same(before, small.state_of(model))

    def test_an_importance_that_fails_otherwise(self) -> None:
        def fails(group: Any) -> Any:
            raise KeyError("mine")

        model = small.llama()
        model.lm_head.weight.grad = torch.zeros_like(model.lm_head.weight)
        with pytest.raises(KeyError, match="mine"):
            step(model, pruner_kwargs(model), importance=fails)

    def why(self, model: Any, **settings: Any) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, report = step(model, pruner_kwargs(model), **settings)
        assert report.groups == []
        return str(report.notes[-1])

    def test_why_nothing_was_pruned(self) -> None:
        model = small.llama()
        assert self.why(model, pruning_ratio=0.0) == "nothing was pruned: all ratios are 0"
        assert self.why(model, ignored_layers=[model]) == (
            "nothing was pruned: no group takes part (prune=, ignored_layers=, root_module_types=)"
        )
        assert self.why(model, importance=tp.importance.BNScaleImportance()) == (
            "nothing was pruned: BNScaleImportance gave no value to any group (it may need "
            "gradients, or batch norms)"
        )

    def test_groups_that_nobody_prunes(self) -> None:
        model, hook = small.llama(), HFConfigSyncHook()
        pruner = tp.pruner.MetaPruner(
            model,
            **pruner_kwargs(model, importance=tp.importance.MagnitudeImportance()),
            hooks=[hook],
        )
        assert len(list(pruner.step(interactive=True))) == 3
        assert hook.last_report is not None
        assert hook.last_report.notes == [
            "nothing was pruned: less than one unit of each was to go, or no group that the step "
            "gave was pruned"
        ]

    def test_a_step_too_many(self) -> None:
        model = small.llama()
        pruner, report = step(model, pruner_kwargs(model))
        assert report.fields == BOTH
        assert not [note for note in report.notes if "nothing" in note]
        [hook] = pruner.step.hooks
        with pytest.warns(UserWarning, match="exceed the maximum"):
            pruner.step()
        assert hook.last_report is not None
        assert hook.last_report.notes[-1] == (
            "nothing was pruned: all steps of the pruner were taken (iterative_steps=1)"
        )


@pytest.mark.parametrize("name", ["Bert", "DistilBert"])
def test_a_model_that_chooses_between_texts(name: str) -> None:
    """Its inputs have three dimensions: it ended in ``shape '[-1, 8]' is invalid``."""
    sizes: dict[str, Any] = {
        "Bert": {**BERT, "hidden_size": 32, "intermediate_size": 64},
        "DistilBert": {"vocab_size": 40, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    }
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(**sizes[name])
    model = getattr(hf, f"{name}ForMultipleChoice")(config).eval()
    _, report = step(model, pruner_kwargs(model))
    hidden, ffn = ("dim", "hidden_dim") if name == "DistilBert" else BOTH
    assert report.graph.startswith("config graph")
    assert report.fields == {hidden: (32, 16), ffn: (64, 32)}
    assert model(input_ids=torch.ones(2, 3, 8, dtype=torch.long)).logits.shape == (2, 3)


def test_a_forward_pass_that_no_made_up_inputs_satisfy() -> None:
    """Longformer asserts that each text holds three separators."""
    config = hf.LongformerConfig(**BERT, hidden_size=32, attention_window=8)
    model = hf.LongformerForMultipleChoice(config).eval()
    before = small.state_of(model)
    with pytest.raises(UnsupportedModelError) as raised:
        step(model, pruner_kwargs(model))
    assert str(raised.value) == (
        "LongformerForMultipleChoice cannot be pruned: the tiny model does not run: `input_ids` "
        "should have two dimensions. Which channels belong together is found on a tiny model of "
        "the class, in float64, which has to run forward and backward. Load the weights into a "
        "class that does: LongformerModel.from_pretrained(...)."
    )
    small.assert_same(before, small.state_of(model))
