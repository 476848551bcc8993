"""What the tiny copy shows carries over to sizes that stand in other proportions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import masking
import tiny
import torch
import torch_pruning as tp
import transformers as hf

from tp_hf_config import HFConfigSyncHook, pruner_kwargs


def pruned(
    model: Any, inputs: dict[str, torch.Tensor], tmp_path: Path, steps: int = 1, **asked: Any
) -> HFConfigSyncHook:
    """Prune half; the model has to be the original with the removed at zero, also once reloaded."""
    tiny.randomise(model.eval())
    original, hook = copy.deepcopy(model), HFConfigSyncHook(graph="config", strict=True)
    pruner = tp.pruner.MetaPruner(
        model,
        **pruner_kwargs(model, graph="config", **asked),
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        head_pruning_ratio=0.5,
        iterative_steps=steps,
        hooks=[hook],
    )
    for _ in range(steps):
        pruner.step()
    masking.assert_same_as_masked(original, model, hook.reports, inputs)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    got, expected = masking.outputs(loaded, inputs), masking.outputs(model, inputs)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(got[name], value, rtol=1e-4, atol=1e-6), name
    return hook


def test_heads_of_a_stage_that_are_no_whole_multiple_of_a_unit(tmp_path: Path) -> None:
    """A unit of Swin's width is two dimensions in its second stage, which has four heads here.

    In a tiny copy it has two, so that a unit is one dimension of every head there.
    """
    config = hf.SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=32,
        depths=[1, 1],
        num_heads=[1, 4],
        window_size=4,
        num_labels=5,
    )
    model = hf.SwinForImageClassification(config)
    inputs = {"pixel_values": torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    hook = pruned(model, inputs, tmp_path, steps=2)
    fields = [report.fields for report in hook.reports]
    assert fields == [{"embed_dim": (32, 24)}, {"embed_dim": (24, 16)}]
