"""The hook chooses the channels that Torch-Pruning chooses on a model that it can trace."""

from __future__ import annotations

from typing import Any

import pytest
import small
import torch
import torch_pruning as tp
from torch import nn

from tp_hf_config import HFConfigSyncHook

pytestmark = [
    pytest.mark.filterwarnings("ignore::tp_hf_config.CalibrationWarning"),
    pytest.mark.filterwarnings("ignore::tp_hf_config.PrunerSettingsWarning"),
    pytest.mark.filterwarnings("ignore:Unwrapped parameters detected"),
]
INPUTS = {"input_ids": torch.arange(1, 9)[None]}


class Halves(tp.pruner.BasePruner):  # type: ignore[misc, name-defined]
    """Ranks by something of its own, and prunes the groups in the opposite order."""

    def estimate_importance(self, group: Any) -> torch.Tensor:
        return -super().estimate_importance(group)

    def _prune(self) -> Any:
        yield from reversed(list(super()._prune()))


def bert() -> Any:
    """A model whose layers differ in the size of their weights, with gradients."""
    model = small.bert()
    torch.manual_seed(3)
    with torch.no_grad():
        for number, layer in enumerate(model.encoder.layer):
            layer.intermediate.dense.weight.mul_(1 + number)
    model(**INPUTS).pooler_output.square().sum().backward()
    return model


def ffn(model: Any) -> list[nn.Module]:
    return [layer.intermediate.dense for layer in model.encoder.layer]


def pruned(hooks: list[Any], cls: Any, importance: Any, settings: dict[str, Any]) -> Any:
    """BERT after all steps of a pruner of its feed-forward layers."""
    model = bert()
    first, second = ffn(model)
    keys = {"first": first, "both": (first, second)}
    ratios = {keys[name]: ratio for name, ratio in settings.get("by_layer", {}).items()}
    others = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Embedding) and module not in (first, second)
    ]
    given = {"hooks": hooks} if hooks else {}
    pruner = cls(
        model,
        INPUTS,
        importance(),
        output_transform=lambda output: output.pooler_output,
        ignored_layers=others,
        pruning_ratio_dict=ratios,
        **{
            "pruning_ratio": 0.3,
            "round_to": 1,
            **{k: v for k, v in settings.items() if k != "by_layer"},
        },
        **given,
    )
    for _ in range(settings.get("iterative_steps", 1)):
        torch.manual_seed(5)
        pruner.step()
    return model


SETTINGS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "in steps": {"iterative_steps": 3, "pruning_ratio": 0.5},
    "global": {"global_pruning": True},
    "isomorphic": {"global_pruning": True, "isomorphic": True},
    "a ratio by layer": {"by_layer": {"first": 0.5}},
    "ranked together": {"by_layer": {"both": 0.4}, "global_pruning": True},
    "not too much": {"global_pruning": True, "pruning_ratio": 0.6, "max_pruning_ratio": 0.7},
    "rounded": {"round_to": 8},
}
IMPORTANCES: dict[str, Any] = {
    "magnitude": tp.importance.GroupMagnitudeImportance,
    "L1": lambda: tp.importance.GroupMagnitudeImportance(p=1, group_reduction="sum"),
    "LAMP": tp.importance.LAMPImportance,
    "FPGM": tp.importance.FPGMImportance,
    "Taylor": tp.importance.GroupTaylorImportance,
    "random": tp.importance.RandomImportance,
}
CASES = [
    *((name, "magnitude", tp.pruner.BasePruner) for name in SETTINGS),
    *(("uniform", name, tp.pruner.BasePruner) for name in IMPORTANCES if name != "magnitude"),
    ("in steps", "Taylor", tp.pruner.GroupNormPruner),
    ("uniform", "magnitude", Halves),
    ("in steps", "L1", Halves),
]


@pytest.mark.parametrize(
    ("settings", "importance", "cls"), CASES, ids=lambda value: getattr(value, "__name__", value)
)
def test_as_torch_pruning(settings: str, importance: str, cls: Any) -> None:
    hook = HFConfigSyncHook(per_layer=True)
    followed = pruned([hook], cls, IMPORTANCES[importance], SETTINGS[settings])
    alone = pruned([], cls, IMPORTANCES[importance], SETTINGS[settings])
    assert hook.last_report is not None
    assert [layer.out_features for layer in ffn(alone)] != [64, 64]
    for name, parameter in alone.named_parameters():
        assert torch.equal(parameter, followed.get_parameter(name)), name


def test_nothing_of_a_pruner_is_replaced_but_its_step() -> None:
    settings = {"prune_num_heads": True, "head_pruning_ratio": 0.5, "pruning_ratio_dict": {}}
    example = {"importance": tp.importance.GroupMagnitudeImportance(), "example_inputs": INPUTS}
    transform = {"output_transform": lambda output: output.pooler_output}
    plain = tp.pruner.BasePruner(bert(), **example, **settings, **transform)
    hooked = tp.pruner.BasePruner(bert(), **example, **settings, hooks=[HFConfigSyncHook()])
    assert set(vars(hooked)) - set(vars(plain)) == {"step"}
    assert hooked._layer_to_scope == hooked.pruning_ratio_dict == {}
