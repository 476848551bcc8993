"""A class that the library cannot feed is fed by a function of the user's: ``make_inputs=``."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch_pruning as tp
import transformers as hf
from masked_original import assert_same_as_masked

from tp_hf_config import (
    HFConfigSyncHook,
    UnsupportedModelError,
    plan,
    prunable,
    supports,
)
from tp_hf_config.fieldmap.learn_field_map import map_of
from tp_hf_config.forward.inputs import given_inputs
from tp_hf_config.model.disk_cache import VARIABLE

pytestmark = pytest.mark.usefixtures("every_width")

STEPS = 5
PROVED = {"hidden_size": 32, "n_inner": 96, "n_head + hidden_size": 4}


def decider() -> Any:
    torch.manual_seed(0)
    config = hf.DecisionTransformerConfig(
        state_dim=6,
        act_dim=3,
        hidden_size=32,
        n_inner=96,
        n_layer=2,
        n_head=4,
        max_ep_len=16,
        n_positions=64,
        vocab_size=1,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = hf.DecisionTransformerModel(config).eval()
    tiny.randomise(model)
    return model


def trajectory(config: Any) -> dict[str, Any]:
    """States, actions, rewards and returns of two trajectories."""
    return {
        "states": torch.rand(2, STEPS, config.state_dim),
        "actions": torch.rand(2, STEPS, config.act_dim),
        "rewards": torch.rand(2, STEPS, 1),
        "returns_to_go": torch.rand(2, STEPS, 1),
        "timesteps": torch.arange(2 * STEPS).view(2, STEPS) % config.max_ep_len,
        "attention_mask": torch.ones(2, STEPS, dtype=torch.long),
    }


def proved(model: Any, make_inputs: Any = None) -> dict[str, int]:
    widths = prunable(model, make_inputs=make_inputs).widths
    return {width.name: width.units for width in widths if width.reason is None}


def half(model: Any, hook: HFConfigSyncHook) -> None:
    importance = tp.importance.GroupMagnitudeImportance()
    tp.pruner.MetaPruner(model, None, importance, pruning_ratio=0.5, hooks=[hook]).step()


class TestPruned:
    def test_it_is_pruned_saved_and_loaded_again(self, tmp_path: Path) -> None:
        model, hook = decider(), HFConfigSyncHook(make_inputs=trajectory)
        original = copy.deepcopy(model)
        half(model, hook)
        report = hook.last_report
        assert report is not None
        assert report.graph.startswith("config graph: 5 groups, each proved by")
        assert report.fields == {"hidden_size": (32, 16), "n_inner": (96, 48)}
        inputs = trajectory(model.config)
        assert_same_as_masked(original, model, inputs)
        model.save_pretrained(tmp_path)
        again = hf.DecisionTransformerModel.from_pretrained(tmp_path)
        assert (again.config.hidden_size, again.config.n_inner) == (16, 48)
        with torch.no_grad():
            pairs = zip(again(**inputs).to_tuple(), model(**inputs).to_tuple(), strict=True)
            assert all(torch.equal(loaded, live) for loaded, live in pairs)

    def test_a_plan_carries_it_to_the_hook(self) -> None:
        model = decider()
        planned = plan(
            model,
            prune=["n_head"],
            head_pruning_ratio=0.5,
            prune_num_heads=True,
            make_inputs=trajectory,
        )
        assert planned.values == {"n_head": 2, "hidden_size": 16}
        half(model, HFConfigSyncHook(plan=planned))
        assert (model.config.n_head, model.config.hidden_size) == (2, 16)

    def test_every_width_is_tried_with_it(self) -> None:
        found = supports(decider(), make_inputs=trajectory)
        outcomes = {width.name: width.outcome for width in found.widths}
        assert outcomes == dict.fromkeys(PROVED, "works") | dict.fromkeys(
            ("act_dim", "state_dim"), "refused"
        )


class TestKeptApart:
    def test_what_is_found_with_it_and_without_is_not_mixed(self) -> None:
        model = decider()
        for _ in range(2):
            assert proved(model) == {}
            assert proved(model, trajectory) == PROVED

    def test_nothing_of_it_is_kept_on_disk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(VARIABLE, str(tmp_path))
        model = decider()

        def own(config: Any) -> dict[str, Any]:
            return trajectory(config)

        assert not prunable(model, make_inputs=own).cached
        assert list(tmp_path.iterdir()) == []
        model.config.n_inner = 64
        prunable(hf.DecisionTransformerModel(model.config))
        assert len(list(tmp_path.iterdir())) == 2  # the field map and the refusal


class TestGiven:
    def test_the_config_is_that_of_the_model_that_runs(self) -> None:
        sizes = set()

        def noted(config: Any) -> dict[str, Any]:
            sizes.add(config.hidden_size)
            return trajectory(config)

        assert proved(decider(), noted) == PROVED
        assert min(sizes) < 32 <= max(sizes)

    def test_numbers_are_taken_as_the_model_can(self) -> None:
        def mixed(config: Any) -> dict[str, Any]:
            return {"a": torch.ones(2, 3), "b": [torch.ones(2, dtype=torch.long)], "c": True}

        model = decider()
        real = given_inputs(model.double(), mixed)
        assert (real["a"].dtype, real["b"][0].dtype, real["c"]) == (
            torch.float64,
            torch.int64,
            True,
        )
        bare = given_inputs(model.to("meta"), mixed)
        assert (bare["a"].device.type, bare["b"][0].device.type) == ("meta", "cpu")
        assert bare["a"].shape == (2, 3)

    def test_encoder_states_in_it_are_known_as_such(self) -> None:
        config = hf.BertConfig(
            vocab_size=99,
            num_hidden_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            intermediate_size=48,
            is_decoder=True,
            add_cross_attention=True,
        )

        def two(config: Any) -> dict[str, Any]:
            states = torch.rand(2, 3, config.hidden_size)
            ids = torch.arange(1, 11).view(2, 5)
            return {"input_ids": ids, "encoder_hidden_states": states}

        model = hf.BertLMHeadModel(config).eval()
        states = map_of(model, make_inputs=two).recipe.encoder_states
        assert states is not None
        assert (states.argument, states.dim) == ("encoder_hidden_states", 1)
        offered = prunable(model, make_inputs=two).widths
        widths = {width.name: width.encoder_states for width in offered}
        assert widths["hidden_size"] == ("encoder_hidden_states",)


def raising(config: Any) -> Any:
    return {"states": torch.rand(1, config.sides)}


def listed(config: Any) -> Any:
    return [torch.rand(1, 2)]


def short(config: Any) -> Any:
    return {"states": torch.rand(2, STEPS, config.state_dim), "actions": None}


RAISES = (
    "make_inputs=raising raised AttributeError for a DecisionTransformerConfig: "
    "'DecisionTransformerConfig' object has no attribute 'sides'. It is called with small configs "
    "of this class too: take every size from the config that it is given."
)
EDGES: dict[str, Callable[[Any, Any], Any]] = {
    "prunable": lambda model, make: prunable(model, make_inputs=make),
    "plan": lambda model, make: plan(model, make_inputs=make),
    "supports": lambda model, make: supports(model, make_inputs=make),
    "hook": lambda model, make: half(model, HFConfigSyncHook(make_inputs=make)),
}


NO_DICT = (
    r"^make_inputs=listed returned a list for a DecisionTransformerConfig\. Return a dict "
    r"of what DecisionTransformerModel's forward pass takes, as \{'input_ids': ids\}\.$"
)
STOPS = (
    r"^DecisionTransformerModel does not run with what make_inputs=short returned for a "
    r"small DecisionTransformerConfig, states \(2, 5, \d+\), actions: .+\. Take every size "
    r"from the config that the function is given, and return all that model\(\*\*inputs\) "
    r"needs\.$"
)


@pytest.mark.parametrize(
    ("edge", "make_inputs", "message"),
    [
        *((edge, raising, re.escape(RAISES) + "$") for edge in EDGES),
        ("prunable", listed, NO_DICT),
        ("prunable", short, STOPS),
        ("supports", short, STOPS),  # it finds the refusal by itself
    ],
)
def test_what_is_wrong_with_it_is_said(edge: str, make_inputs: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        EDGES[edge](decider(), make_inputs)
