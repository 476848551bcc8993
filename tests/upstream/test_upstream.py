"""Torch-Pruning's faults that the library works around.

Each test shows one in plain Torch-Pruning. When one fails, upstream has mended it, and the
workaround that its docstring names can go.
"""

from __future__ import annotations

import inspect
from importlib.metadata import version
from typing import Any

import pytest
import small
import torch
import torch_pruning as tp
from small import traced_kwargs
from torch import nn

from tp_hf_config.forward.inputs import tensors_with_grad
from tp_hf_config.model.versions import graph_module as tp_graph

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")


def plain(model: nn.Module, **kwargs: Any) -> Any:
    """A pruner without hooks: Torch-Pruning alone."""
    arguments = {
        **traced_kwargs(model),
        "importance": tp.importance.GroupMagnitudeImportance(),
        "pruning_ratio": 0.5,
        **kwargs,
    }
    return tp.pruner.MetaPruner(model, **arguments)


def test_the_model_is_left_in_eval_mode():
    """dependency/graph.py, ``_trace``; ``safe_tracing._settings_kept``."""
    model = small.bert().train()
    plain(model)
    assert not model.training


def test_frozen_parameters_end_the_trace():
    """dependency/graph.py, ``_trace``: autograd ends at them; ``safe_tracing._settings_kept``."""
    model = small.bert().requires_grad_(False)
    assert plain(model).DG.module2node == {}
    assert plain(small.bert()).DG.module2node != {}


def test_new_parameters_lose_their_requires_grad():
    """pruner/function.py makes Parameters anew; ``hook.history.Recorder._prune``."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    pruner = tp.pruner.MetaPruner(
        model, torch.rand(1, 4), tp.importance.MagnitudeImportance(), ignored_layers=[model[2]]
    )
    model[0].weight.requires_grad_(False)
    pruner.step()
    assert model[0].out_features == 3
    assert model[0].weight.requires_grad


def test_a_cache_in_the_output_cannot_be_traced():
    """dependency/graph.py, ``_trace``, utils.py ``flatten_as_list``;
    ``safe_tracing._traceable_config`` and ``inputs.tensors_with_grad``.
    """
    model = small.llama()
    ids = {"input_ids": torch.arange(1, 9)[None], "use_cache": True}
    with pytest.raises(AttributeError, match="has no attribute 'grad_fn'"):
        tp.DependencyGraph().build_dependency(model, ids)
    tp.DependencyGraph().build_dependency(model, ids, output_transform=tensors_with_grad)


class Bounded(tp_graph.Group):
    """Stops a group of many thousand items."""

    def add_dep(self, dep: Any, idxs: Any) -> None:
        if len(self._group) > 5000:
            raise RecursionError("endless")
        super().add_dep(dep, idxs)


@pytest.fixture
def bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tp_graph, "Group", Bounded)


@pytest.mark.usefixtures("bounded")
def test_rotary_groups_grow_for_ever():
    """Issue 527: the ``cat`` of ``rotate_half`` (index_mapping.py);
    ``safe_tracing._neutral_rotary`` and ``graph.traced.safe_tracing._bounded_groups``.
    """
    model = small.llama(hidden_size=64, num_key_value_heads=2, attn_implementation="eager")
    model.config.use_cache = False
    with pytest.raises(RecursionError, match="endless"):
        plain(model, ignored_layers=[])


def test_fused_attention_hides_the_repeat_of_key_value_heads():
    """Issue 516: ``enable_gqa``; ``safe_tracing._traceable_config``."""
    assert repeats("eager") > repeats("sdpa")


def repeats(attention: str) -> int:
    """How many groups-of-heads repeats Torch-Pruning sees in a grouped-query model."""
    model = small.llama(num_key_value_heads=1, attn_implementation=attention)
    graph = tp.DependencyGraph().build_dependency(
        model,
        {"input_ids": torch.arange(1, 9)[None], "use_cache": False},
        output_transform=tensors_with_grad,
        verbose=False,
    )
    names = [str(node.name) for node in graph.module2node.values()]
    return sum("Expand" in name for name in names)


def test_tied_layers_are_in_different_groups():
    """dependency/graph.py: ``_build_dependency`` follows outputs;
    ``safe_tracing._coupled_ties``.
    """
    model = small.roberta()
    pruner = plain(model)
    embeddings = model.roberta.embeddings.word_embeddings
    decoder = model.lm_head.decoder
    assert decoder.weight is embeddings.weight
    group = pruner.DG.get_pruning_group(
        model.roberta.encoder.layer[0].output.dense, tp.prune_linear_out_channels, [0]
    )
    modules = [dep.target.module for dep, _ in group]
    assert embeddings in modules
    assert decoder not in modules
    group.prune()
    assert decoder.weight is not embeddings.weight


def test_a_split_keeps_its_offsets_when_its_layer_shrinks():
    """ops.py, ``SplitPruner.prune_out_channels``: ``self.offsets``, not ``layer.offsets``;
    ``safe_tracing._SplitPruner``.
    """
    split = tp.ops._SplitOp(0)
    split.split_sizes, split.offsets = [4, 4], [0, 4, 8]
    tp.ops.SplitPruner().prune_out_channels(split, [1, 5])
    assert split.split_sizes == [3, 3]
    assert split.offsets == [0, 4, 8]  # should be [0, 3, 6]


def test_bare_parameters_are_warned_about():
    """dependency/graph.py, ``_detect_unwrapped_parameters``;
    ``safe_tracing._no_unwrapped_warning``.
    """
    with pytest.warns(UserWarning, match="Unwrapped parameters detected"):
        plain(small.llama())


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
    integers to a set (function.py); ``hook.history.Recorder``.
    """
    model = small.mlp()
    pruner = small.pruner_of(model)
    pruner.manual_prune_width(model[0], tp.prune_linear_out_channels, 0.5)
    assert model[0].out_features == 8
    assert tuple(model[0].weight.shape) == (16, 8)  # should be (8, 8)


def test_iterative_head_pruning_takes_too_many():
    """base_pruner.py, ``_prune``: the ratio counts from the start, but is applied to the heads
    left; ``graph.traced.head_schedule.HeadSchedule``.
    """
    model = small.bert(hidden_size=64, num_attention_heads=8)
    pruner = plain(
        model,
        **{
            **traced_kwargs(model, prune_num_heads=True),
            "pruning_ratio": 0.25,
            "head_pruning_ratio": 0.25,
            "iterative_steps": 2,
        },
    )
    for _ in range(2):
        pruner.step()
    assert set(pruner.num_heads.values()) == {5}  # a quarter of eight is two


def test_the_version_is_not_the_packages():
    """``tp.__version__`` is 1.6.0 in 1.6.1, and there is none in 1.5; ``schema.versions`` asks
    importlib.metadata.
    """
    if small.TORCH_PRUNING < (1, 6):
        assert not hasattr(tp, "__version__")
    else:
        assert tp.__version__ == "1.6.0" != version("torch-pruning")


def test_round_to_counts_one_heads_channels_against_all():
    """BasePruner._round_to (base_pruner.py): mended by tp_hf_config/steer.py.

    Of 12 heads of 32 channels, 4 of every head go: 336 are left, a multiple of 12, so nothing is
    to be rounded. Torch-Pruning takes the 4 from all 384 and rounds 380 down to 372: 12 of 32.
    """
    assert tp.pruner.BasePruner._round_to(None, 4, 12 * 32, 12) == 12


def test_hessian_importance_sorts_channels_and_leaves_their_roots():
    """GroupHessianImportance (importance.py): tp_hf_config/graph.py hands both out in order."""
    source = inspect.getsource(tp.importance.GroupHessianImportance.__call__)
    assert "idxs.sort()" in source
    assert "root_idxs.sort()" not in source
