"""Traced groups are put to the proof: what experiments did not show is not pruned."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import small
import tiny
import torch
import torch_pruning as tp
import transformers as hf
import zoo
from small import traced_kwargs
from torch import nn
from torch_pruning import ops

import tp_hf_config.graph.traced.proof
from tp_hf_config import HFConfigSyncHook, UnsupportedModelError, pruner_kwargs
from tp_hf_config.graph.prunable import Width, widths_of

WRONG = "Torch-Pruning's trace is wrong about the group that starts at "


def attached(model: nn.Module, **kwargs: Any) -> HFConfigSyncHook:
    """The hook of a pruner with a traced graph."""
    hook = HFConfigSyncHook()
    arguments = {**traced_kwargs(model), "pruning_ratio": 0.25, **kwargs}
    pruner = tp.pruner.MetaPruner(
        model, importance=tp.importance.GroupMagnitudeImportance(), hooks=[hook], **arguments
    )
    pruner.step()
    return hook


def refusal(model: nn.Module, **kwargs: Any) -> str:
    """Why a pruner is refused; the model is as it was."""
    before = small.state_of(model)
    with pytest.raises(UnsupportedModelError) as raised:
        attached(model, **kwargs)
    small.assert_same(before, small.state_of(model))
    message = str(raised.value)
    assert message.startswith(WRONG)
    return message.removeprefix(WRONG).partition(" Pruned like that, ")[0]


class FrozenConfig(hf.PretrainedConfig):
    model_type = "frozen-norm"

    def __init__(self, width: int = 16, out: int = 6, **rest: Any):
        self.width, self.out = width, out
        super().__init__(**rest)


class FrozenNorm(nn.Module):
    """A batch norm whose numbers are buffers, as detectors have them."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("weight", torch.ones(width))
        self.register_buffer("bias", torch.zeros(width))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values * self.weight + self.bias  # type: ignore[operator]


class FrozenNormModel(hf.PreTrainedModel):
    config_class = FrozenConfig

    def __init__(self, config: FrozenConfig):
        super().__init__(config)
        self.first = nn.Linear(5, config.width)
        self.norm = FrozenNorm(config.width)
        self.last = nn.Linear(config.width, config.out)
        self.post_init()

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(inputs_embeds)).relu())


def test_buffers_that_no_trace_cuts_are_missed_before_anything_is_pruned() -> None:
    """It ended in a ConfigSyncError after the step (PP-DocLayout's frozen batch norms)."""
    model = FrozenNormModel(FrozenConfig()).eval()
    before = small.state_of(model)
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=torch.randn(2, 5),
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.25,
        ignored_layers=[model.last],
        hooks=[Safe()],
    )
    with pytest.raises(UnsupportedModelError) as raised:
        HFConfigSyncHook().register(pruner)
    small.assert_same(before, small.state_of(model))
    assert "would cut only a part of what width sets: not norm.weight, norm.bias" in str(
        raised.value
    )


def registered(model: nn.Module, tamper: Any, **kwargs: Any) -> str:
    """What a hook says of a pruner whose graph was tampered with after it was traced."""
    arguments = {**traced_kwargs(model), "pruning_ratio": 0.25, **kwargs}
    hook = HFConfigSyncHook()
    pruner = tp.pruner.MetaPruner(
        model,
        importance=tp.importance.GroupMagnitudeImportance(),
        hooks=[Safe()],
        **arguments,
    )
    tamper(pruner.DG)
    with pytest.raises(UnsupportedModelError) as raised:
        hook.register(pruner)
    assert vars(pruner.DG).get("get_pruning_group") is None
    return str(raised.value).removeprefix(WRONG).partition(" Pruned like that, ")[0]


class Safe:
    """A hook that only traces safely, without a proof."""

    def constructing(self, arguments: Any) -> Any:
        from tp_hf_config.graph.traced.safe_tracing import safe_tracing

        return safe_tracing(arguments["model"])

    def after_step(self, pruner: Any) -> None:
        pass


def exchange(graph: Any, one: nn.Module, other: nn.Module) -> None:
    """Each of two layers stands in the graph where the other stood."""
    nodes = graph.module2node
    first, second = nodes[one], nodes[other]
    first.module, second.module = other, one
    nodes[one], nodes[other] = second, first


def test_the_message_says_what_to_do() -> None:
    model = small.llama()
    before = small.state_of(model)
    ignored = [*traced_kwargs(model)["ignored_layers"], model.model.norm.weight]
    with pytest.raises(UnsupportedModelError) as raised:
        attached(model, ignored_layers=ignored)
    assert str(raised.value) == (
        f"{WRONG}model.layers.1.mlp.down_proj: model.norm.weight follows hidden_size but is not "
        "in it. Pruned like that, LlamaForCausalLM would compute something else. Prune by groups "
        "that are proved, pruner_kwargs(model, graph='config'), or keep the layers of this one "
        "(ignored_layers=)."
    )
    small.assert_same(before, small.state_of(model))


def test_many_missing_dimensions_are_counted() -> None:
    model = small.llama()
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    ignored = [*traced_kwargs(model)["ignored_layers"], *norms]
    assert refusal(model, ignored_layers=ignored) == (
        "model.layers.1.mlp.down_proj: model.layers.0.input_layernorm.weight, "
        "model.layers.0.post_attention_layernorm.weight and 3 more follow hidden_size but are not "
        "in it."
    )


def test_a_bare_parameter_cut_along_the_wrong_dimension() -> None:
    """Position embeddings that are said to be cut by position."""
    model = tiny.build("vit")
    position = model.vit.embeddings.position_embeddings
    layer = "layers.1.mlp.fc2" if small.TRANSFORMERS >= (5,) else "encoder.layer.1.output.dense"
    assert refusal(model, unwrapped_parameters=[(position, 1)]) == (
        f"vit.{layer}: vit.embeddings.position_embeddings follows hidden_size but is not in it."
    )


def test_fused_gate_and_up_that_nobody_told_about() -> None:
    assert refusal(small.phi3(), out_channel_groups={}) == (
        "model.layers.1.mlp.gate_up_proj: what it cuts together of "
        "model.layers.1.mlp.gate_up_proj.weight (dimension 0) are no whole units of "
        "intermediate_size."
    )
    assert attached(small.phi3()).last_report.fields["intermediate_size"] == (64, 48)


@pytest.mark.skipif(
    small.TRANSFORMERS < (5,), reason="Mixtral's experts are layers of their own, not stacked"
)
def test_stacked_experts_cut_along_the_wrong_dimension() -> None:
    """Torch-Pruning takes the last dimension: intermediate, where it is the hidden size's."""
    model = zoo.build("mixtral")
    ignored = [layer.self_attn for layer in model.model.layers]
    qkv = [m for a in ignored for m in (a.q_proj, a.k_proj, a.v_proj)]
    assert refusal(model, ignored_layers=[*qkv, model.lm_head], unwrapped_parameters=None) == (
        "model.layers.1.self_attn.o_proj: model.layers.0.mlp.experts.down_proj, "
        "model.layers.1.mlp.experts.down_proj follow hidden_size but are not in it."
    )


def test_transposed_layers_that_torch_pruning_does_not_know() -> None:
    model = zoo.build("gpt2")
    message = refusal(
        model, ignored_layers=[model.lm_head], root_module_types=[ops.TORCH_LAYERNORM]
    )
    assert message == (
        "transformer.ln_f: transformer.h.0.attn.c_attn.weight, transformer.h.0.mlp.c_fc.weight and "
        "2 more follow n_embd but are not in it."
    )


def test_two_layers_in_each_others_place() -> None:
    model = small.llama()
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    message = registered(model, lambda graph: exchange(graph, first, second))
    assert message == (
        "model.layers.1.mlp.up_proj: model.layers.1.mlp.gate_proj.weight, "
        "model.layers.1.mlp.down_proj.weight follow intermediate_size but are not in it."
    )


def test_channels_in_another_order() -> None:
    """The trace says that channel i of one layer goes with channel 63 - i of the others."""
    model = small.llama()
    down = model.model.layers[0].mlp.down_proj

    def turn(graph: Any) -> None:
        sides = tp.prune_linear_in_channels
        for dep in (dep for node in graph.module2node.values() for dep in node.dependencies):
            there = dep.target.module is down and dep.handler == sides
            if there or (dep.source.module is down and dep.trigger == sides):
                dep.index_mapping[0] = lambda idxs: [i._replace(idx=63 - i.idx) for i in idxs]

    assert registered(model, turn) == (
        "model.layers.0.mlp.up_proj: it cuts other units of intermediate_size from "
        "model.layers.0.mlp.down_proj.weight (dimension 1) than from "
        "model.layers.0.mlp.gate_proj.weight (dimension 0)."
    )


def test_a_second_path_that_the_group_does_not_list() -> None:
    """Of two roots of a channel Torch-Pruning lists one, and prunes by both."""
    model = small.llama()
    down = model.model.layers[0].mlp.down_proj

    def add(graph: Any) -> None:
        (node,) = graph.module2node[down].inputs
        (dep,) = (dep for dep in node.dependencies if dep.target.module is down)
        shifted = copy.copy(dep)
        shifted.index_mapping = [lambda idxs: [i._replace(idx=(i.idx + 1) % 64) for i in idxs]]
        node.dependencies.append(shifted)

    assert registered(model, add) == (
        "model.layers.0.mlp.up_proj: what it cuts together of "
        "model.layers.0.mlp.gate_proj.weight (dimension 0) are no whole units of "
        "intermediate_size."
    )


def test_tied_layers_in_groups_of_their_own() -> None:
    """Traced without the library: the decoder is cut by what follows its own input."""
    model = small.roberta()
    pruner = tp.pruner.MetaPruner(
        model,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.25,
        **traced_kwargs(model),
    )
    with pytest.raises(UnsupportedModelError, match="27 more follow hidden_size but are not in it"):
        HFConfigSyncHook().register(pruner)


def test_heads_that_nobody_told_about() -> None:
    """BERT: single channels of heads."""
    assert refusal(small.bert(), num_heads={}, out_channel_groups={}) == (
        "encoder.layer.0.attention.self.value: it cuts different numbers of units from the 4 runs "
        "of hidden_size."
    )


def test_head_dims_that_nobody_told_about() -> None:
    """ViT, whose config sets them: single ones, of some heads."""
    model = tiny.build("vit")
    if small.TRANSFORMERS < (5,):  # its config has no head_dim: as in BERT
        assert refusal(
            model, ignored_layers=[model.classifier], num_heads={}, out_channel_groups={}
        ) == (
            "vit.encoder.layer.0.attention.attention.value: it cuts different numbers of units "
            "from the 4 runs of hidden_size."
        )
        return
    assert refusal(model, ignored_layers=[model.classifier]) == (
        "vit.layers.0.attention.v_proj: what it cuts together of "
        "vit.layers.0.attention.v_proj.weight (dimension 0) are no whole units of head_dim."
    )


def test_a_width_that_an_experiment_disproved() -> None:
    model = zoo.build("gpt_neox")
    keep = {module for name, module in model.named_modules() if name.endswith("query_key_value")}
    assert refusal(model, ignored_layers=[*keep, model.get_output_embeddings()]) == (
        "gpt_neox.layers.0.mlp.dense_4h_to_h: gpt_neox.layers.0.mlp.dense_4h_to_h.weight follows "
        "hidden_size: units are not interchangeable in "
        "gpt_neox.layers.*.attention.query_key_value.bias, "
        "gpt_neox.layers.*.attention.query_key_value.weight."
    )


HEADS = {"pruning_ratio": 0.25, "head_pruning_ratio": 0.25, "prune_num_heads": True}


def test_whole_heads_go_from_one_attention() -> None:
    """Head dims of another layer's query may go along; whole heads may not."""
    model = small.bert(num_hidden_layers=2)
    one, other = (layer.attention.self for layer in model.encoder.layer)

    def swap(graph: Any) -> None:
        exchange(graph, one.query, other.query)
        exchange(graph, one.key, other.key)

    kwargs = {**traced_kwargs(model, prune_num_heads=True), **HEADS}
    assert registered(model, swap, **kwargs) == (
        "encoder.layer.0.attention.self.value: encoder.layer.0.attention.self.query does not lose "
        "the same heads as encoder.layer.0.attention.self.value."
    )


def test_what_the_ratios_do_not_prune_may_be_wrong() -> None:
    model = small.phi3()
    hook = attached(
        model,
        out_channel_groups={},
        pruning_ratio_dict={layer.mlp.gate_up_proj: 0.0 for layer in model.model.layers},
    )
    assert hook.last_report.fields == {"head_dim": (None, 8), "hidden_size": (32, 24)}
    assert hook.last_report.notes == []


def test_a_width_without_an_experiment_is_pruned_and_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def unproved(model: Any, known: Any = None) -> tuple[Width, ...]:
        return tuple(
            Width(width.fields, reason="not tried") if width.name == "intermediate_size" else width
            for width in widths_of(model, known)
        )

    monkeypatch.setattr(tp_hf_config.graph.traced.proof, "widths_of", unproved)
    hook = attached(small.llama())
    assert hook.last_report.fields == {"hidden_size": (32, 24), "intermediate_size": (64, 48)}
    assert hook.last_report.notes == [
        "traced, not proved: model.layers.1.mlp.up_proj, model.layers.0.mlp.up_proj: "
        "intermediate_size: not tried"
    ]


class NormPruner(tp.pruner.BasePruningFunc):
    """A user's pruner of Llama's norms."""

    def prune_out_channels(self, layer: Any, idxs: Any) -> Any:
        kept = sorted(set(range(len(layer.weight))) - set(idxs))
        layer.weight = self._prune_parameter_and_grad(layer.weight, kept, 0)
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Any) -> int:
        return len(layer.weight)

    get_in_channels = get_out_channels


def test_what_a_customised_pruner_cuts_is_noted() -> None:
    norm = hf.models.llama.modeling_llama.LlamaRMSNorm
    hook = attached(small.llama(), customized_pruners={norm: NormPruner()})
    assert hook.last_report.fields == {"hidden_size": (32, 24), "intermediate_size": (64, 48)}
    assert hook.last_report.notes == [
        "traced, not proved: model.layers.1.mlp.down_proj: what is cut of a LlamaRMSNorm is not "
        "known"
    ]


def test_grouped_query_heads_are_noted() -> None:
    """Torch-Pruning takes query heads of every key/value head, and leaves those."""
    model = small.llama(hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    heads: dict[nn.Module, int] = {}
    for attention in (layer.self_attn for layer in model.model.layers):
        heads |= {attention.q_proj: 8, attention.k_proj: 4, attention.v_proj: 4}
    hook = HFConfigSyncHook(graph="trace")
    made = traced_kwargs(model)
    pruner = tp.pruner.MetaPruner(
        model,
        dict(made["example_inputs"]),  # of a pruner that pruner_kwargs was not asked about
        importance=tp.importance.GroupMagnitudeImportance(),
        output_transform=made["output_transform"],
        pruning_ratio=0.25,
        ignored_layers=[model.lm_head],
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=0.5,
        unwrapped_parameters=made["unwrapped_parameters"],
        hooks=[hook],
    )
    pruner.step()
    assert hook.last_report.notes[0] == (
        "traced, not proved: model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj: "
        "query heads are cut without the key and value heads that they share"
    )


def test_groups_are_listed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listing them is most of a constructor's time."""
    listings: list[Any] = []
    listing = tp.DependencyGraph.get_all_groups

    def counted(graph: Any, *args: Any, **kwargs: Any) -> Any:
        listings.append(graph)
        return listing(graph, *args, **kwargs)

    model = small.llama()
    arguments = traced_kwargs(model)
    monkeypatch.setattr(tp.DependencyGraph, "get_all_groups", counted)
    pruner = tp.pruner.MetaPruner(
        model,
        importance=tp.importance.GroupMagnitudeImportance(),
        hooks=[HFConfigSyncHook()],
        **arguments,
    )
    assert listings == [pruner.DG]


def test_inner_channels_may_go_one_by_one() -> None:
    """ConvNeXt's inner width is four times the stage's: experiments show its channels are free."""
    model = zoo.build("convnext")
    assert attached(model).last_report.fields == {"hidden_sizes": ([16, 24], [12, 18])}


def test_what_no_permutation_proves_is_not_left_to_the_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Groups that are linked, but not proved: an experiment's verdict too."""
    monkeypatch.setattr("tp_hf_config.graph.experiments._experiments", weakref.WeakKeyDictionary())
    monkeypatch.setattr("tp_hf_config.twin.twin_test.TwinTest.proves", lambda *_: False)
    model = zoo.build("llama")
    (width,) = (width for width in widths_of(model) if width.name == "intermediate_size")
    assert width.reason == (
        "no permutation of units is neutral in model.layers.*.mlp.down_proj.weight, "
        "model.layers.*.mlp.gate_proj.weight, model.layers.*.mlp.up_proj.weight"
    )
    with pytest.raises(UnsupportedModelError) as raised:
        pruner_kwargs(model, prune=("intermediate_size",))
    assert str(raised.value).startswith(
        f"LlamaForCausalLM cannot prune intermediate_size: {width.reason}. Widths that can: "
    )
