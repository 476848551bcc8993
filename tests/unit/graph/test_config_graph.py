"""Torch-Pruning's whole interface on the dependency graph that is made from the config."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import small
import torch
import torch_pruning as tp
import transformers as hf
from graph_cases import (
    FFN,
    HEADS,
    HIDDEN,
    KV_HEADS,
    Importance,
    Make,
    assert_consistent,
    assert_equal,
    backward,
    bert,
    cut_alone,
    cuts,
    every_model,
    every_width,
    fresh,
    gpt2,
    groups_of,
    llama,
    mixtral,
    phi3,
    pruner_of,
    run,
    shapes,
    sides,
    template,
    tokens,
)
from torch import nn
from torch_pruning.dependency import DependencyGraph

from tp_hf_config import (
    ConfigSyncError,
    HFConfigSyncHook,
    UnsupportedModelError,
    plan,
    prunable,
)
from tp_hf_config.graph.config_graph import ConfigGraph, Units

pytestmark = pytest.mark.usefixtures("every_width")

# --- construction -------------------------------------------------------------------------------


@every_model
def test_no_forward_pass_is_run(make: Make, monkeypatch: pytest.MonkeyPatch):
    model = fresh(make)

    def forward(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a forward pass")

    for module in model.modules():
        monkeypatch.setattr(module, "forward", forward, raising=False)
    pruner, hook = pruner_of(model)
    assert isinstance(pruner.DG, ConfigGraph)
    assert groups_of(pruner)
    pruner.step()
    assert hook.last_report is not None
    assert hook.last_report.fields


def test_no_forward_pass_is_run_to_prove_either():
    """The experiments are on a copy; the model itself is not called, changed or kept."""
    model = llama()
    before = small.state_of(model)
    called: list[Any] = []
    model.register_forward_pre_hook(lambda *args: called.append(args))
    pruner_of(model)
    assert not called
    small.assert_same(before, small.state_of(model))


def test_the_models_grad_mode_and_random_numbers_are_left_alone():
    model = llama()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    pruner_of(model)
    assert torch.equal(torch.rand(3), expected)
    assert torch.is_grad_enabled()


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(make: Make, dtype: torch.dtype):
    model = fresh(make).to(dtype)
    pruner, hook = pruner_of(model)
    pruner.step()
    assert hook.last_report is not None
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert_consistent(model, hook.last_report.fields)


@every_width
def test_three_steps_of_every_width(make: Make, fields: tuple[str, ...]):
    model = fresh(make)
    pruner, hook = pruner_of(model, fields, iterative_steps=3)
    for _ in range(3):
        pruner.step()
        assert shapes(type(model)(model.config)) == shapes(model)
    changed = {name for report in hook.reports for name in report.fields}
    assert set(fields) <= changed
    half = getattr(template(make).config, fields[0]) or 4 * 32
    assert getattr(model.config, fields[0]) == half // 2
    assert torch.isfinite(run(model)).all()


# --- groups -------------------------------------------------------------------------------------


@every_width
def test_a_group_is_the_same_from_every_member(make: Make, fields: tuple[str, ...]):
    pruner, _ = pruner_of(fresh(make), fields)
    graph = pruner.DG
    for whole in groups_of(pruner):
        root = whole[0].dep
        channel_groups, count = (
            whole.graph_group.count.channel_groups,
            whole.graph_group.units.count,
        )
        size = count // channel_groups
        places = {0, 2} if size > 2 else {0}
        chosen = [c * size + place for c in range(channel_groups) for place in sorted(places)]
        roots = [
            channel
            for unit in chosen
            for channel in ([unit] if isinstance(root.target.module, Units) else [])
            or whole.graph_group.root.table[unit].tolist()
        ]
        first = graph.get_pruning_group(root.target.module, root.handler, roots)
        assert first.units == chosen
        for dep, idxs in first:
            other = graph.get_pruning_group(dep.target.module, dep.handler, list(idxs))
            assert other.graph_group is whole.graph_group
            assert cuts(other) == cuts(first)
            assert other[0].dep.target.module is dep.target.module
            assert other[0].dep.handler == dep.handler
            assert sorted(other[0].idxs) == sorted(idxs)


@every_width
def test_all_groups_hold_all_units_once(make: Make, fields: tuple[str, ...]):
    model = fresh(make)
    pruner, _ = pruner_of(model, fields)
    seen: set[tuple[int, bool]] = set()
    groups = groups_of(pruner)
    for group in groups:
        assert sorted(group.units) == list(range(group.graph_group.units.count))
        assert not seen & set(cuts(group))
        seen |= set(cuts(group))
        for item in group:
            assert len(item.root_idxs) == len(item.idxs)
    assert len(groups) == len(pruner.DG.graph_groups)


@every_width
def test_a_group_may_not_be_pruned_whole(make: Make, fields: tuple[str, ...]):
    pruner, _ = pruner_of(fresh(make), fields)
    graph = pruner.DG
    for group in groups_of(pruner):
        assert graph.check_pruning_group(group) is False
        root = group[0]
        if group.graph_group.count.channel_groups == 1:
            part = graph.get_pruning_group(root.dep.target.module, root.dep.handler, root.idxs[:1])
            assert graph.check_pruning_group(part) is True


def test_a_part_of_a_head_is_refused():
    model = fresh(llama)
    pruner, _ = pruner_of(model, HEADS)
    layer = model.model.layers[0].self_attn.q_proj
    with pytest.raises(ValueError, match="q_proj"):
        pruner.DG.get_pruning_group(layer, tp.prune_linear_out_channels, [0, 1])
    group = pruner.DG.get_pruning_group(layer, tp.prune_linear_out_channels, range(8))
    assert group.units == [0]


def test_a_layer_outside_every_group_is_refused():
    model = fresh(llama)
    pruner, _ = pruner_of(model, ("intermediate_size",))
    for layer, prune in (
        (model.model.layers[0].self_attn.q_proj, tp.prune_linear_out_channels),
        (model.model.layers[0].mlp.gate_proj, tp.prune_linear_in_channels),
        (model.model.norm, tp.prune_layernorm_out_channels),
    ):
        with pytest.raises(ValueError, match="prunable"):
            pruner.DG.get_pruning_group(layer, prune, [0])


def test_positions_beyond_a_layer_are_refused():
    model = fresh(llama)
    pruner, _ = pruner_of(model, ("intermediate_size",))
    layer = model.model.layers[0].mlp.gate_proj
    for wrong in ([64], [-1], 64):
        with pytest.raises(ValueError, match="gate_proj"):
            pruner.DG.get_pruning_group(layer, tp.prune_linear_out_channels, wrong)


def test_one_number_is_one_channel():
    model = fresh(llama)
    pruner, _ = pruner_of(model, ("intermediate_size",))
    layer = model.model.layers[0].mlp.gate_proj
    group = pruner.DG.get_pruning_group(layer, tp.prune_linear_out_channels, 3)
    assert [list(item.idxs) for item in group] == [[3]] * 3


@pytest.mark.parametrize("out", [True, False])
def test_a_conv1d_is_asked_for_by_itself(out: bool):
    """GPT-2's layers are no ``nn.Linear``: their own sides have to lead to the right group."""
    model = fresh(gpt2)
    pruner, _ = pruner_of(model, ("n_embd", "n_inner"))
    layer = model.transformer.h[1].mlp.c_fc
    handler = pruner.DG.get_pruner_of_module(layer)
    prune = handler.prune_out_channels if out else handler.prune_in_channels
    group = pruner.DG.get_pruning_group(layer, prune, [5])
    assert group.graph_group.fields == ((("n_inner",),) if out else (("n_embd",),))
    cut_alone(group)
    assert layer.weight.shape == ((32, 127) if out else (31, 128))


@every_width
def test_groups_print(make: Make, fields: tuple[str, ...]):
    pruner, _ = pruner_of(fresh(make), fields)
    for group in groups_of(pruner):
        for text in (str(group), group.details()):
            assert "Pruning Group" in text
            assert len([line for line in text.splitlines() if line.startswith("[")]) == len(group)
        assert "Pruning Root" in group.details()
    print(pruner.DG.graph_groups)


@every_width
def test_pruning_by_hand(make: Make, fields: tuple[str, ...]):
    """``group.prune(idxs=...)`` with positions of the group's root."""
    model = fresh(make)
    pruner, hook = pruner_of(model, fields)
    for group in groups_of(pruner):
        root = group[0]
        count, channel_groups = (
            group.graph_group.units.count,
            group.graph_group.count.channel_groups,
        )
        size = count // channel_groups
        units = [c * size + unit for c in range(channel_groups) for unit in range(size // 2)]
        group.prune(idxs=[root.idxs[unit] for unit in units])
    (report,) = hook.reports
    assert len(report.groups) == len(pruner.DG.graph_groups)
    assert_consistent(model, report.fields)


def test_pruned_units_are_the_ones_that_were_named():
    model = fresh(llama)
    pruner, _ = pruner_of(model, HEADS)
    attention = model.model.layers[1].self_attn
    q, o = attention.q_proj.weight.detach().clone(), attention.o_proj.weight.detach().clone()
    lost = [*range(8, 16), *range(24, 32)]
    cut_alone(pruner.DG.get_pruning_group(attention.o_proj, tp.prune_linear_in_channels, lost))
    kept = [*range(8), *range(16, 24)]
    assert torch.equal(attention.q_proj.weight, q[kept])
    assert torch.equal(attention.o_proj.weight, o[:, kept])


def test_fused_gate_and_up_lose_the_same_units():
    model = fresh(phi3)
    pruner, _ = pruner_of(model, ("intermediate_size",))
    mlp = model.model.layers[0].mlp
    fused = mlp.gate_up_proj.weight.detach().clone()
    cut_alone(pruner.DG.get_pruning_group(mlp.down_proj, tp.prune_linear_in_channels, [1, 5]))
    kept = [unit for unit in range(64) if unit not in (1, 5)]
    assert torch.equal(mlp.gate_up_proj.weight, fused[kept + [64 + unit for unit in kept]])
    fused_side = mlp.gate_up_proj, tp.prune_linear_out_channels
    cut_alone(pruner.DG.get_pruning_group(*fused_side, [0, 62]))
    assert torch.equal(mlp.gate_up_proj.weight, fused[kept[1:] + [64 + unit for unit in kept[1:]]])


# --- history ------------------------------------------------------------------------------------


@every_width
@pytest.mark.parametrize("steps", [1, 2])
def test_history_prunes_a_fresh_copy_the_same(make: Make, fields: tuple[str, ...], steps: int):
    model, twin = fresh(make), fresh(make)
    pruner, _ = pruner_of(model, fields, iterative_steps=steps)
    for _ in range(steps):
        pruner.step()
    history = copy.deepcopy(pruner.pruning_history())
    assert history
    other, _ = pruner_of(twin, fields)
    other.load_pruning_history(history)
    assert_equal(model, twin)
    assert twin.config.to_dict() == model.config.to_dict()
    assert torch.equal(run(model), run(twin))


def test_history_of_all_widths_at_once():
    model, twin = fresh(llama), fresh(llama)
    fields = ("hidden_size", "intermediate_size", "num_key_value_heads")
    pruner, _ = pruner_of(model, fields)
    pruner.step()
    other, hook = pruner_of(twin, fields)
    other.load_pruning_history(copy.deepcopy(pruner.pruning_history()))
    hook.sync()
    assert_equal(model, twin)
    assert {len(entry) for entry in pruner.pruning_history()} == {3}


def test_history_can_be_left_unrecorded():
    pruner, _ = pruner_of(fresh(llama), ("intermediate_size",))
    layer = pruner.model.model.layers[0].mlp.up_proj
    group = pruner.DG.get_pruning_group(layer, tp.prune_linear_out_channels, [0])
    cut_alone(group, in_history=False)
    assert pruner.pruning_history() == []
    cut_alone(pruner.DG.get_pruning_group(layer, tp.prune_linear_out_channels, [0]))
    assert pruner.pruning_history() == [["model.layers.0.mlp.up_proj", True, [0]]]


def test_a_model_in_a_wrapper_has_full_names_in_its_history():
    class Wrapper(nn.Module):
        def __init__(self, body: Any):
            super().__init__()
            self.body = body

        def forward(self, **inputs: Any) -> Any:
            return self.body(**inputs)

    model, twin = Wrapper(fresh(llama)), Wrapper(fresh(llama))
    pruner, hook = pruner_of(model, ("intermediate_size",))
    pruner.step()
    assert all(name.startswith("body.model.") for name, *_ in pruner.pruning_history())
    assert model.body.config.intermediate_size == 32
    other, _ = pruner_of(twin, ("intermediate_size",))
    other.load_pruning_history(copy.deepcopy(pruner.pruning_history()))
    assert_equal(model, twin)
    assert hook.last_report is not None


def test_what_a_wrapper_reads_keeps_its_width():
    class Classifier(nn.Module):
        def __init__(self, body: Any):
            super().__init__()
            self.body, self.head = body, nn.Linear(body.config.hidden_size, 3)

        def forward(self, **inputs: Any) -> Any:
            return self.head(self.body(**inputs).last_hidden_state[:, 0])

    config = hf.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = Classifier(hf.BertModel(config, add_pooling_layer=False).eval())
    planned = [width.name for width in plan(model, pruning_ratio=0.5).widths]
    assert planned == ["intermediate_size"]
    pruner, _ = pruner_of(model, None)
    pruner.step()
    assert (model.body.config.hidden_size, model.body.config.intermediate_size) == (32, 24)
    assert model(input_ids=torch.ones(1, 4, dtype=torch.long)).shape == (1, 3)


# --- importances --------------------------------------------------------------------------------


def custom(group: Any) -> torch.Tensor:
    """A user's own: the norm of what the root alone holds."""
    dep, idxs = group[0]
    weight = dep.target.module.weight.detach()
    weight = weight if group._DG.is_out_channel_pruning_fn(dep.handler) else weight.T
    return weight[idxs].flatten(1).norm(dim=1)


IMPORTANCES: dict[str, Callable[[], Any]] = {
    "magnitude": Importance,
    "magnitude-l1": lambda: Importance(p=1, normalizer=None),
    "magnitude-max-normalised": lambda: Importance(normalizer="max"),
    "taylor": tp.importance.GroupTaylorImportance,
    "taylor-multivariable": lambda: tp.importance.GroupTaylorImportance(multivariable=True),
    "hessian": tp.importance.GroupHessianImportance,
    "lamp": tp.importance.LAMPImportance,
    "custom": lambda: custom,
    **{
        f"magnitude-{reduction}": lambda reduction=reduction: Importance(
            group_reduction=reduction, normalizer=None
        )
        for reduction in ("sum", "mean", "max", "prod", "first", "gate")
    },
}
every_importance = pytest.mark.parametrize("name", IMPORTANCES)


def prepared(name: str, model: Any) -> Any:
    """An importance with the gradients that it needs."""
    importance = IMPORTANCES[name]()
    backward(model)
    if name == "hessian":
        importance.zero_grad()
        importance.accumulate_grad(model)
    return importance


def by_layer(pruner: Any, part: str) -> dict[str, torch.Tensor]:
    """Importance of the FFN group of each layer, by the layer's name."""
    found = {}
    for group in groups_of(pruner):
        names = sorted(name for name, _ in sides(pruner, group) if part in name)
        if len(group.items) < 20 and names:
            found[names[0].rpartition(".")[0]] = pruner.estimate_importance(group)
    return found


@every_importance
@pytest.mark.parametrize(("make", "fields"), [(llama, HEADS), (llama, KV_HEADS), (mixtral, HEADS)])
def test_importances_of_heads_are_one_value_a_head(name: str, make: Make, fields: Any):
    model = fresh(make)
    pruner, hook = pruner_of(model, fields, importance=prepared(name, model))
    for group in groups_of(pruner):
        values = pruner.estimate_importance(group)
        assert values.shape == (group.graph_group.units.count,)
        assert torch.isfinite(values).all()
    pruner.step()
    assert hook.last_report is not None
    assert fields[0] in hook.last_report.fields


def test_importance_of_a_head_is_the_mean_of_its_channels():
    model = fresh(llama)
    importance = Importance(normalizer=None, group_reduction="sum")
    pruner, _ = pruner_of(model, HEADS, importance=importance)
    found = by_layer(pruner, "self_attn")
    assert len(found) == 2
    for name, values in found.items():
        attention = model.get_submodule(name)
        q = attention.q_proj.weight.detach().pow(2).sum(1)
        o = attention.o_proj.weight.detach().pow(2).sum(0)
        torch.testing.assert_close(values, (q + o).view(4, 8).mean(1))


def test_importance_of_a_key_value_head_counts_all_that_goes_with_it():
    model = fresh(llama)
    importance = Importance(normalizer=None, group_reduction="sum")
    pruner, _ = pruner_of(model, KV_HEADS, importance=importance)
    for name, values in by_layer(pruner, "self_attn").items():
        attention = model.get_submodule(name)
        rows = [getattr(attention, f"{n}_proj").weight.detach().pow(2).sum(1) for n in "qkv"]
        rows.append(attention.o_proj.weight.detach().pow(2).sum(0))
        expected = sum(row.view(2, -1).sum(1) for row in rows)
        torch.testing.assert_close(values / values.sum(), expected / expected.sum())


def test_importance_of_channels_that_stand_behind_others():
    """A rotary key that all heads share stands behind what they do not (latent attention)."""
    config_class = getattr(hf, "KimiLinearConfig", None)
    if config_class is None:
        pytest.skip("this Transformers has no Kimi Linear")
    config = config_class(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        mlp_layer_types=["dense", "dense"],
        num_attention_heads=2,
        num_key_value_heads=2,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        linear_num_heads=2,
        linear_head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = hf.KimiLinearForCausalLM(config).eval()
    importance = Importance(normalizer=None, group_reduction="sum")
    pruner, _ = pruner_of(model, ("qk_rope_head_dim",), importance=importance)
    (group,) = groups_of(pruner)
    attention = model.model.layers[1].self_attn
    key = attention.kv_a_proj_with_mqa.weight.detach().pow(2).sum(1)[16:]
    query = attention.q_proj.weight.detach().pow(2).sum(1).view(2, 16)[:, 8:].sum(0)
    found = pruner.estimate_importance(group)
    torch.testing.assert_close(found / found.sum(), (key + query) / (key + query).sum())
    pruner.step()
    assert model.config.qk_rope_head_dim == 4


def test_the_least_important_heads_go():
    model = fresh(llama)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[8:16] *= 0.01
        model.model.layers[0].self_attn.o_proj.weight[:, 8:16] *= 0.01
    pruner, _ = pruner_of(model, HEADS, pruning_ratio=0.5)
    pruned = {group[0].dep.target.name: group.units for group in pruner.step(interactive=True)}
    # one of the two query heads on each key/value head: the same one, as their mean says
    assert [1, 3] in pruned.values()
    assert len(pruned) == 2


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_importance_of_fused_gate_and_up(reduction: str):
    model = fresh(phi3)
    importance = Importance(normalizer=None, group_reduction=reduction)
    pruner, _ = pruner_of(model, ("intermediate_size",), importance=importance)
    for name, values in by_layer(pruner, "mlp").items():
        mlp = model.get_submodule(name)
        fused = mlp.gate_up_proj.weight.detach().pow(2).sum(1)
        down = mlp.down_proj.weight.detach().pow(2).sum(0)
        expected = fused[:64] + fused[64:] + down
        torch.testing.assert_close(values, expected / (2 if reduction == "mean" else 1))


def test_hessian_importance_of_fused_gate_and_up():
    """It sorts a layer's positions in place: their units have to follow."""
    model = fresh(phi3)
    importance = tp.importance.GroupHessianImportance(normalizer=None, group_reduction="sum")
    pruner, _ = pruner_of(model, ("intermediate_size",), importance=importance)
    backward(model)
    mlp = model.model.layers[0].mlp
    score = {
        layer: layer.weight.detach() ** 2 * layer.weight.grad
        for layer in (mlp.gate_up_proj, mlp.down_proj)
    }
    fused, down = score[mlp.gate_up_proj].sum(1), score[mlp.down_proj].sum(0)
    values = by_layer(pruner, "mlp")["model.layers.0.mlp"]
    torch.testing.assert_close(values, fused[:64] + fused[64:] + down, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "up", "down", "axes"),
    [
        pytest.param(gpt2, "c_fc.weight", "c_proj.weight", (1, 0), id="gpt2"),
        *(  # in Transformers 4 its experts are plain linear layers
            [pytest.param(mixtral, "experts.gate_up_proj", None, (), id="mixtral")]
            if small.TRANSFORMERS >= (5,)
            else []
        ),
    ],
)
def test_importance_of_what_torch_pruning_cannot_see(make: Make, up: str, down: Any, axes: Any):
    """Conv1D weights stand the other way round; experts have three dimensions."""
    model = fresh(make)
    importance = Importance(normalizer=None, group_reduction="sum")
    pruner, _ = pruner_of(model, (FFN[make],), importance=importance)
    found = [pruner.estimate_importance(group) for group in groups_of(pruner)]
    expected = []
    for name, module in model.named_modules():
        if not name.endswith(".mlp"):
            continue
        first = module.get_parameter(up).detach().pow(2)
        if down:
            bias = module.get_parameter("c_fc.bias").detach().pow(2)
            last = module.get_parameter(down).detach().pow(2)
            options = [first.sum(0) + last.sum(1), first.sum(0) + last.sum(1) + bias]
        else:
            last = module.get_parameter("experts.down_proj").detach().pow(2).sum((0, 1))
            rows = first.sum((0, 2))
            options = [rows[:48] + rows[48:] + last]
        expected.append(options)
    assert len(expected) == len(found) == 2
    for options in expected:
        assert any(
            torch.allclose(values, option, rtol=1e-4) for values in found for option in options
        )


def test_random_importance():
    model = fresh(llama)
    pruner, hook = pruner_of(model, HEADS, importance=tp.importance.RandomImportance())
    pruner.step()
    assert hook.last_report is not None
    assert hook.last_report.fields == {"num_attention_heads": (4, 2)}


def test_an_importance_of_nothing_prunes_nothing():
    """BN scale on a model without batch norms, a user's own that returns None."""
    for importance in (tp.importance.BNScaleImportance(), lambda group: None):
        for fields in (HEADS, ("intermediate_size",)):
            model = fresh(llama)
            before = shapes(model)
            pruner, hook = pruner_of(model, fields, importance=importance)
            pruner.step()
            assert shapes(model) == before
            assert hook.last_report is not None
            assert hook.last_report.fields == {}


# --- what to keep, and how much to take ---------------------------------------------------------


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_ignored_projections_keep_all_heads(name: str):
    model = fresh(llama)
    kept = [layer.self_attn.get_submodule(name) for layer in model.model.layers]
    fields = (*KV_HEADS, "intermediate_size")
    pruner, hook = pruner_of(model, fields, ignored_layers=kept)
    pruner.step()
    assert hook.last_report is not None
    assert hook.last_report.fields == {"intermediate_size": (64, 32)}


def test_a_layer_that_only_reads_does_not_keep_a_group():
    """As in Torch-Pruning: what is ignored keeps its outputs, not its inputs."""
    model = fresh(llama)
    kept = [layer.mlp.down_proj for layer in model.model.layers]
    pruner, hook = pruner_of(model, ("hidden_size", "intermediate_size"), ignored_layers=kept)
    pruner.step()
    assert hook.last_report is not None
    assert hook.last_report.fields == {"intermediate_size": (64, 32)}


@pytest.mark.parametrize("make", [gpt2, mixtral])
def test_ignored_layers_that_torch_pruning_does_not_know(make: Make):
    model = fresh(make)
    before = shapes(model)
    blocks = ("mlp", "block_sparse_moe")
    kept = [module for name, module in model.named_modules() if name.endswith(blocks)]
    pruner, hook = pruner_of(model, (FFN[make],), ignored_layers=kept)
    pruner.step()
    assert shapes(model) == before
    assert hook.last_report is not None
    assert hook.last_report.groups == []


def test_layers_of_one_field_that_differ_are_an_error():
    model = fresh(llama)
    pruner, hook = pruner_of(model, ("intermediate_size",))
    for number, layer in enumerate((model.model.layers[1].mlp, model.model.layers[0].mlp)):
        pruner.DG.get_pruning_group(
            layer.up_proj, tp.prune_linear_out_channels, list(range(32))
        ).prune()
        if not number:  # by hand, one layer after the other: the error stays
            with pytest.raises(ConfigSyncError, match="intermediate_size") as caught:
                hook.sync()
            assert set(caught.value.conflicts["intermediate_size"]) == {32, 64}
            assert model.config.intermediate_size == 64
            assert hook.last_report is not None
            assert hook.last_report.error
    assert hook.last_report.fields == {"intermediate_size": (64, 32)}


def test_ratios_by_module():
    model = fresh(llama)
    layers = model.model.layers
    ratios = {layer.mlp.gate_proj: 0.25 for layer in layers}
    pruner, hook = pruner_of(model, ("hidden_size", "intermediate_size"), pruning_ratio_dict=ratios)
    pruner.step()
    assert hook.last_report is not None
    assert hook.last_report.fields == {"hidden_size": (32, 16), "intermediate_size": (64, 48)}


def test_ratios_by_tuple():
    model = fresh(llama)
    key = tuple(layer.mlp.up_proj for layer in model.model.layers)
    pruner, hook = pruner_of(
        model, ("hidden_size", "intermediate_size"), pruning_ratio_dict={key: 0.25}
    )
    pruner.step()
    assert hook.last_report is not None
    assert hook.last_report.fields == {"hidden_size": (32, 16), "intermediate_size": (64, 48)}


@every_model
def test_ratios_by_field(make: Make):
    model = fresh(make)
    ffn, hidden = FFN[make], HIDDEN[make]
    size = getattr(model.config, ffn) or 128
    pruner, hook = pruner_of(model, (hidden, ffn), ratios={ffn: 0.25})
    pruner.step()
    assert hook.last_report is not None
    assert getattr(model.config, hidden) == 16
    assert getattr(model.config, ffn) == size * 3 // 4


@every_model
def test_ratios_of_two_fields(make: Make):
    model = fresh(make)
    ffn, hidden = FFN[make], HIDDEN[make]
    size = getattr(model.config, ffn) or 128
    pruner, hook = pruner_of(model, None, ratios={hidden: 0.5, ffn: 0.25}, pruning_ratio=0.0)
    pruner.step()
    assert hook.last_report is not None
    assert getattr(model.config, hidden) == 16
    assert getattr(model.config, ffn) == size * 3 // 4


def test_ratios_of_heads():
    model = fresh(llama)
    fields = ("intermediate_size", "num_attention_heads")
    pruner, hook = pruner_of(model, fields, ratios={"num_attention_heads": 0.5}, pruning_ratio=0.25)
    pruner.step()
    assert hook.last_report is not None
    assert hook.last_report.fields == {
        "intermediate_size": (64, 48),
        "num_attention_heads": (4, 2),
    }
    model = fresh(llama)
    pruner, hook = pruner_of(model, fields, ratios={"num_attention_heads": 0.0}, pruning_ratio=0.25)
    pruner.step()
    assert hook.last_report is not None
    assert hook.last_report.fields == {"intermediate_size": (64, 48)}


def test_ratios_of_a_field_that_is_not_pruned():
    with pytest.raises(UnsupportedModelError, match="hidden_size"):
        pruner_of(fresh(llama), ("intermediate_size",), ratios={"hidden_size": 0.1})


@pytest.mark.parametrize("make", [llama, bert, mixtral])
def test_heads_and_hidden_size_together(make: Make):
    fields = ("hidden_size", "num_key_value_heads", "intermediate_size")
    if make is bert:  # its heads follow from its hidden size
        fields = ("hidden_size", "intermediate_size")
    model = fresh(make)
    pruner, hook = pruner_of(model, fields)
    pruner.step()
    assert hook.last_report is not None
    assert set(fields) <= set(hook.last_report.fields)
    assert_consistent(model, hook.last_report.fields)


def test_max_pruning_ratio():
    model = fresh(llama)
    fields = (*HEADS, "intermediate_size")
    pruner, hook = pruner_of(
        model, fields, pruning_ratio=0.75, max_pruning_ratio=0.5, iterative_steps=3
    )
    for _ in range(3):
        pruner.step()
    assert model.config.intermediate_size <= 64
    assert model.config.num_attention_heads >= 1
    gates = [layer.mlp.gate_proj for layer in model.model.layers]
    assert all(pruner.get_target_pruning_ratio(gate) == 0.5 for gate in gates)
    # a group at or past its maximum is left alone, as Torch-Pruning does
    assert {gate.out_features for gate in gates} == {model.config.intermediate_size}
    assert hook.reports[-1].error is None


@pytest.mark.parametrize(("round_to", "left"), [(None, 44), (8, 40), (16, 32)])
def test_round_to(round_to: int | None, left: int):
    model = fresh(llama)
    pruner, _ = pruner_of(model, ("intermediate_size",), pruning_ratio=0.3, round_to=round_to)
    pruner.step()
    assert model.config.intermediate_size == left


def test_global_pruning_ranks_all_units_of_one_group():
    """Hidden size is one group: ranked globally or locally, the same units go."""
    models = [fresh(llama), fresh(llama)]
    for model, everywhere in zip(models, (False, True), strict=True):
        pruner, _ = pruner_of(model, ("hidden_size",), global_pruning=everywhere)
        pruner.step()
    assert_equal(*models)


@pytest.mark.parametrize("isomorphic", [False, True])
def test_global_pruning_over_layers_of_one_field_is_an_error(isomorphic: bool):
    """Every layer would get a width of its own; the config has one number."""
    model = fresh(llama)
    before = shapes(model)
    with pytest.raises(ConfigSyncError, match="the 2 groups of intermediate_size are ranked"):
        pruner_of(model, None, global_pruning=True, isomorphic=isomorphic)
    assert shapes(model) == before


def test_isomorphic_ranks_alike_groups_together():
    """Alone among groups of its kind, the hidden size is ranked by itself."""
    model = fresh(llama)
    pruner, hook = pruner_of(model, ("hidden_size",), isomorphic=True, global_pruning=True)
    pruner.step()
    assert hook.last_report is not None
    assert hook.last_report.fields == {"hidden_size": (32, 16)}


def test_a_scheduler_of_the_users_own():
    model = fresh(llama)
    pruner, hook = pruner_of(
        model,
        ("intermediate_size",),
        iterative_steps=3,
        iterative_pruning_ratio_scheduler=lambda ratio, steps: [0, 0.25, 0.25, ratio],
    )
    widths = []
    for _ in range(3):
        pruner.step()
        widths.append(model.config.intermediate_size)
    assert widths == [48, 48, 32]
    assert [len(report.groups) for report in hook.reports] == [2, 0, 2]


def test_interactive_steps_can_leave_a_group_out():
    model = fresh(llama)
    pruner, hook = pruner_of(model)
    fields = []
    for group in pruner.step(interactive=True):
        fields.append(group.graph_group.fields)
        if group.graph_group.fields == (("intermediate_size",),):
            group.prune()
    assert len(fields) == 3
    assert model.config.intermediate_size == 32
    assert model.config.hidden_size == 32
    assert hook.last_report is not None
    assert hook.last_report.fields == {"intermediate_size": (64, 32)}


def test_manual_prune_width():
    model = fresh(llama)
    pruner, hook = pruner_of(model, ("intermediate_size",))
    for layer in model.model.layers:
        pruner.manual_prune_width(layer.mlp.gate_proj, tp.prune_linear_out_channels, 0.75)
    assert hook.last_report.fields == {"intermediate_size": (64, 48)}


# --- sparse training ----------------------------------------------------------------------------


def members(pruner: Any) -> set[str]:
    """Names of the parameters in a pruner's groups that regularisers know: weights, no tables."""
    names = {p: name for name, p in pruner.model.named_parameters()}
    result = set()
    for graph_group in pruner.DG.graph_groups:
        for side in graph_group.sides:
            if isinstance(side.module, nn.Embedding):
                continue
            for dim in side.dims:
                parameter = pruner.model.get_parameter(dim.name)
                if not dim.name.endswith("bias"):
                    result.add(names[parameter])
    return result


@every_width
@pytest.mark.parametrize("cls", [tp.pruner.GroupNormPruner, tp.pruner.GrowingRegPruner])
def test_regularisers_change_gradients_of_their_groups_only(
    cls: Any, make: Make, fields: tuple[str, ...]
):
    model = fresh(make)
    pruner, hook = pruner_of(model, fields, cls, reg=0.1, iterative_steps=2)
    backward(model)
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    if cls is tp.pruner.GrowingRegPruner:
        pruner.update_reg()
    pruner.regularize(model)
    changed = {
        name
        for name, grad in before.items()
        if not torch.equal(model.get_parameter(name).grad, grad)
    }
    expected = members(pruner) & before.keys()
    norms = {name for name in expected if model.get_parameter(name).ndim == 1}
    assert changed <= expected
    assert changed >= expected - norms  # Torch-Pruning's regularisers leave layer norms alone
    for _ in range(2):
        pruner.step()
        pruner.update_regularizer()
        backward(model)
        pruner.regularize(model)
    assert fields[0] in {name for report in hook.reports for name in report.fields}
    assert shapes(type(model)(model.config)) == shapes(model)


def test_growing_regularisation_is_one_value_a_unit():
    for fields, count in ((HEADS, 4), (KV_HEADS, 2), (("intermediate_size",), 64)):
        pruner, _ = pruner_of(fresh(llama), fields, tp.pruner.GrowingRegPruner)
        pruner.update_reg()
        assert {len(values) for values in pruner.group_reg.values()} == {count}
        assert all(
            float(values.max()) > float(values.min()) for values in pruner.group_reg.values()
        )


def test_regularised_values_of_a_head():
    model = fresh(llama)
    pruner, _ = pruner_of(model, HEADS, tp.pruner.GrowingRegPruner, reg=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    pruner.regularize(model)
    attention = model.model.layers[0].self_attn
    for layer in (attention.q_proj, attention.o_proj):
        torch.testing.assert_close(layer.weight.grad, 0.5 * layer.weight.detach())
    assert not attention.k_proj.weight.grad.any()
    assert not model.model.layers[0].mlp.gate_proj.weight.grad.any()


# --- gradients, frozen parameters, pruners as they were -----------------------------------------


@every_width
def test_gradients_are_cut_with_their_weights(make: Make, fields: tuple[str, ...]):
    """A parameter's gradient is a copy of it here, so both have to end up the same."""
    model = fresh(make)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    pruner, _ = pruner_of(model, fields)
    pruner.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, parameter.detach()), name


@every_width
def test_frozen_parameters_stay_frozen(make: Make, fields: tuple[str, ...]):
    model = fresh(make)
    wanted = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        parameter.requires_grad_(number % 3 == 0)
        wanted[name] = number % 3 == 0
    pruner, _ = pruner_of(model, fields)
    pruner.step()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted


def test_without_its_hook_a_pruner_prunes_nothing():
    model = fresh(llama)
    pruner, hook = pruner_of(model)
    hook.detach(pruner)
    with pytest.raises(UnsupportedModelError, match=r"hook\.register\(pruner\)"):
        tp.pruner.BasePruner.step(pruner)
    with pytest.raises(UnsupportedModelError, match="Nothing was pruned"):
        groups_of(pruner)[0].prune()
    assert_equal(model, template(llama))


def test_an_importance_method_of_the_users_own_is_asked():
    pruner, _ = pruner_of(fresh(llama), HEADS)
    calls: list[Any] = []

    def mine(group: Any) -> Any:
        calls.append(group)
        return pruner.importance(group)

    pruner.estimate_importance = mine
    pruner.step()
    assert len(calls) == len(groups_of(pruner))
    assert pruner.estimate_importance is mine


def test_constructing_leaves_torch_pruning_as_it_was():
    from torch_pruning import dependency
    from torch_pruning.pruner.algorithms import base_pruner

    pruner_of(fresh(llama))
    assert base_pruner.dependency is dependency
    with pytest.raises(TypeError):
        pruner_of(fresh(llama), no_such_argument=1)
    assert base_pruner.dependency is dependency
    assert base_pruner.dependency.DependencyGraph is DependencyGraph


def test_two_pruners_share_nothing():
    one, two = fresh(llama), fresh(llama)
    first, _ = pruner_of(one)
    second, _ = pruner_of(two)
    first.step()
    assert shapes(two) == shapes(template(llama))
    assert second.pruning_history() == []
    second.step()
    assert_equal(one, two)


# --- which graph --------------------------------------------------------------------------------


@every_model
def test_the_report_says_which_graph(make: Make):
    model = fresh(make)
    pruner, hook = pruner_of(model)
    assert isinstance(pruner.DG, ConfigGraph)
    pruner.step()
    assert hook.last_report is not None
    assert hook.last_report.graph.startswith("config graph")
    assert "permutation" in hook.last_report.graph
    assert hook.last_report.to_dict()["graph"] == hook.last_report.graph


def test_head_ratios_are_for_heads_and_the_others_for_the_rest():
    """BERT's heads can only go with the hidden size; the FFN follows ``pruning_ratio``."""
    model = fresh(bert)
    hook = HFConfigSyncHook()
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=Importance(),
        prune_num_heads=True,
        pruning_ratio=0.25,
        head_pruning_ratio=0.5,
        hooks=[hook],
    )
    heads, hidden, ffn = (
        getattr(model.config, key)
        for key in ("num_attention_heads", "hidden_size", "intermediate_size")
    )
    pruner.step()
    assert hook.last_report is not None
    assert hook.last_report.graph.endswith("heads: whole heads, and hidden_size with them")
    assert hook.last_report.fields == {
        "num_attention_heads": (heads, heads // 2),
        "hidden_size": (hidden, hidden // 2),
        "intermediate_size": (ffn, ffn * 3 // 4),
    }
    assert set(pruner.num_heads.values()) == {heads // 2}


def neox() -> Any:
    torch.manual_seed(0)
    return hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()


def test_hidden_size_goes_with_whole_heads_where_head_dims_rotate():
    """GPT-NeoX's head dim is hidden / heads, and its dims are rotated: not interchangeable."""
    widths = {width.name: width.reason for width in prunable(fresh(neox)).widths}
    assert str(widths["hidden_size"]).startswith("units are not interchangeable in gpt_neox.layers")
    model = fresh(neox)
    pruner, hook = pruner_of(model, fields=("hidden_size",))
    pruner.step()
    assert hook.last_report is not None
    assert hook.last_report.fields == {"hidden_size": (32, 16), "num_attention_heads": (4, 2)}


def test_what_can_be_pruned_is_pruned_where_another_width_cannot():
    model = fresh(neox)
    pruner, hook = pruner_of(model)
    pruner.step()
    assert hook.last_report is not None
    assert hook.last_report.graph.startswith("config graph")
    assert hook.last_report.fields == {"intermediate_size": (64, 32)}


def test_unknown_fields_are_refused():
    with pytest.raises(UnsupportedModelError, match="no_such_field"):
        pruner_of(fresh(llama), ("no_such_field",))


def test_a_hook_needs_no_settings():
    model = fresh(llama)
    hook = HFConfigSyncHook()
    pruner = tp.pruner.MetaPruner(
        model,
        {"input_ids": tokens()},
        importance=Importance(),
        pruning_ratio=0.5,
        round_to=4,
        hooks=[hook],
    )
    assert isinstance(pruner.DG, ConfigGraph)
    pruner.step()
    report = hook.last_report
    assert report is not None
    assert report.graph.startswith("config graph")
    assert report.fields == {"hidden_size": (32, 16), "intermediate_size": (64, 32)}


def test_transposed_layers_are_in_their_groups():
    """GPT-2's Conv1D: each group names both of its layers."""
    pruner, _ = pruner_of(fresh(gpt2), ("n_inner",))
    groups = groups_of(pruner)
    names = [{name for name, _ in sides(pruner, group)} for group in groups]
    expected = [{f"transformer.h.{i}.mlp.c_{part}" for part in ("fc", "proj")} for i in range(2)]
    assert sorted(map(sorted, names)) == sorted(map(sorted, expected))
    assert all("c_fc" in str(group) and "c_proj" in str(group) for group in groups)


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
def test_a_group_of_layers_that_no_importance_looks_at_goes_by_size(norm: str):
    # relative attention without its kinds of positions: an embedding as wide that nothing reads
    torch.manual_seed(0)
    config = hf.DebertaV2Config(
        vocab_size=24,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        relative_attention=True,
        pos_att_type=None,
        norm_rel_ebd=norm,
    )
    model = hf.DebertaV2Model(config).eval()
    table = model.encoder.rel_embeddings.weight.detach().clone()
    hook = HFConfigSyncHook(prune=("hidden_size",))
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=Importance(),
        pruning_ratio=0.5,
        iterative_steps=2,
        hooks=[hook],
    )
    pruner.step()
    pruner.step()
    assert model.config.hidden_size == 16
    left = model.encoder.rel_embeddings.weight
    assert left.shape == (1024, 16)
    largest = table.norm(dim=0).topk(16).indices.sort().values
    assert torch.equal(left, table[:, largest])
