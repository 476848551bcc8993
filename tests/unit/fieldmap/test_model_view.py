"""A model is looked for and built once, until something of it changes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import small
import torch
import torch_pruning as tp
from torch import nn

from tp_hf_config import HFConfigSyncHook, UnsupportedModelError, plan
from tp_hf_config.fieldmap import model_view
from tp_hf_config.fieldmap.model_view import view_of
from tp_hf_config.model.build import Builder

LAYERS = 6


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes that are built with all layers, once the config is known."""
    plan(small.llama(num_hidden_layers=LAYERS), pruning_ratio=0.5)
    built: list[str] = []
    build = Builder.build

    def counting(self: Builder, data: dict[str, Any], buffers: bool = False) -> Any:
        if data["num_hidden_layers"] == LAYERS:
            built.append(self.model_class.__name__)
        return build(self, data, buffers)

    monkeypatch.setattr(Builder, "build", counting)
    return built


def test_from_the_plan_to_the_hook_the_class_is_built_three_times(builds: list[str]) -> None:
    """To compare it with the model, and for its size before and after."""
    model = small.llama(num_hidden_layers=LAYERS)
    planned = plan(model, pruning_ratio=0.5)
    assert len(builds) == 3
    importance = tp.importance.MagnitudeImportance()
    pruner = tp.pruner.MetaPruner(
        model, None, importance=importance, hooks=[HFConfigSyncHook(plan=planned)]
    )
    assert len(builds) == 3
    pruner.step()
    assert len(builds) == 4  # the proof before the step, of the shapes that it then leaves
    assert model.config.intermediate_size == 32


def set_config(model: Any) -> None:
    model.config.rms_norm_eps = 0.5


def swap(model: Any) -> None:
    first, second, *rest = model.model.layers
    model.model.layers = nn.ModuleList([second, first, *rest])


def cast(model: Any) -> None:
    model.half()


@pytest.mark.parametrize("change", [set_config, swap, cast])
def test_what_was_changed_is_looked_at_again(
    change: Callable[[Any], None], builds: list[str]
) -> None:
    model = small.llama(num_hidden_layers=LAYERS)
    first = view_of(model)
    assert view_of(model).reference is first.reference
    assert len(builds) == 1
    change(model)
    assert view_of(model).reference is not first.reference
    assert len(builds) > 1


def test_a_model_that_no_longer_fits_its_config_is_refused() -> None:
    model = small.llama(num_hidden_layers=LAYERS)
    view_of(model)
    model.model.layers[0].mlp.up_proj = nn.Linear(32, 48, bias=False)
    with pytest.raises(UnsupportedModelError, match="and its config disagree before any pruning"):
        view_of(model)


def test_a_view_keeps_no_model_alive() -> None:
    model = small.llama()
    with torch.no_grad():
        view_of(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert all(module is not None for module in model_view._cached_views)
