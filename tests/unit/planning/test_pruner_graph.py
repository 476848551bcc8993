"""Settings of a pruner and its hook: each is refused in words, or honoured, or warned of."""

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
)

pytestmark = pytest.mark.usefixtures("every_width")

BERT = {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
BOTH = {"hidden_size": (32, 16), "intermediate_size": (64, 32)}


def pruner_of(model: Any, **settings: Any) -> tuple[Any, HFConfigSyncHook]:
    """A pruner with these settings, its own and its hook's, and the hook."""
    hook, of_pruner = small.split(**settings)
    arguments = {
        "example_inputs": None,
        "importance": tp.importance.MagnitudeImportance(),
        "pruning_ratio": 0.5,
        **of_pruner,
    }
    return tp.pruner.MetaPruner(model, **arguments, hooks=[hook]), hook


def step(model: Any, **settings: Any) -> Any:
    """The report of one step of a pruner with these settings."""
    pruner, hook = pruner_of(model, **settings)
    pruner.step()
    return hook.last_report


class TestAdapted:
    """The pruner's own arguments are put together with what the model needs."""

    def test_round_to_and_ignored_layers(self) -> None:
        model = small.llama()
        kept = [layer.self_attn for layer in model.model.layers]
        with pytest.warns(
            PrunerSettingsWarning, match="^hidden_size is kept at 32: ignored_layers="
        ):
            report = step(model, round_to=24, ignored_layers=kept)
        assert report.fields == {"intermediate_size": (64, 24)}
        assert report.notes[0].startswith("hidden_size is kept at 32")

    def test_example_inputs_of_one_s_own_change_no_choice(self) -> None:
        model = small.llama()
        inputs = {"input_ids": torch.ones(1, 4).long()}
        report = step(model, prune="intermediate_size", example_inputs=inputs)
        assert report.fields == {"intermediate_size": (64, 32)}
        assert report.graph.startswith("config graph: 2 groups")

    def test_layers_around_the_model_stay_ignored(self) -> None:
        model = nn.Sequential(small.bert(), nn.Linear(32, 2))
        embeddings = model[0].embeddings.word_embeddings
        pruner, _ = pruner_of(model, ignored_layers=[embeddings])
        assert pruner.ignored_layers == [model[1], embeddings]

    def test_ratios_by_field_and_by_layer(self) -> None:
        model = small.llama()
        by_layer = {layer.mlp.up_proj: 0.25 for layer in model.model.layers}
        report = step(
            model,
            prune=("hidden_size", "intermediate_size"),
            ratios={"hidden_size": 0.125},
            pruning_ratio_dict=by_layer,
        )
        assert report.fields == {"hidden_size": (32, 28), "intermediate_size": (64, 48)}


class TestHeads:
    @pytest.mark.parametrize("heads", [True, False])
    def test_a_ratio_alone_and_none(self, heads: bool) -> None:
        model = small.llama()
        ratio = 0.0 if heads else 0.5
        with pytest.warns(PrunerSettingsWarning, match="has no effect without") as told:
            report = step(model, prune_num_heads=heads, head_pruning_ratio=ratio)
        settings = [one for one in told if one.category is PrunerSettingsWarning]
        assert [one.filename for one in settings] == [__file__]
        assert report.fields == BOTH

    def test_how_heads_go_says_that_they_go(self) -> None:
        model = small.llama(num_key_value_heads=2)
        report = step(model, prune=(), gqa="group", head_pruning_ratio=0.5)
        assert report.fields == {"num_key_value_heads": (2, 1), "num_attention_heads": (4, 2)}

    def test_how_no_heads_go(self) -> None:
        with pytest.raises(
            ValueError,
            match=r"^gqa='group' asks for attention heads to be pruned, but prune_num_heads=False",
        ):
            plan(small.llama(), gqa="group", prune_num_heads=False)

    def test_a_model_without_heads(self) -> None:
        with pytest.raises(UnsupportedModelError) as raised:
            pruner_of(zoo.build("convnext"), prune_num_heads=True, head_pruning_ratio=0.5)
        assert str(raised.value) == (
            "ConvNextForImageClassification cannot prune attention heads: no attention heads were "
            "found. Widths that can be pruned: hidden_sizes[0], hidden_sizes[1]."
        )


class TestNames:
    def test_one_field_may_stand_alone(self) -> None:
        model = small.llama()
        report = step(model, prune="intermediate_size")
        assert report.fields == {"intermediate_size": (64, 32)}

    def test_in_a_plan(self) -> None:
        (width,) = plan(small.llama(), prune="intermediate_size").widths
        assert width.name == "intermediate_size"

    @pytest.mark.parametrize(
        "ask",
        [
            lambda model: pruner_of(model, prune="intermediate_sise"),
            lambda model: pruner_of(model, ratios={"intermediate_sise": 0.5}),
            lambda model: pruner_of(
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
        for ask in (pruner_of, plan):
            with pytest.raises(ValueError, match=rf"'\]={ratio}: expected a share"):
                ask(small.llama(), ratios={"intermediate_size": ratio})


@pytest.mark.parametrize("ask", [plan, pruner_of])
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
            names = {field[-1] for fields in result[0].DG.fields for field in fields}
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
            pruner_of(Pipeline())
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
            pruner_of(model)
        assert str(raised.value) == (
            "BertModel: pooler.dense (test_pruner_graph.Packed) holds packed weights, a "
            "quantised storage format. Load the model in float16, bfloat16 or float32, prune, and "
            "quantise the result."
        )


class TestSteps:
    @pytest.mark.parametrize("interactive", [False, True])
    def test_taylor_without_a_backward_pass(self, interactive: bool) -> None:
        model = small.llama()
        before = small.state_of(model)
        importance = tp.importance.GroupTaylorImportance()
        pruner, _ = pruner_of(model, prune="intermediate_size", importance=importance)
        words = "^GroupTaylorImportance fails .* no parameter has a gradient. .* loss.backward()"
        with pytest.raises(ValueError, match=words):
            list(pruner.step(interactive=interactive) or ())
        small.assert_same(before, small.state_of(model))

    def test_an_importance_that_fails_otherwise(self) -> None:
        def fails(group: Any) -> Any:
            raise KeyError("mine")

        model = small.llama()
        model.lm_head.weight.grad = torch.zeros_like(model.lm_head.weight)
        with pytest.raises(KeyError, match="mine"):
            step(model, importance=fails)

    def why(self, model: Any, **settings: Any) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = step(model, **settings)
        assert report.groups == []
        return str(report.notes[-1])

    def test_why_nothing_was_pruned(self) -> None:
        model = small.llama()
        assert self.why(model, pruning_ratio=0.0) == "nothing was pruned: all ratios are 0"
        assert self.why(model, ignored_layers=[model]) == (
            "nothing was pruned: the settings exclude every group (prune=, ignored_layers=, "
            "root_module_types=)"
        )
        assert self.why(model, importance=tp.importance.BNScaleImportance()) == (
            "nothing was pruned: BNScaleImportance returned no importance for any group (it may "
            "need gradients, or batch norms)"
        )

    def test_groups_that_nobody_prunes(self) -> None:
        pruner, hook = pruner_of(small.llama())
        assert len(list(pruner.step(interactive=True))) == 3
        assert hook.last_report is not None
        assert hook.last_report.notes == [
            "nothing was pruned: the ratios ask for less than one unit of each group, or no group "
            "that the step yielded was pruned"
        ]

    def test_a_step_too_many(self) -> None:
        pruner, hook = pruner_of(small.llama())
        pruner.step()
        assert hook.last_report is not None
        assert hook.last_report.fields == BOTH
        assert not [note for note in hook.last_report.notes if "nothing" in note]
        with pytest.warns(UserWarning, match="exceed the maximum"):
            pruner.step()
        assert hook.last_report is not None
        assert hook.last_report.notes[-1] == (
            "nothing was pruned: the pruner has already taken all its steps (iterative_steps=1)"
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
    report = step(model)
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
        step(model)
    assert str(raised.value) == (
        "LongformerForMultipleChoice cannot be pruned: the tiny model does not run: `input_ids` "
        "should have two dimensions. To find the channels that belong together, a tiny model of "
        "the class has to run forward and backward in float64. Load the weights into a class that "
        "does: LongformerModel.from_pretrained(...)."
    )
    small.assert_same(before, small.state_of(model))
