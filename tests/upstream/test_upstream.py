"""Torch-Pruning's faults that the library works around.

Each test shows one in plain Torch-Pruning. When one fails, upstream has mended it, and the
workaround that its docstring names can go.
"""

from __future__ import annotations

import inspect
from importlib.metadata import version

import pytest
import small
import torch
import torch_pruning as tp
from torch import nn


def test_new_parameters_lose_their_requires_grad():
    """pruner/function.py makes Parameters anew; ``graph.sides.ConfigGroup.prune``."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    pruner = tp.pruner.MetaPruner(
        model, torch.rand(1, 4), tp.importance.MagnitudeImportance(), ignored_layers=[model[2]]
    )
    model[0].weight.requires_grad_(False)
    pruner.step()
    assert model[0].out_features == 3
    assert model[0].weight.requires_grad


@pytest.mark.parametrize("name", ["BasePruner", "GroupNormPruner", "BNScalePruner"])
def test_default_dicts_carry_over_to_the_next_pruner(name: str):
    """base_pruner.py: ``num_heads=dict()`` and its like; ``hook.registration._with_own_dicts``.

    In a process of its own: what leaks here would leak into other tests.
    """
    printed = small.python(
        f"""
        import torch, torch_pruning as tp
        from torch import nn
        def pruner():
            model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1, groups=2))
            x = torch.rand(1, 4, 2, 2)
            return tp.pruner.{name}(model, x, tp.importance.MagnitudeImportance())
        print(len(pruner().out_channel_groups), len(pruner().out_channel_groups))
        """
    )
    assert printed == "1 2"


def test_manual_prune_width_with_a_ratio_cuts_nothing():
    """base_pruner.py, ``manual_prune_width``: indices as a tensor, whose elements are no
    integers to a set (function.py); ``graph.config_graph.ConfigGraph.get_pruning_group``.
    """
    model = small.mlp()
    pruner = small.pruner_of(model)
    pruner.manual_prune_width(model[0], tp.prune_linear_out_channels, 0.5)
    assert model[0].out_features == 8
    assert tuple(model[0].weight.shape) == (16, 8)  # should be (8, 8)


def test_the_version_is_not_the_packages():
    """``tp.__version__`` is 1.6.0 in 1.6.1, and there is none in 1.5; ``schema.versions`` asks
    importlib.metadata.
    """
    if small.TORCH_PRUNING < (1, 6):
        assert not hasattr(tp, "__version__")
    else:
        assert tp.__version__ == "1.6.0" != version("torch-pruning")


def test_round_to_counts_one_heads_channels_against_all():
    """BasePruner._round_to (base_pruner.py): ``hook.unit_choice.UnitChoice._rounded``.

    Of 12 heads of 32 channels, 4 of every head go: 336 are left, a multiple of 12, so nothing is
    to be rounded. Torch-Pruning takes the 4 from all 384 and rounds 380 down to 372: 12 of 32.
    """
    assert tp.pruner.BasePruner._round_to(None, 4, 12 * 32, 12) == 12


def test_hessian_importance_sorts_channels_and_leaves_their_roots():
    """GroupHessianImportance (importance.py): ``ConfigGraph._fill`` hands both out in order."""
    source = inspect.getsource(tp.importance.GroupHessianImportance.__call__)
    assert "idxs.sort()" in source
    assert "root_idxs.sort()" not in source
