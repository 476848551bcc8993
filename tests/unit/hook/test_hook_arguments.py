"""What a hook is asked to prune: by name, by ratio, by a plan, or by Torch-Pruning's arguments."""

from __future__ import annotations

from typing import Any

import pytest
import small
import torch
import torch_pruning as tp
import zoo

from tp_hf_config import HFConfigSyncHook, UnsupportedModelError, plan


def pruner_of(model: Any, hook: HFConfigSyncHook, **arguments: Any) -> Any:
    importance = tp.importance.MagnitudeImportance()
    return tp.pruner.MetaPruner(model, None, importance, **arguments, hooks=[hook])


def pruned(model: Any, hook: HFConfigSyncHook, **arguments: Any) -> dict[str, Any]:
    pruner = pruner_of(model, hook, **arguments)
    for _ in range(pruner.iterative_steps):
        pruner.step()
    return {name: after for report in hook.reports for name, (_, after) in report.fields.items()}


BOTH = {"hidden_size": 16, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("settings", "arguments", "expected"),
    [
        ({}, {}, BOTH),
        ({"prune": "inner"}, {}, {"intermediate_size": 32}),
        ({"prune": ("hidden_size", "intermediate_size")}, {}, BOTH),
        ({"ratios": {"intermediate_size": 0.25}}, {}, {"intermediate_size": 48}),
        (
            {"prune": "inner", "ratios": {"intermediate_size": 0.25}},
            {},
            {"intermediate_size": 48},
        ),
        (
            {"prune": (), "gqa": "group"},
            {"head_pruning_ratio": 0.5},
            {"num_attention_heads": 2, "num_key_value_heads": 1},
        ),
        (
            {"prune": ()},
            {"prune_num_heads": True, "head_pruning_ratio": 0.5},
            {"num_attention_heads": 2},
        ),
    ],
)
def test_what_is_pruned(settings: Any, arguments: Any, expected: dict[str, int]) -> None:
    model = small.llama(num_key_value_heads=2)
    assert pruned(model, HFConfigSyncHook(**settings), **arguments) == expected


def test_inner_widths_without_a_ratio_of_their_own_get_the_pruners() -> None:
    first, second, third = (zoo.build("bart") for _ in range(3))
    settings: dict[str, Any] = {"prune": "inner", "ratios": {"encoder_ffn_dim": 0.25}}
    planned = plan(first, pruning_ratio=0.5, **settings)
    expected = {"encoder_ffn_dim": 72, "decoder_ffn_dim": 40}
    assert {n: v for w in planned.widths for n, v in w.after.items()} == expected
    assert pruned(second, HFConfigSyncHook(**settings), pruning_ratio=0.5) == expected
    assert pruned(third, HFConfigSyncHook(plan=planned)) == expected


def test_a_ratio_of_a_width_that_is_not_pruned_is_refused() -> None:
    hook = HFConfigSyncHook(prune="inner", ratios={"hidden_size": 0.25})
    with pytest.raises(UnsupportedModelError, match="hidden_size is not among the fields to prune"):
        pruner_of(small.llama(), hook)


def test_inner_is_every_width_where_there_is_no_inner_one() -> None:
    model, twin = zoo.build("swin"), zoo.build("swin")
    assert pruned(model, HFConfigSyncHook(prune="inner")) == pruned(twin, HFConfigSyncHook())


def test_a_plan_is_carried_out() -> None:
    model = small.llama()
    hook = HFConfigSyncHook(plan=plan(model, prune="inner", pruning_ratio=0.25, iterative_steps=2))
    assert pruned(model, hook) == {"intermediate_size": 48}
    assert len(hook.reports) == 2
    assert "plan=..." in repr(hook)


@pytest.mark.parametrize("name", ["iterative_steps", "round_to", "head_pruning_ratio"])
def test_a_pruner_that_contradicts_a_plan_is_refused(name: str) -> None:
    model = small.llama()
    asked = {"pruning_ratio": 0.25, "iterative_steps": 2, "round_to": 8}
    heads = {"prune_num_heads": True, "head_pruning_ratio": 0.25}
    hook = HFConfigSyncHook(plan=plan(model, **asked, **heads))  # type: ignore[arg-type]
    given = {"iterative_steps": 3, "round_to": 16, "head_pruning_ratio": 0.5}[name]
    with pytest.raises(
        ValueError, match=rf"the pruner has {name}={given}, but the hook's plan has"
    ):
        pruner_of(model, hook, **{name: given})
    pruner_of(model, hook)  # and the hook is free again


def test_a_plan_stands_alone() -> None:
    made = plan(small.llama(), pruning_ratio=0.25)
    for more in ({"prune": "inner"}, {"ratios": {"hidden_size": 0.5}}, {"per_layer": True}):
        with pytest.raises(ValueError, match="the plan already says what to prune"):
            HFConfigSyncHook(plan=made, **more)  # type: ignore[arg-type]


def test_a_plan_is_for_its_model() -> None:
    hook = HFConfigSyncHook(plan=plan(small.llama(), pruning_ratio=0.25))
    with pytest.raises(UnsupportedModelError, match="this plan was made for a LlamaForCausalLM"):
        pruner_of(small.llama(intermediate_size=96), hook)


def test_a_plan_needs_the_constructor() -> None:
    model = small.bert()
    pruner = tp.pruner.MetaPruner(
        model, torch.arange(1, 9)[None], tp.importance.MagnitudeImportance(), pruning_ratio=0.25
    )
    with pytest.raises(ValueError, match="so pass its hook to the pruner's constructor"):
        HFConfigSyncHook(plan=plan(model, pruning_ratio=0.25)).register(pruner)
