"""What is pruned under FSDP2, and in one process to compare: the same code for both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import small
import torch
import torch_pruning as tp
import zoo

from tp_hf_config import (
    HFConfigSyncHook,
    calibrate,
    optimizer_follows,
)

Shard = Callable[[Any], Any]


@dataclass(frozen=True)
class Case:
    """A model of the zoo, and how it is pruned.

    Attributes:
        model: its name.
        importance: makes the importance; ``None``: what ``calibrate`` measured, with refits.
        steps: how often is pruned, with training around each step.
        ignored: the name of a layer whose outputs stay.
        settings: more settings of the pruner or the hook.
        layers: whether every layer has widths of its own, ranked together.
        own_data: whether every rank trains on data of its own.
    """

    model: str
    importance: Callable[[], Any] | None = tp.importance.GroupMagnitudeImportance
    steps: int = 1
    ignored: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    per_layer: bool = False
    own_data: bool = False


FULL = ("config", "weights")
"""What cannot be written: the disk is full."""
RIDGE = 0.01
"""So weak that some refits of so little data do not help."""
OF_OWN_DATA = "llama, Taylor of own data"
CASES = {
    "llama": Case("llama", steps=2),
    "llama, Taylor": Case("llama", tp.importance.GroupTaylorImportance, steps=2),
    OF_OWN_DATA: Case("llama", tp.importance.GroupTaylorImportance, steps=2, own_data=True),
    "llama, calibrated": Case("llama", None, steps=2),
    "llama, layers differ": Case(
        "llama", steps=2, settings={"prune": "intermediate_size"}, per_layer=True
    ),
    "gemma2, tied": Case("gemma2"),
    "mixtral, heads": Case("mixtral", settings={"prune_num_heads": True, "gqa": "group"}),
    "bert, Taylor": Case("bert", tp.importance.GroupTaylorImportance),
    "bert, ignored": Case("bert", ignored="bert.encoder.layer.0.intermediate.dense"),
}


def batch(seed: int, rows: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(zoo.VOCAB, (rows, 8), generator=generator)}


def train(
    model: Any, optimizer: Any, seeds: Sequence[int], backward: Any = torch.Tensor.backward
) -> None:
    """One update on the mean of batches; its gradients stay, for importances that read them."""
    optimizer.zero_grad()
    for seed in seeds:
        backward(model(**batch(seed)).logits.square().mean() / len(seeds))
    optimizer.step()


def run(
    case: Case,
    shard: Shard | None,
    rank: int | None = None,
    wrap: Shard = lambda module: module,
    accelerator: Any = None,
) -> tuple[Any, Any, HFConfigSyncHook]:
    """Prune in steps with training around them: what a user's script does.

    Args:
        case: what is pruned.
        shard: shards a model.
        rank: the rank of this process; ``None``: one process sees the data of both ranks.
        wrap: wraps a model that every rank has a copy of, to train it.
        accelerator: shards the model in the place of ``shard``.

    Returns:
        The pruned model, its optimizer, and the hook.
    """
    model = zoo.build(case.model)
    backward = accelerator.backward if accelerator else torch.Tensor.backward
    if shard is not None and accelerator is None:
        shard(model)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if accelerator is not None:
        model, optimizer = accelerator.prepare(model, optimizer)
    calibration = None
    if case.importance is None:
        calibration = calibrate(model, [batch(seed) for seed in range(24)])
    hook, of_pruner = small.split(
        shard=shard,
        refit=calibration,
        per_layer=case.per_layer,
        distributed=shard is None and rank is not None,
        **case.settings,
    )
    ignored = [model.get_submodule(case.ignored)] if case.ignored else []
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        ignored_layers=ignored,
        global_pruning=case.per_layer,
        importance=case.importance() if case.importance else calibration.importance(),
        pruning_ratio=0.5,
        head_pruning_ratio=0.5 if "gqa" in case.settings else 0.0,
        iterative_steps=case.steps,
        hooks=[hook],
        **of_pruner,
    )
    seeds = [0] if not case.own_data else [0, 100] if rank is None else [100 * rank]
    for step in range(case.steps):
        train(wrap(model), optimizer, [seed + step for seed in seeds], backward)
        with optimizer_follows(model, optimizer):
            pruner.step()
        model = hook.sharded_model or model
        if accelerator is not None:
            accelerator._models = [model]
        train(wrap(model), optimizer, [seed + step + 10 for seed in seeds], backward)
    return model, optimizer, hook


def data_of(rank: int) -> list[dict[str, torch.Tensor]]:
    """Data of two ranks: the second has a batch of two tokens, and holds none out."""
    if rank == 1:
        return [{"input_ids": batch(50)["input_ids"][:1, :2]}]
    return [batch(seed, rows=32) for seed in range(4)]


def of_measurement(calibration: Any) -> dict[Any, Any]:
    """What was measured, as plain data."""
    readings = calibration.readings
    return {
        "leaders": readings.leaders,
        "chains": readings.chains,
        "unread": readings.unread,
        "sums": {
            leader: (each.tokens, each.squares, each.gram)
            for leader, each in readings.statistics.items()
        },
    }


def cut_by(calibration: Any, model: Any, hook: HFConfigSyncHook) -> dict[str, Any]:
    """Prune by what was measured, and return what it comes to."""
    tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=calibration.importance("wanda"),
        pruning_ratio=0.5,
        hooks=[hook],
    ).step()
    report = hook.last_report
    return {
        "measurement": of_measurement(calibration),
        "kept": {name: hook.cuts.kept(name) for name in hook.cuts.edits},
        "refits": report.refits.to_dict() | {"seconds": 0.0},
        "tensors": snapshot(hook.sharded_model or model),
    }


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def snapshot(model: Any, optimizer: Any = None) -> dict[str, torch.Tensor]:
    """Everything of a model, and of its optimizer if there is one, as plain tensors."""
    tensors = {name: whole(p.detach()) for name, p in model.named_parameters()}
    tensors |= {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters() if optimizer else ():
        tensors[f"gradient of {name}"] = whole(parameter.grad)
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key} of {name}"] = whole(value)
    return {name: value.clone() for name, value in tensors.items()}
