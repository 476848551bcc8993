"""What Torch-Pruning makes of batch norms' scales is the same on the graph made from the config."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch_pruning as tp
import transformers as hf
from torch import nn

from tp_hf_config import HFConfigSyncHook

# Batch norms that lose the same channels, as ResNet is built: a convolution's own, and those of
# everything that is added to it.
STEM, FIRST, SECOND = (
    f"resnet.{name}" for name in ("embedder", "encoder.stages.0", "encoder.stages.1")
)
COUPLED = (
    (f"{STEM}.embedder.normalization", f"{FIRST}.layers.0.layer.1.normalization"),
    (f"{FIRST}.layers.0.layer.0.normalization",),
    (f"{SECOND}.layers.0.layer.0.normalization",),
    (f"{SECOND}.layers.1.layer.0.normalization",),
    (
        f"{SECOND}.layers.0.shortcut.normalization",
        f"{SECOND}.layers.0.layer.1.normalization",
        f"{SECOND}.layers.1.layer.1.normalization",
    ),
)


def resnet() -> Any:
    """Two stages of basic blocks, 16 and 24 channels wide; every scale and statistic random."""
    config = hf.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 24], depths=[1, 2], layer_type="basic"
    )
    model = hf.ResNetForImageClassification(config)
    tiny.randomise(model)
    with torch.no_grad():
        for norm in norms_of(model).values():
            norm.weight.normal_()  # some below zero: what counts is how large they are
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    return model.eval()


def norms_of(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {n: module for n, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}


def pruner_of(model: nn.Module, **settings: Any) -> tuple[Any, HFConfigSyncHook]:
    hook = HFConfigSyncHook()
    pruner = tp.pruner.BNScalePruner(
        model,
        example_inputs=None,
        importance=tp.importance.BNScaleImportance(),
        pruning_ratio=0.25,
        hooks=[hook],
        **settings,
    )
    return pruner, hook


def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def smallest(model: nn.Module, names: tuple[str, ...], count: int) -> list[int]:
    """The channels with the smallest scales, over all norms that lose them."""
    scales = torch.stack([norms_of(model)[name].weight.detach().abs() for name in names])
    return scales.mean(0).argsort()[:count].tolist()


def test_every_norm_is_coupled_once() -> None:
    """``COUPLED`` leaves none out, so the tests below look at all of them."""
    names = [name for names in COUPLED for name in names]
    assert sorted(names) == sorted(norms_of(resnet()))


def test_importances_are_the_scales() -> None:
    model = resnet()
    pruner, _ = pruner_of(model)
    norms = norms_of(model)
    names = {module: name for name, module in norms.items()}
    found = {}
    for group in pruner.DG.get_all_groups(
        ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types
    ):
        graph_group = {names[dep.layer] for dep, _ in group if dep.layer in names}
        found[frozenset(graph_group)] = pruner.estimate_importance(group)
    assert found.keys() == {frozenset(names) for names in COUPLED}
    for names_of_group in COUPLED:
        scales = torch.stack([norms[name].weight.detach().abs() for name in names_of_group]).mean(0)
        assert torch.allclose(found[frozenset(names_of_group)], scales / scales.mean())


@pytest.mark.parametrize("steps", [1, 3])
def test_the_smallest_scales_go(steps: int, tmp_path: Path) -> None:
    """The pruned net is the original with those channels' scales and shifts zero."""
    original = resnet()
    model = copy.deepcopy(original)
    pruner, hook = pruner_of(model, iterative_steps=steps)
    for _ in range(steps):
        pruner.step()
    assert (model.config.embedding_size, model.config.hidden_sizes) == (12, [12, 18])
    assert hook.last_report is not None
    assert hook.last_report.graph == "config graph: 5 groups, each proved by permutation"

    masked = copy.deepcopy(original)
    before, after = norms_of(masked), norms_of(model)
    for names in COUPLED:
        size = before[names[0]].num_features
        gone = smallest(original, names, size // 4)
        kept = sorted(set(range(size)) - set(gone))
        for name in names:
            for key in ("weight", "bias", "running_mean", "running_var"):
                assert torch.equal(getattr(after[name], key), getattr(before[name], key)[kept])
            with torch.no_grad():
                before[name].weight[gone] = 0.0
                before[name].bias[gone] = 0.0
    with torch.no_grad():
        expected = masked.double()(pixels().double()).logits
        logits = copy.deepcopy(model).double()(pixels().double()).logits
        assert torch.allclose(logits, expected, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(original.double()(pixels().double()).logits, expected, rtol=1e-3)
    model.save_pretrained(tmp_path)
    again = hf.ResNetForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(pixels()).logits, model(pixels()).logits)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


@pytest.mark.parametrize("lasso", [False, True])
def test_the_regulariser_pulls_at_scales_alone(lasso: bool) -> None:
    """By the sign of each, or (group lasso) the more the smaller the scales of its group are."""
    model = resnet()
    pruner, _ = pruner_of(model, reg=0.5, group_lasso=lasso)
    model(pixels()).logits.square().mean().backward()
    before = gradients(model)
    pruner.regularize(model)
    added = {name: grad - before[name] for name, grad in gradients(model).items()}
    norms = norms_of(model)
    scales = {f"{name}.weight" for name in norms}
    assert {name for name, grad in added.items() if bool(grad.any())} == scales
    for names in COUPLED:
        weights = {name: norms[name].weight.detach() for name in names}
        squares = torch.stack([weight.square() for weight in weights.values()]).mean(0)
        size = (squares + 1e-9).sqrt()  # Torch-Pruning's guard against zero
        for name, weight in weights.items():
            pull = weight / size if lasso else weight.sign()
            assert torch.allclose(added[f"{name}.weight"], 0.5 * pull, atol=1e-5)


def test_the_regulariser_goes_on_after_a_step() -> None:
    model = resnet()
    pruner, _ = pruner_of(model, reg=0.5, group_lasso=True, iterative_steps=2)
    pruner.step()
    pruner.update_regularizer()
    model(pixels()).logits.square().mean().backward()
    before = gradients(model)
    pruner.regularize(model)
    name = COUPLED[1][0]
    weight = norms_of(model)[name].weight
    assert len(weight) == 14
    added = gradients(model)[f"{name}.weight"] - before[f"{name}.weight"]
    assert torch.allclose(added, 0.5 * weight.detach() / (weight.detach() ** 2 + 1e-9).sqrt())
