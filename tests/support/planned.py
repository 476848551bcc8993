"""Plans that are carried out, what a step cuts, and a class that takes no less than some width."""

from __future__ import annotations

from typing import Any

import small
import torch
import torch_pruning as tp
import transformers as hf

from tp_hf_config import CutList, HFConfigSyncHook, Plan

SMOLLM2 = hf.LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
    architectures=["LlamaForCausalLM"],
)


def changed(config: Any, **values: Any) -> Any:
    """A config of the same class with other values."""
    return type(config)(**{**config.to_dict(), **values})


def pruned(model: Any, plan: Plan) -> list[dict[str, Any]]:
    """Prune as planned, adjusted as planned; the config's fields after every step."""
    hook = HFConfigSyncHook(plan=plan)
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=None,
        importance=tp.importance.MagnitudeImportance(),
        hooks=[hook],
    )
    after: list[dict[str, Any]] = []
    for number in range(1, plan.settings.iterative_steps + 1):
        pruner.step()
        assert hook.last_report is not None
        told = [note for note in hook.last_report.notes if note.startswith("step ")]
        assert told == [line for line in plan.adjusted if line.startswith(f"step {number}: ")]
        after.append({name: getattr(model.config, name) for name in plan.values})
    return after


def cuts_of(model: Any, **settings: Any) -> CutList:
    """Prune a quarter of a model's widths, or what the settings say, at random; what was cut."""
    hook, of_pruner = small.split(**{"pruning_ratio": 0.25, **settings})
    tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.RandomImportance(),
        hooks=[hook],
        **of_pruner,
    ).step()
    assert hook.cuts is not None
    return hook.cuts


def steps(plan: Plan) -> list[dict[str, int]]:
    """Field -> value after every step, all widths together."""
    return [
        {name: value for width in plan.widths for name, value in width.steps[step].items()}
        for step in range(plan.settings.iterative_steps)
    ]


def numbers_of(model: torch.nn.Module) -> tuple[int, int]:
    """Parameters and their bytes, tied ones once."""
    weights = list(model.parameters())
    return sum(w.numel() for w in weights), sum(w.numel() * w.element_size() for w in weights)


class NarrowConfig(hf.LlamaConfig):
    """Takes no hidden size under 24, whatever the heads are."""

    model_type = "narrow"


class Narrow(hf.LlamaForCausalLM):
    config_class = NarrowConfig

    def __init__(self, config: NarrowConfig):
        if config.hidden_size < 24:
            raise ValueError("hidden_size: at least 24 are needed")
        super().__init__(config)


def narrow() -> Narrow:
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 32)
    return Narrow(NarrowConfig(vocab_size=40, num_hidden_layers=2, num_attention_heads=4, **sizes))
