"""Layer norms keep their channels in order, however few are left (Torch-Pruning's own do not)."""

from __future__ import annotations

from typing import Any

import pytest
import small
import torch
import torch_pruning as tp
import transformers as hf
from torch import nn

from tp_hf_config import HFConfigSyncHook

pytestmark = pytest.mark.usefixtures("every_width")

FEW = 0.7
"""So much goes that a set of what is left is in no order."""


def bert() -> Any:
    return small.bert(hidden_size=60, num_attention_heads=3)


def convnext() -> Any:
    """Its norms are of a class of its own."""
    torch.manual_seed(0)
    config = hf.ConvNextConfig(
        hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1], image_size=32, drop_path_rate=0.0
    )
    return hf.ConvNextModel(config).eval()


def numbered(model: Any) -> Any:
    """Every norm's weights say at which channel they stand."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.data = torch.arange(float(len(module.weight)))
    return model


def pruner_of(model: Any) -> Any:
    return tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.RandomImportance(),
        pruning_ratio=FEW,
        hooks=[HFConfigSyncHook()],
    )


def assert_in_order(model: Any) -> None:
    norms = {n: m.weight.long() for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    assert any(weight[-1] >= len(weight) for weight in norms.values()), "nothing went"
    for name, weight in norms.items():
        assert bool((weight.diff() > 0).all()), f"{name}: {weight.tolist()}"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "make",
    [bert, convnext],
    ids=["BERT", "ConvNeXt"],
)
def test_a_step(make: Any, seed: int) -> None:
    model = numbered(make())
    pruner = pruner_of(model)
    torch.manual_seed(seed)
    pruner.step()
    assert_in_order(model)


def test_an_interactive_step() -> None:
    model = numbered(bert())
    pruner = pruner_of(model)
    for group in pruner.step(interactive=True):
        group.prune()
    assert_in_order(model)


def test_a_group_that_is_pruned_by_hand() -> None:
    model = numbered(convnext())
    pruner = pruner_of(model)
    gone = [channel for channel in range(40) if channel not in (2, 9, 35, 37)]
    for layer in model.encoder.stages[3].layers:  # the config has one number for both widths
        inner = layer.pwconv1, tp.prune_linear_out_channels
        pruner.DG.get_pruning_group(*inner, gone).prune()
    norm = model.encoder.stages[3].layers[0].layernorm
    pruner.DG.get_pruning_group(norm, tp.prune_layernorm_out_channels, gone).prune()
    assert_in_order(model)
