"""Importances made of what is read: their formulas, heads, experts, and plain PyTorch models."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import calibrated
import pytest
import small
import torch
import torch_pruning as tp
import zoo
from torch import nn

from tp_hf_config import CalibrationWarning, HFConfigSyncHook, calibrate
from tp_hf_config.calibration.linear_ops import Consumer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::tp_hf_config.CalibrationWarning"),
]


def values_of(model: Any, importance: Any, **settings: Any) -> list[torch.Tensor]:
    """What a pruner gets of an importance, group by group."""
    arguments = {"importance": importance, "pruning_ratio": 0.5, **settings}
    pruner = calibrated.pruner_of(model, **arguments)
    groups = pruner.DG.get_all_groups()
    return [pruner.estimate_importance(group) for group in groups]


def expected_of(calibration: Any, model: Any, kind: str) -> list[torch.Tensor]:
    """The formulas, written down once more."""
    result = []
    for number in range(2):
        weight = model.model.layers[number].mlp.down_proj.weight
        consumer = Consumer(f"model.layers.{number}.mlp.down_proj.weight", 1)
        statistics = calibration.readings.of(consumer)
        norms, columns = statistics.norms, weight.detach().double().norm(dim=0)
        result.append(
            {
                "wanda": norms * columns,
                "activation": norms,
            }[kind].float()
        )
    return result


@pytest.mark.parametrize("kind", ["wanda", "activation"])
def test_channels_of_a_feed_forward_are_ranked_by_the_formula(kind: str) -> None:
    model = zoo.build("llama")
    calibration = calibrate(model, calibrated.batches(model, 10))
    importance = calibration.importance(kind, normalizer=None)
    found = values_of(model, importance, prune="intermediate_size")
    for values, expected in zip(found, expected_of(calibration, model, kind), strict=True):
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-6)


def test_a_head_counts_all_its_channels() -> None:
    """Key/value groups: two query heads of twelve dimensions each, read by the output weight."""
    model = zoo.build("qwen3")
    calibration = calibrate(model, calibrated.batches(model, 10))
    importance = calibration.importance("wanda", normalizer=None)
    found = values_of(model, importance, prune=(), gqa="group", head_pruning_ratio=0.5)
    for number, values in enumerate(found):
        name = f"model.layers.{number}.self_attn.o_proj.weight"
        statistics = calibration.readings.of(Consumer(name, 1))
        assert statistics is not None
        weight = model.get_parameter(name).detach().double()
        channels = (statistics.norms * weight.norm(dim=0)).view(2, -1)
        torch.testing.assert_close(values, channels.sum(1).float(), rtol=1e-4, atol=1e-6)


HEADS: dict[str, Any] = {"prune": (), "gqa": "group", "head_pruning_ratio": 0.5}


def test_a_head_counts_what_the_outputs_lose_without_it() -> None:
    """The gradients, taken by hooks on the layers, with the same sampled tokens."""
    model = zoo.build("qwen3")
    data = calibrated.batches(model, 10)
    calibration = calibrate(model, data)
    found = values_of(model, calibration.importance("curvature", normalizer=None), **HEADS)
    read: dict[str, torch.Tensor] = {}
    layers = [(f"model.layers.{n}.self_attn.o_proj", layer) for n, layer in enumerate(found)]
    for name, _ in layers:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, name=name: read.update({name: args[0]}))
    generator = torch.Generator().manual_seed(0)
    products = {name: torch.zeros(48, 48) for name, _ in layers}
    tokens = 0
    for batch in calibration.train:
        for ids in batch["input_ids"].split(1):
            logits = model(input_ids=ids, use_cache=False).logits[0]
            sampled = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
            loss = nn.functional.cross_entropy(logits, sampled[:, 0], reduction="sum")
            for name, gradient in zip(
                read, torch.autograd.grad(loss, [*read.values()]), strict=True
            ):
                products[name] += gradient[0].T @ gradient[0]
            tokens += ids.numel()
    for name, values in layers:
        statistics = calibration.readings.of(Consumer(f"{name}.weight", 1))
        assert statistics is not None
        assert statistics.gram is not None
        lost = statistics.gram * products[name] / tokens
        expected = torch.stack([lost[:24, :24].sum(), lost[24:, 24:].sum()])
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-9)


def test_each_kind_of_width_has_a_score_of_its_own_by_default() -> None:
    model = zoo.build("qwen3")
    calibration = calibrate(model, calibrated.batches(model, 10))
    for kind, settings in (("curvature", HEADS), ("activation", {"prune": "intermediate_size"})):
        importance = calibration.importance()
        found = values_of(model, importance, **settings)
        assert importance.used == {kind}
        expected = values_of(model, calibration.importance(kind), **settings)  # type: ignore[arg-type]
        assert all(map(torch.equal, found, expected))
    alone = calibrate(model, calibrated.batches(model, 10), refits=False).importance()
    values_of(model, alone, **HEADS)
    assert alone.used == {"activation"}


def test_the_report_names_what_ranked_units() -> None:
    model = zoo.build("qwen3")
    calibration = calibrate(model, calibrated.batches(model, 10))
    hook = HFConfigSyncHook(gqa="group", prune=())
    importance = calibration.importance()
    calibrated.pruner_of(model, hook, importance=importance, head_pruning_ratio=0.5).step()
    assert hook.last_report.ranked_by == ["curvature"]
    assert "ranked by curvature" in hook.last_report.text(full=True)
    assert json.loads(json.dumps(hook.last_report.to_dict()))["ranked_by"] == ["curvature"]


def test_gradients_change_nothing_of_a_model() -> None:
    """One without logits, in training mode, some of whose weights are frozen."""
    whole = zoo.build("qwen3")
    model = whole.model.train()
    model.embed_tokens.requires_grad_(False)
    calibration = calibrate(model, calibrated.batches(whole, 10))
    state = torch.get_rng_state()
    importance = calibration.importance("curvature")
    values = values_of(model, importance, **HEADS)
    assert importance.used == {"curvature"}
    assert all(bool((each > 0).all()) for each in values)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_without_gradients_is_ranked_otherwise_and_says_so() -> None:
    model = zoo.build("qwen3")
    calibration = calibrate(model, calibrated.batches(model, 10))
    model.model.forward = torch.no_grad()(model.model.forward)
    model.lm_head.requires_grad_(False)
    importance = calibration.importance()
    with pytest.warns(CalibrationWarning, match="gradients cannot be measured .* heads are ranked"):
        found = values_of(model, importance, **HEADS)
    assert importance.used == {"activation"}
    assert all(
        map(torch.equal, found, values_of(model, calibration.importance("activation"), **HEADS))
    )
    with pytest.raises(RuntimeError, match="does not require grad"):
        values_of(model, calibration.importance("curvature"), **HEADS)


def test_hidden_channels_count_all_that_read_them() -> None:
    model = zoo.build("llama")
    calibration = calibrate(model, calibrated.batches(model, 10))
    importance = calibration.importance("wanda", normalizer=None)
    (values,) = values_of(model, importance, prune="hidden_size")
    total = torch.zeros(64, dtype=torch.float64)
    for consumer in calibration.readings.leaders:
        weight = model.get_parameter(consumer.parameter).detach().double()
        if not consumer.parameter.endswith(("o_proj.weight", "down_proj.weight")):
            statistics = calibration.readings.of(consumer)
            assert statistics is not None
            total += statistics.norms * weight.norm(dim=0)
    torch.testing.assert_close(values, total.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(small.TRANSFORMERS < (5,), reason="Transformers 4 has a module for each expert")
def test_experts_count_together() -> None:
    model = zoo.build("mixtral")
    calibration = calibrate(model, calibrated.batches(model, 10))
    importance = calibration.importance("wanda", normalizer=None)
    found = values_of(model, importance, prune="intermediate_size")
    name = "model.layers.0.mlp.experts.down_proj"
    expected = torch.zeros(96, dtype=torch.float64)
    for part in range(4):
        statistics = calibration.readings.of(Consumer(name, 2, part))
        assert statistics is not None
        weight = model.get_parameter(name)[part].detach().double()
        expected += statistics.norms * weight.norm(dim=0)
    torch.testing.assert_close(found[0], expected.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(small.TRANSFORMERS < (5,), reason="Transformers 4 has a module for each expert")
@pytest.mark.parametrize("matrices", [4.2, 2])
def test_products_are_wanted_of_all_that_read_a_group(matrices: float) -> None:
    """Two or three experts' Gram matrices are there: another pass measures all, if they fit."""
    values = []
    for memory in (None, int(matrices * 4 * 96 * 96)):
        model = zoo.build("mixtral")
        data = calibrated.batches(model, 10)
        calibration = calibrate(model, data, max_memory=memory)
        leader = Consumer("model.layers.0.mlp.experts.down_proj", 2, 0)
        assert calibration.readings.statistics[leader].gram is not None
        short = memory is not None and matrices < 4
        message = r'experts.down_proj and other weights read .* it is ranked by "activation", not'
        warned = pytest.warns(CalibrationWarning, match=message)
        importance = calibration.importance("curvature", normalizer=None)
        with warned if short else contextlib.nullcontext():
            values.append(values_of(model, importance, prune="intermediate_size"))
    if matrices < 4:
        other = calibration.importance("activation", normalizer=None)
        values[0] = values_of(model, other, prune="intermediate_size")
    assert all(map(torch.equal, *values))


def test_groups_that_nothing_reads_are_ranked_by_magnitude() -> None:
    model = zoo.build("llama")
    calibration = calibrate(model, calibrated.batches(model, 10))
    calibration.readings.leaders.clear()  # as of layers that the data never reached
    arguments = {"prune": "intermediate_size", "pruning_ratio": 0.5}
    with pytest.warns(CalibrationWarning, match="no measured weight reads the output of this"):
        values = values_of(model, calibration.importance(), **arguments)
    plain = values_of(
        model, tp.importance.GroupMagnitudeImportance(group_reduction="sum"), **arguments
    )
    for first, second in zip(values, plain, strict=True):
        assert first.argsort().tolist() == second.argsort().tolist()


def test_queries_and_keys_are_ranked_by_the_product_of_their_norms() -> None:
    model = zoo.build("bert")
    calibration = calibrate(model, calibrated.batches(model, 10))
    importance = calibration.importance(normalizer=None)
    found = values_of(model, importance, prune="hidden_size")
    squares: dict[nn.Module, Any] = {}
    layers = [layer.attention.self for layer in model.bert.encoder.layer]
    for linear in (part for layer in layers for part in (layer.query, layer.key)):
        linear.register_forward_hook(
            lambda linear, args, output: squares.update(
                {linear: squares.get(linear, 0) + output.flatten(0, -2).double().square().sum(0)}
            )
        )
    with torch.no_grad():
        for batch in calibration.train:
            model(**batch)
    for layer in layers:
        wanted = (squares[layer.query] * squares[layer.key]).sqrt().float()
        same = [values for values in found if torch.allclose(values, wanted, rtol=1e-4)]
        assert len(same) == 1


class Net(nn.Module):
    """Convolutions, a norm and a head: a plain PyTorch model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 12, 3, padding=1)
        self.head = nn.Linear(12 * 4, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(images)))
        x = torch.relu(self.second(x))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def test_plain_models_with_traced_groups() -> None:
    model = Net().eval()
    calibration = calibrate(model, [torch.rand(4, 3, 8, 8) for _ in range(8)])
    pruner = tp.pruner.MetaPruner(
        model,
        torch.rand(1, 3, 8, 8),
        importance=calibration.importance(),
        pruning_ratio=0.5,
        ignored_layers=[model.head],
    )
    statistics = calibration.readings.of(Consumer("second.weight", 1))
    head = calibration.readings.of(Consumer("head.weight", 1))
    assert statistics is not None
    assert head is not None
    columns = model.second.weight.detach().flatten(2).norm(dim=(0, 2))
    first = statistics.norms * columns
    second = (head.norms * model.head.weight.detach().norm(dim=0)).view(12, 4).sum(1)
    kept = [
        values.argsort(descending=True)[: len(values) // 2].sort().values
        for values in (first, second)
    ]
    weights = model.first.weight[kept[0]].clone(), model.second.weight[kept[1]][:, kept[0]].clone()
    pruner.step()
    assert torch.equal(model.first.weight, weights[0])
    assert torch.equal(model.second.weight, weights[1])


def test_unknown_kinds_are_refused() -> None:
    model = zoo.build("llama")
    calibration = calibrate(model, calibrated.batches(model, 1))
    with pytest.raises(ValueError, match=r"^kind='best': expected 'auto' or 'wanda' or"):
        calibration.importance("best")  # type: ignore[arg-type]


def test_it_is_an_importance_of_torch_pruning() -> None:
    model = zoo.build("llama")
    importance = calibrate(model, calibrated.batches(model, 1)).importance("activation")
    assert isinstance(importance, tp.importance.Importance)
    tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        pruning_ratio=0.25,
        importance=importance,
        hooks=[HFConfigSyncHook(prune="inner")],
    ).step()
    assert model.config.intermediate_size == 72
