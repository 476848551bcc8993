"""Models pruned through the graph made from the config, and what is compared of them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import small
import torch
import torch_pruning as tp
import transformers as hf
from torch import nn

from tp_hf_config import HFConfigSyncHook
from tp_hf_config.graph.config_graph import ParameterView, Units, kept_positions
from tp_hf_config.graph.cut_list import CutList, edits_of
from tp_hf_config.model.fill import LiveCut

Make = Callable[[], Any]


Importance = tp.importance.GroupMagnitudeImportance


def llama() -> Any:
    """Four query heads on two key/value heads."""
    return small.llama(num_key_value_heads=2, attn_implementation="eager")


def bert() -> Any:
    return small.bert(attn_implementation="eager")


def phi3() -> Any:
    return small.phi3(eos_token_id=1, bos_token_id=1)


def gpt2() -> Any:
    torch.manual_seed(0)
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=40,
            n_embd=32,
            n_head=4,
            n_layer=2,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()


def mixtral() -> Any:
    torch.manual_seed(0)
    return hf.MixtralForCausalLM(
        hf.MixtralConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=32,
        )
    ).eval()


FFN = {
    llama: "intermediate_size",
    bert: "intermediate_size",
    phi3: "intermediate_size",
    gpt2: "n_inner",
    mixtral: "intermediate_size",
}


HIDDEN = {make: "n_embd" if make is gpt2 else "hidden_size" for make in FFN}


every_model = pytest.mark.parametrize("make", FFN, ids=lambda make: make.__name__)


HEADS, KV_HEADS = ("num_attention_heads",), ("num_key_value_heads",)


WIDTHS = [(make, (names[make],)) for names in (FFN, HIDDEN) for make in FFN] + [
    (make, fields) for make in (llama, mixtral) for fields in (HEADS, KV_HEADS)
]


every_width = pytest.mark.parametrize(
    ("make", "fields"), WIDTHS, ids=[f"{make.__name__}-{fields[0]}" for make, fields in WIDTHS]
)


@functools.cache
def template(make: Make) -> Any:
    """A model that is never pruned."""
    return make()


def fresh(make: Make) -> Any:
    """A model like any other of its kind; its widths are proved once per class and config."""
    return copy.deepcopy(template(make))


def pruner_of(
    model: Any,
    fields: Sequence[str] | None = None,
    cls: Any = tp.pruner.BasePruner,
    ratios: dict[str, float] | None = None,
    **changes: Any,
) -> tuple[Any, HFConfigSyncHook]:
    """A pruner of these fields, of the inner widths by default, and its hook.

    ``changes``: other settings of either.
    """
    if fields is None and ratios is None:
        fields = "inner"
    hook, changes = small.split(prune=fields, ratios=ratios, **changes)
    arguments = {"importance": Importance(), "pruning_ratio": 0.5, **changes}
    return cls(model, example_inputs=None, hooks=[hook], **arguments), hook


def tokens() -> torch.Tensor:
    return torch.randint(3, 30, (2, 7), generator=torch.Generator().manual_seed(1))


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens())[0]


def backward(model: Any) -> None:
    model.zero_grad()
    output = model(input_ids=tokens())[0]
    (output.float() ** 2).mean().backward()


def groups_of(pruner: Any) -> list[Any]:
    return list(
        pruner.DG.get_all_groups(
            ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types
        )
    )


def cuts(group: Any) -> dict[tuple[int, bool], list[int]]:
    """What a group cuts: (module, out side) -> positions; counters of units aside."""
    outs = group._DG.is_out_channel_pruning_fn
    return {
        (id(dep.target.module), outs(dep.handler)): sorted(idxs)
        for dep, idxs in group
        if not isinstance(dep.target.module, Units)
    }


def sides(pruner: Any, group: Any) -> set[tuple[str, str]]:
    """(layer, side) of every parameter in a group of either graph."""
    graph, result = pruner.DG, set()
    for dep, _ in group:
        module = dep.target.module
        if isinstance(module, nn.Parameter):
            name = graph._param_to_name[module].rpartition(".")[0]
        elif isinstance(module, ParameterView):
            name = next(n for n, m in pruner.model.named_modules() if m is module.owner)
        elif any(True for _ in module.parameters(recurse=False)):
            name = graph._module2name[module]
        else:
            continue  # an operation, or a counter of units
        result.add((name, "out" if graph.is_out_channel_pruning_fn(dep.handler) else "in"))
    return result


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def assert_equal(one: Any, two: Any) -> None:
    first, second = dict(one.named_parameters()), dict(two.named_parameters())
    assert shapes(one) == shapes(two)
    for name, parameter in first.items():
        assert torch.equal(parameter, second[name]), name


def assert_consistent(model: Any, fields: dict[str, Any]) -> None:
    """A fresh model from the config has these shapes, and the model runs."""
    assert shapes(type(model)(model.config)) == shapes(model)
    assert fields
    assert torch.isfinite(run(model)).all()


def cut_alone(group: Any, in_history: bool = True) -> None:
    """Cut the weights of one group, whether or not a config describes what is left."""
    graph = group._DG
    model, settle = graph.pretrained, graph.recorded.settle
    edits = edits_of(model, {}, kept_positions(model, [group]))
    graph.recorded.settle = lambda: None
    group.prune(record_history=in_history)
    graph.recorded.settle = settle
    assert len(graph.recorded.groups()) == 1
    graph.recorded.take()
    LiveCut(model, CutList("", {}, {}, edits)).carry_out()
