"""A step that no config could follow is refused before its first weight is cut."""

from __future__ import annotations

from typing import Any

import pytest
import small
import torch
import torch_pruning as tp
import zoo
from torch import nn

from tp_hf_config import (
    ConfigSyncError,
    HFConfigSyncHook,
    PrunerSettingsWarning,
    UnsupportedModelError,
    drop_layers,
)
from tp_hf_config.hook import follow, unit_choice
from tp_hf_config.model.shapes import shapes


def pruner_of(model: Any, hooks: Any, **settings: Any) -> Any:
    importance = tp.importance.MagnitudeImportance()
    arguments = {"importance": importance, "pruning_ratio": 0.5, **settings}
    return tp.pruner.BasePruner(model, None, **arguments, hooks=hooks)


NAMES = ["llama", "gpt2", "mixtral", "bert", "swin", "convnext", "t5", "whisper", "opt"]


@pytest.mark.parametrize("name", NAMES)
def test_shapes_known_before_are_those_of_after(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = zoo.build(name), []
    prove = follow.Follower.prove

    def noting(*args: Any) -> Any:
        proof = prove(*args)
        seen.append(proof.shapes)
        small.assert_same(before, small.state_of(model))
        return proof

    before = small.state_of(model)
    hook = HFConfigSyncHook()
    pruner = pruner_of(model, [hook], pruning_ratio=0.3)
    monkeypatch.setattr(follow.Follower, "prove", noting)
    was = shapes(model)
    pruner.step()
    assert seen == [shapes(model)]
    assert seen != [was]


def not_rounded(patched: pytest.MonkeyPatch) -> None:
    """As if a choice of units were wrong: 23 channels stay, which is no multiple of 4 heads."""
    patched.setattr(unit_choice.UnitChoice, "_rounded", lambda self, group, lost: lost)


def test_a_choice_that_the_class_does_not_take() -> None:
    model, hook = small.llama(), HFConfigSyncHook(prune="hidden_size")
    pruner = pruner_of(model, [hook], pruning_ratio=0.26)
    before = small.state_of(model)
    with pytest.MonkeyPatch.context() as patched:
        not_rounded(patched)
        with pytest.raises(ConfigSyncError) as raised:
            pruner.step()
    assert str(raised.value) == (
        "BasePruner: nothing of step 1 is pruned, because no config would describe the result: "
        "LlamaConfig refuses the values of the pruned weights (hidden_size 32 -> 23). Its message: "
        "\"'validate_architecture': "
        "ValueError: The hidden size (23) is not a multiple of the number of attention heads "
        '(4).". The nearest values that it accepts: hidden_size 20 or 24. '
        "Choose ratios that give accepted values after every step, or set round_to= to a number "
        "that the class accepts."
    )
    small.assert_same(before, small.state_of(model))
    assert (pruner.current_step, hook.reports, pruner.DG._pruning_history) == (0, [], [])
    pruner.step()
    assert model.config.hidden_size == 24


def test_a_pruner_that_is_told_later_to_round_nothing() -> None:
    """Layers are ranked together: how much each loses is not known before the step."""
    left = []
    for changed in (True, False):
        model = small.llama()
        hook = HFConfigSyncHook(prune="intermediate_size", per_layer=True)
        pruner = pruner_of(model, [hook], pruning_ratio=0.26, global_pruning=True)
        if changed:
            pruner.round_to = None
        pruner.step()
        left.append([layer.mlp.gate_proj.out_features for layer in model.model.layers])
    assert left[0] == left[1]
    assert sum(left[0]) < 2 * 64


def test_importances_are_asked_for_once() -> None:
    class Counting(tp.importance.MagnitudeImportance):  # type: ignore[misc]
        asked = 0

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            self.asked += 1
            return super().__call__(*args, **kwargs)

    model, importance = small.llama(), Counting()
    pruner = pruner_of(model, [HFConfigSyncHook()], importance=importance)
    assert importance.asked == 0
    pruner.step()
    assert importance.asked == 3  # the hidden size, and the FFN of two layers


def test_a_step_is_proved_once_before_it_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there after the cuts has the shapes that were proved: nothing is built again."""
    model, hook, built = small.llama(), HFConfigSyncHook(), []
    pruner = pruner_of(model, [hook], iterative_steps=2)
    build = follow.build_with_shapes

    def noting(*args: Any, **kwargs: Any) -> Any:
        built.append(model.config.hidden_size)
        return build(*args, **kwargs)

    monkeypatch.setattr(follow, "build_with_shapes", noting)
    pruner.step()
    pruner.step()
    assert built == [32, 24]
    pruner.DG.get_pruning_group(
        model.model.embed_tokens, tp.prune_embedding_out_channels, [0, 1, 2, 3]
    ).prune()
    assert built == [32, 24, 16]
    assert model.config.hidden_size == 12
    hook.sync()  # the config is another one now, so this is proved anew
    assert built == [32, 24, 16, 12]


def test_random_importances_are_those_that_were_proved() -> None:
    model, hook = small.llama(), HFConfigSyncHook()
    importance = tp.importance.RandomImportance()
    pruner = pruner_of(model, [hook], importance=importance)
    pruner.step()
    assert (model.config.hidden_size, model.config.intermediate_size) == (16, 32)


def test_a_step_that_fails_before_its_first_cut_is_none() -> None:
    """No report tells of it: the first one is that of the step that cuts."""
    model, hook = small.llama(), HFConfigSyncHook()
    pruner = pruner_of(model, [hook], importance=tp.importance.GroupTaylorImportance())
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        pruner.step()
    assert (hook.reports, pruner.current_step) == ([], 0)
    model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    pruner.step()
    assert [report.step for report in hook.reports] == [1]
    assert hook.reports[0].fields == {"hidden_size": (32, 16), "intermediate_size": (64, 32)}


def test_a_layer_that_is_gone_is_told_and_nothing_else(recwarn: pytest.WarningsRecorder) -> None:
    model, hook = small.llama(), HFConfigSyncHook()
    pruner = pruner_of(model, [hook])
    drop_layers(model, [1])
    recwarn.clear()
    with pytest.raises(UnsupportedModelError):
        pruner.step()
    assert (hook.reports, len(recwarn)) == ([], 0)


def test_groups_that_the_user_is_handed_are_the_users() -> None:
    """Only the first of two layers is pruned in the loop: nothing is, until the second is too."""
    model, hook = small.llama(), HFConfigSyncHook(prune="intermediate_size")
    pruner = pruner_of(model, [hook])
    before = small.state_of(model)
    groups = pruner.step(interactive=True)
    next(groups).prune()
    with pytest.warns(PrunerSettingsWarning, match="recorded but not cut yet"):
        list(groups)
    with pytest.raises(
        ConfigSyncError, match=r"Nothing was written\. Continue to prune, then call hook\.sync"
    ):
        hook.sync()
    small.assert_same(before, small.state_of(model))
    gate = model.model.layers[1].mlp.gate_proj
    pruner.DG.get_pruning_group(gate, tp.prune_linear_out_channels, list(range(32))).prune()
    assert hook.last_report.fields == {"intermediate_size": (64, 32)}  # type: ignore[union-attr]
    assert gate.out_features == model.config.intermediate_size == 32


@pytest.mark.parametrize("kind", ["layer", "pruner", "importance"])
def test_nothing_switches_the_proof_off(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose own code fails without data, a step and an importance of somebody's own."""

    class Own(nn.Linear):
        @property
        def out_features(self) -> int:
            if self.weight.is_meta:
                raise RuntimeError("needs data")
            return self.weight.shape[0]

        @out_features.setter
        def out_features(self, size: int) -> None: ...

    class Pruner(tp.pruner.BasePruner):  # type: ignore[misc, name-defined]
        def step(self, interactive: bool = False) -> Any:
            return super().step(interactive)

    class Told(tp.importance.MagnitudeImportance):  # type: ignore[misc]
        def adjust_fisher(self, *args: Any) -> None: ...

    model, hook = small.llama(), HFConfigSyncHook(prune="hidden_size")
    if kind == "layer":
        vars(model.model.layers[0].mlp.up_proj).pop("out_features")
        model.model.layers[0].mlp.up_proj.__class__ = Own
    settings = {"importance": Told()} if kind == "importance" else {}
    cls = Pruner if kind == "pruner" else tp.pruner.BasePruner
    arguments = {
        "example_inputs": None,
        "importance": tp.importance.MagnitudeImportance(),
        "pruning_ratio": 0.26,
        **settings,
    }
    pruner = cls(model, **arguments, hooks=[hook])
    before = small.state_of(model)
    not_rounded(monkeypatch)
    with pytest.raises(
        ConfigSyncError,
        match="nothing of step 1 is pruned, because no config would describe the result",
    ):
        pruner.step()
    small.assert_same(before, small.state_of(model))
    assert (pruner.current_step, hook.pending) == (0, ())
