"""What a pruner's arguments mean on the graph made from the config."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import small
import torch_pruning as tp
import zoo
from torch import nn
from torch_pruning import ops

from tp_hf_config import (
    CalibrationWarning,
    HFConfigSyncHook,
    PrunerSettingsWarning,
)
from tp_hf_config.graph.sides import is_vector

pytestmark = pytest.mark.usefixtures("every_width")

DEFAULT = [ops.TORCH_CONV, ops.TORCH_LINEAR, ops.TORCH_LSTM]


def pruner_of(model: nn.Module, prune: Any = None, **changes: Any) -> tuple[Any, HFConfigSyncHook]:
    hook = HFConfigSyncHook(prune=prune)
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.25,
        hooks=[hook],
        **changes,
    )
    return pruner, hook


def fields_of(model: nn.Module, prune: Any = None, **changes: Any) -> dict[str, Any]:
    """What one step changes; nothing is warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", CalibrationWarning)  # it ranks by magnitude
        pruner, hook = pruner_of(model, prune, **changes)
    pruner.step()
    assert hook.last_report is not None
    return hook.last_report.fields


BOTH = {"hidden_size": (32, 24), "intermediate_size": (64, 48)}


@pytest.mark.parametrize("types", [DEFAULT, (ops.TORCH_CONV, ops.TORCH_LINEAR), (), [nn.Linear]])
def test_torch_prunings_own_root_types_stand_for_all(types: Any) -> None:
    assert fields_of(small.llama(), root_module_types=types) == BOTH


@pytest.mark.parametrize("types", [[nn.Embedding], [nn.Embedding, nn.Conv2d]])
def test_only_groups_with_outputs_of_a_root_type(types: Any) -> None:
    words = "^intermediate_size is kept at 64: root_module_types= .* does not include the type of "
    with pytest.warns(PrunerSettingsWarning, match=words):
        pruner, hook = pruner_of(small.llama(), root_module_types=types)
    pruner.step()
    assert hook.last_report is not None
    assert hook.last_report.fields == {"hidden_size": (32, 24)}


def test_layers_that_are_views_count_as_themselves_and_as_linear() -> None:
    model = zoo.build("gpt2")
    conv1d = type(model.transformer.h[0].mlp.c_fc)
    for types in ([conv1d], [nn.Linear]):
        pruner, _ = pruner_of(model, ("n_inner",), root_module_types=types)
        assert len(list(pruner.DG.get_all_groups(root_module_types=types))) == 2


def test_a_bare_vector_is_no_linear_layer() -> None:
    """Norm weights are views too, of one dimension; their own type may be a root."""
    model = small.llama()
    norm = type(model.model.norm)
    pruner, _ = pruner_of(model)
    (group,) = pruner.DG.get_all_groups(root_module_types=[norm])
    assert group.graph_group.fields == (("hidden_size",),)
    group.graph_group.sides = [side for side in group.graph_group.sides if is_vector(side.module)]
    assert len(group.graph_group.sides) == 5
    listed = pruner.DG.get_all_groups(root_module_types=[nn.Linear])
    assert [group.graph_group.fields for group in listed] == [(("intermediate_size",),)] * 2
    assert len(list(pruner.DG.get_all_groups(root_module_types=DEFAULT))) == 3


def test_a_layer_that_only_reads_is_no_root() -> None:
    pruner, _ = pruner_of(small.llama())
    stream, *others = pruner.DG.graph_groups
    assert stream.fields == (("hidden_size",),)
    stream.sides = [s for s in stream.sides if not (s.out and isinstance(s.module, nn.Linear))]
    assert any(isinstance(side.module, nn.Linear) for side in stream.sides)
    listed = pruner.DG.get_all_groups(root_module_types=[nn.Linear])
    assert [group.graph_group for group in listed] == others


def test_a_group_of_inputs_alone_goes_by_the_layers_that_read() -> None:
    pruner, _ = pruner_of(small.llama(), ("intermediate_size",))
    first, second = pruner.DG.graph_groups
    first.sides = [side for side in first.sides if not side.out]
    assert len(first.sides) == 1
    listed = pruner.DG.get_all_groups(root_module_types=[nn.Linear])
    assert [group.graph_group for group in listed] == [first, second]
    assert not list(pruner.DG.get_all_groups(root_module_types=[nn.Embedding]))


@pytest.mark.parametrize("name", ["in_channel_groups", "out_channel_groups", "channel_groups"])
def test_other_groups_of_channels_are_refused(name: str) -> None:
    model = small.llama()
    layer = model.model.layers[0].mlp.up_proj
    before = small.state_of(model)
    with pytest.raises(ValueError, match=name) as raised:
        pruner_of(model, **{name: {layer: 2}})
    assert str(raised.value) == (
        f"{name}= (for Linear) cannot be used with the graph made from the config: experiments "
        "find which channels of a layer have to be pruned together (fused layers, heads, grouped "
        "norms), and no others can be requested. Leave it out."
    )
    small.assert_same(before, small.state_of(model))


def unneeded(model: Any) -> dict[str, tuple[Any, str]]:
    """Arguments for the trace, and why the graph made from the config needs none."""
    norm = model.model.norm
    return {
        "customized_pruners": (
            {type(norm): tp.pruner.function.BasePruningFunc},
            "the graph cuts the parameters of every layer itself, and the hook updates the widths "
            "that a layer records",
        ),
        "unwrapped_parameters": (
            [(norm.weight, 0)],
            "the graph knows which dimensions of bare parameters a config field sets",
        ),
        "forward_fn": (lambda model, inputs: 1 / 0, "the graph is made without a forward pass"),
    }


@pytest.mark.parametrize("name", ["customized_pruners", "unwrapped_parameters", "forward_fn"])
def test_arguments_for_the_trace_are_warned_of(name: str) -> None:
    model = small.llama()
    value, why = unneeded(model)[name]
    with pytest.warns(PrunerSettingsWarning, match=name) as caught:
        pruner, hook = pruner_of(model, **{name: value})
    settings = [one for one in caught if one.category is PrunerSettingsWarning]
    assert [str(warning.message) for warning in settings] == [
        f"{name}= has no effect on the graph made from the config: {why}. Leave it out."
    ]
    pruner.step()
    assert hook.last_report is not None
    assert hook.last_report.fields == BOTH


def test_empty_arguments_are_fine() -> None:
    empty: dict[str, Any] = {
        "customized_pruners": {},
        "unwrapped_parameters": [],
        "forward_fn": None,
    }
    assert fields_of(small.llama(), **empty) == BOTH
