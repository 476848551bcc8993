"""Settings that cannot end in a loadable model are told when a pruner is made, not after its steps.

Every problem that is told here is real: the same settings fail once they are carried out.
"""

from __future__ import annotations

import warnings
from typing import Any

import layer_zoo
import pytest
import small
import torch
import torch_pruning as tp
import zoo
from planned import narrow

from tp_hf_config import (
    ConfigSyncError,
    HFConfigSyncHook,
    PrunerSettingsWarning,
)
from tp_hf_config.model.build import Refusal
from tp_hf_config.planning.trajectory import Trajectory

pytestmark = pytest.mark.usefixtures("every_width")

FFN = ("intermediate_size",)


def pruner_of(model: Any, hook: HFConfigSyncHook | None = None, **settings: Any) -> Any:
    """A pruner of the FFN, or of what ``prune`` names, unless it is given a hook; a strict one."""
    own, of_pruner = small.split(**{"prune": FFN, "strict": True, "pruning_ratio": 0.5, **settings})
    return tp.pruner.BasePruner(
        model,
        example_inputs=None,
        importance=tp.importance.MagnitudeImportance(),
        hooks=[hook or own],
        **of_pruner,
    )


def gate(model: Any, layer: int) -> Any:
    return model.model.layers[layer].mlp.gate_proj


def assert_told(model: Any, words: str, **settings: Any) -> str:
    """Refused with these words, strict or not, and nothing is touched."""
    before = small.state_of(model)
    messages: list[str] = []
    for strict in (True, False):
        with pytest.raises(ConfigSyncError, match=words) as raised:
            pruner_of(model, strict=strict, **settings)
        messages.append(str(raised.value))
        small.assert_same(before, small.state_of(model))
    assert messages[0] == messages[1]
    return messages[0]


def all_steps(pruner: Any) -> None:
    for _ in range(pruner.iterative_steps):
        pruner.step()


class TestTold:
    def test_global_ranking(self) -> None:
        message = assert_told(
            small.llama(),
            "2 groups of intermediate_size are ranked",
            global_pruning=True,
        )
        assert "global_pruning=False" in message

    def test_global_ranking_of_the_default_widths(self) -> None:
        """The hidden size has one group, and could be ranked with others; the FFN could not."""
        message = assert_told(
            small.llama(), "the 2 groups of intermediate_size", prune=None, global_pruning=True
        )
        assert 'prune=("hidden_size",) of the hook' in message

    def test_isomorphic_ranking(self) -> None:
        settings: dict[str, Any] = {"global_pruning": True, "isomorphic": True}
        assert_told(small.llama(), "2 groups of intermediate_size are ranked", **settings)

    def test_layers_at_different_ratios(self) -> None:
        model = small.llama()
        assert_told(
            model,
            r"32 in .*; 48 in model\.layers\.0\.mlp",
            pruning_ratio_dict={gate(model, 0): 0.25},
        )

    def test_widths_that_the_class_does_not_take(self) -> None:
        model = narrow()
        pruner_of(model, HFConfigSyncHook(prune="hidden_size"), iterative_steps=2)
        with pytest.raises(ConfigSyncError) as raised:
            pruner_of(model, prune=("hidden_size",), iterative_steps=2)
        assert (
            "step 2: the ratios ask for hidden_size 16 (hidden_size: at least 24 are needed); "
            "nearest valid: hidden_size 24. HFConfigSyncHook() uses the nearest; strict=True"
        ) in str(raised.value)

    def test_widths_near_which_the_class_takes_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Trajectory, "_ask", lambda _, values: Refusal("never"))
        assert_told(
            small.llama(),
            r"refused at step 1 \(hidden_size 16, intermediate_size 32\): never\. No settings near",
            prune=("hidden_size", "intermediate_size"),
        )

    def test_ratios_of_one_scope(self) -> None:
        model = small.llama()
        both = (gate(model, 0), gate(model, 1))
        assert_told(
            model,
            "2 groups of intermediate_size are ranked",
            pruning_ratio_dict={both: 0.5},
            global_pruning=True,
        )


class TestNotTold:
    @pytest.fixture(autouse=True)
    def _nothing(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PrunerSettingsWarning)
            yield

    def test_what_works(self) -> None:
        model = small.llama()
        ratios = {"hidden_size": 0.25, "intermediate_size": 0.3}
        pruner = pruner_of(model, prune=tuple(ratios), ratios=ratios, iterative_steps=2)
        pruner.step()
        pruner.step()
        assert (model.config.hidden_size, model.config.intermediate_size) == (24, 44)

    def test_global_ranking_of_one_group(self) -> None:
        model = small.llama()
        pruner_of(model, prune=("hidden_size",), global_pruning=True).step()
        assert model.config.hidden_size == 16

    def test_a_ratio_of_zero(self) -> None:
        pruner_of(small.llama(), pruning_ratio=0.0, global_pruning=True).step()

    def test_ratios_with_the_same_end(self) -> None:
        model = small.llama()
        pruner_of(model, pruning_ratio_dict={gate(model, 0): 0.499}).step()
        assert model.config.intermediate_size == 32

    def test_a_pruner_that_has_begun(self) -> None:
        """Its hook is taken off: what another one is to foresee has been done in part."""
        hook = HFConfigSyncHook(prune=FFN)
        pruner = pruner_of(small.llama(), hook, pruning_ratio=0.2)
        hook.detach(pruner)
        pruner.step.hooks.clear()
        pruner.current_step, pruner.global_pruning = 1, True
        HFConfigSyncHook(strict=True).register(pruner)

    @pytest.mark.parametrize("name", ["gpt2", "mixtral", "deepseek_v3", "bert", "t5", "swin"])
    def test_classes(self, name: str) -> None:
        """What a hook finds of a class is foreseen to work."""
        model = zoo.build(name)
        tp.pruner.BasePruner(
            model,
            example_inputs=None,
            importance=tp.importance.MagnitudeImportance(),
            pruning_ratio=0.3,
            iterative_steps=3,
            hooks=[HFConfigSyncHook(strict=True, prune="inner")],
        )


@pytest.mark.parametrize("ignored", [(0,), (0, 1)])
@pytest.mark.parametrize("others", [False, True])
def test_a_width_of_which_layers_are_ignored_stays(ignored: tuple[int, ...], others: bool) -> None:
    """All its groups do, and the hidden size has one alone, which can be ranked globally."""
    model = small.llama()
    words = "^intermediate_size is kept at 64: ignored_layers= keeps the outputs of model.layers.0"
    settings = {"prune": None, "global_pruning": True} if others else {}
    with pytest.warns(PrunerSettingsWarning, match=words):
        pruner = pruner_of(model, ignored_layers=[gate(model, n) for n in ignored], **settings)
    pruner.step()
    assert model.config.intermediate_size == 64
    assert model.config.hidden_size == (16 if others else 32)


class TestCarriedOut:
    """What the class does not take, but something near it: done, and said in the report."""

    @pytest.fixture(autouse=True)
    def _nothing(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PrunerSettingsWarning)
            yield

    def notes(
        self,
        model: Any,
        prune: tuple[str, ...],
        ratios: dict[str, float] | None = None,
        **settings: Any,
    ) -> list[list[str]]:
        """What the hook says of each step."""
        hook = HFConfigSyncHook(prune=prune, ratios=ratios)
        pruner = pruner_of(model, hook, **settings)
        all_steps(pruner)
        return [list(report.notes) for report in hook.reports]

    def test_hidden_size_lowered_for_the_heads(self) -> None:
        model = small.llama(hidden_size=48, num_attention_heads=6, num_key_value_heads=2)
        told = self.notes(model, prune=("hidden_size", "num_attention_heads"), pruning_ratio=0.3)
        assert (model.config.hidden_size, model.config.num_attention_heads) == (24, 4)
        assert told == [
            [
                "step 1: the ratios ask for hidden_size 30 ('validate_architecture': ValueError: "
                "The hidden size (30) is not a multiple of the number of attention heads (4)); "
                "nearest valid: hidden_size 24"
            ]
        ]

    def test_strict_takes_nothing_else(self) -> None:
        model = small.llama(hidden_size=48, num_attention_heads=6, num_key_value_heads=2)
        before = small.state_of(model)
        with pytest.raises(ConfigSyncError) as raised:
            pruner_of(model, prune=("hidden_size", "num_attention_heads"), pruning_ratio=0.3)
        assert str(raised.value) == (
            "BasePruner of LlamaForCausalLM: step 1: the ratios ask for hidden_size 30 "
            "('validate_architecture': ValueError: The hidden size (30) is not a multiple of the "
            "number of attention heads (4)); nearest valid: hidden_size 24. HFConfigSyncHook() "
            "uses the nearest; strict=True refuses them. Nothing is pruned yet. "
            "tp_hf_config.plan(model, ...) shows what settings lead to."
        )
        small.assert_same(before, small.state_of(model))

    def test_heads_on_the_way(self) -> None:
        """Five heads do not divide 48: six stay until there can be four."""
        model = small.llama(hidden_size=48, num_attention_heads=6, num_key_value_heads=1)
        told = self.notes(
            model, prune=("num_attention_heads",), pruning_ratio=0.3, iterative_steps=2
        )
        assert model.config.num_attention_heads == 4
        assert told == [
            [
                "step 1: the ratios ask for num_attention_heads 5.1 ('validate_architecture': "
                "ValueError: The hidden size (48) is not a multiple of the number of attention "
                "heads (5)); nearest valid: num_attention_heads 6"
            ],
            [],
        ]

    def test_two_widths_that_may_not_be_equal(self) -> None:
        """OPT with two equal widths builds no projection between them."""
        model = zoo.build("opt")
        told = self.notes(
            model,
            prune=("hidden_size", "word_embed_proj_dim"),
            ratios={"hidden_size": 0.25, "word_embed_proj_dim": 0.0},
        )
        assert (model.config.hidden_size, model.config.word_embed_proj_dim) == (44, 48)
        assert told == [
            [
                "step 1: the ratios ask for hidden_size 48 (the class builds other tensors with "
                "these values: model.decoder.project_in.weight); nearest valid: hidden_size 44"
            ]
        ]

    def test_never_fewer_experts_than_a_token_goes_to(self) -> None:
        model = zoo.build("gpt_oss")  # experts in one tensor, in Transformers 4 too
        assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (4, 2)
        told = self.notes(model, prune=("num_local_experts",), pruning_ratio=0.9)
        assert model.config.num_local_experts == 2
        assert told == [
            ["num_local_experts ends at 2; the ratio 0.9 asks for 0.4: it cannot be smaller"]
        ]

    def test_pruned_by_hand_before_the_first_step(self) -> None:
        """Not as foreseen: half of the 28 that Torch-Pruning finds, rounded to four heads."""
        model = small.llama()
        hook = HFConfigSyncHook(strict=True, prune=("hidden_size",))
        pruner = pruner_of(model, hook, pruning_ratio=0.5)
        group = next(iter(pruner.DG.get_all_groups(ignored_layers=pruner.ignored_layers)))
        group.prune(idxs=[0, 1, 2, 3])
        assert hook.last_report.fields == {"hidden_size": (32, 28)}
        pruner.step()
        assert model.config.hidden_size == 12


class TestGlobalRanking:
    def test_one_group_of_each_field_is_decided_by_importance(self) -> None:
        """What is left of each is known afterwards; each is rounded to what its class takes."""
        model = small.llama(num_hidden_layers=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error", PrunerSettingsWarning)
            hook = HFConfigSyncHook(strict=True, prune=("hidden_size", "intermediate_size"))
            pruner = pruner_of(model, hook, global_pruning=True)
        pruner.step()
        assert (model.config.hidden_size, model.config.intermediate_size) == (16, 32)
        assert hook.last_report is not None
        assert hook.last_report.notes == [
            "widths are rounded to multiples of 64, 32, 16 or 8 that are near (round_to=1: exactly "
            "the ranking)"
        ]

    def test_heads_are_ranked_by_themselves(self) -> None:
        model = small.llama(num_key_value_heads=2)
        pruner_of(
            model,
            prune=("hidden_size",),
            prune_num_heads=True,
            global_pruning=True,
            pruning_ratio=0.25,
            head_pruning_ratio=0.5,
        ).step()
        assert (model.config.hidden_size, model.config.num_attention_heads) == (24, 2)

    @pytest.mark.skipif(not layer_zoo.ENTRIES, reason="no per_layer_config in this Transformers")
    def test_never_fewer_experts_than_a_token_goes_to(self) -> None:
        model = zoo.build("gpt_oss")
        with torch.no_grad():  # nearly all of the first layer is to go
            for parameter in model.model.layers[0].mlp.parameters():
                parameter.mul_(1e-3)
        tp.pruner.BasePruner(
            model,
            example_inputs=None,
            importance=tp.importance.MagnitudeImportance(normalizer=None),
            global_pruning=True,
            pruning_ratio=0.4,
            hooks=[HFConfigSyncHook(prune="num_local_experts", per_layer=True)],
        ).step()
        left = [layer.mlp.router.weight.shape[0] for layer in model.model.layers]
        assert left == [2, 4]
        model(torch.arange(6)[None])


def test_a_refused_hook_can_be_used_again() -> None:
    model, hook = small.llama(), HFConfigSyncHook(strict=True, prune=FFN)
    with pytest.raises(ConfigSyncError):
        pruner_of(model, hook, global_pruning=True)
    pruner_of(model, hook).step()
    assert model.config.intermediate_size == 32
