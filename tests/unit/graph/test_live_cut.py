"""A step copies every parameter once, and changes nothing else by it."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Any

import pytest
import small
import torch
import torch_pruning as tp
from graph_cases import (
    FFN,
    HIDDEN,
    assert_equal,
    backward,
    every_model,
    fresh,
    groups_of,
    llama,
    pruner_of,
    shapes,
)
from torch import nn
from torch_pruning.pruner.function import BasePruningFunc

from tp_hf_config.graph import cut_list
from tp_hf_config.model import tensors

BOTH = ("intermediate_size", "hidden_size")


def tied() -> Any:
    return small.llama(num_key_value_heads=2, tie_word_embeddings=True)


def widths(make: Any) -> tuple[str, str]:
    return FFN[make], HIDDEN[make]


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often the values at an address were copied; by Torch-Pruning, never."""
    count: Counter[int] = Counter()
    select = cut_list.select

    def counting(tensor: torch.Tensor, kept: Any) -> torch.Tensor:
        count[tensor.data_ptr()] += 1
        return select(tensor, kept)

    def never(*args: Any) -> None:
        raise AssertionError("Torch-Pruning copies a parameter")

    monkeypatch.setattr(cut_list, "select", counting)
    monkeypatch.setattr(BasePruningFunc, "_prune_parameter_and_grad", never)
    return count


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException, once: bool) -> None:
    """Copies fail from the third on, or the third alone."""
    calls = iter(range(10_000))
    select = cut_list.select

    def interrupted(tensor: torch.Tensor, kept: Any) -> torch.Tensor:
        number = next(calls)
        if number == 2 or (number > 2 and not once):
            raise error
        return select(tensor, kept)

    monkeypatch.setattr(cut_list, "select", interrupted)


def test_a_step_copies_every_parameter_once(copied: Counter[int]):
    model = fresh(tied)
    pruner, hook = pruner_of(model, BOTH)
    before = {p.data_ptr(): p.shape for p in model.parameters()}
    names = {name: p.data_ptr() for name, p in model.named_parameters()}
    pruner.step()
    assert copied == dict.fromkeys(before, 1)  # hidden and FFN: no parameter is left out
    gate = names["model.layers.0.mlp.gate_proj.weight"]
    after = model.model.layers[0].mlp.gate_proj.weight.shape
    assert all(new < old for new, old in zip(after, before[gate], strict=True))  # both sides
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert hook.last_report.ties == []  # they never came apart


def test_groups_of_an_interactive_step_are_cut_when_it_ends(copied: Counter[int]):
    model = fresh(tied)
    pruner, _ = pruner_of(model, BOTH)
    gate = model.model.layers[0].mlp.gate_proj
    before = {p.data_ptr(): p.shape for p in model.parameters()}
    for group in pruner.step(interactive=True):
        group.prune()
        assert (gate.out_features, gate.in_features, tuple(gate.weight.shape)) == (64, 32, (64, 32))
    assert (gate.out_features, gate.in_features, tuple(gate.weight.shape)) == (32, 16, (32, 16))
    assert copied == dict.fromkeys(before, 1)


@every_model
def test_a_step_is_as_its_groups_one_by_one(make: Any):
    models, histories, reports = [], [], []
    for interactive in (False, True):
        model = fresh(make)
        backward(model)
        next(model.parameters()).requires_grad_(False)
        pruner, hook = pruner_of(model, widths(make), pruning_ratio=0.4, iterative_steps=2)
        for _ in range(2):
            if interactive:
                for group in pruner.step(interactive=True):
                    group.prune()
            else:
                pruner.step()
        models.append(model)
        histories.append(pruner.pruning_history())
        reports.append([report.to_dict() | {"seconds": 0} for report in hook.reports])
    assert histories[0] == histories[1] != []
    assert reports[0] == reports[1]
    assert_equal(*models)
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert one.requires_grad is two.requires_grad
        assert (one.grad is None) is (two.grad is None)
        assert one.grad is None or torch.equal(one.grad, two.grad)
        assert one.is_contiguous()


def test_ties_stay_one_without_a_sync():
    model = fresh(tied)
    pruner, _ = pruner_of(model, ("hidden_size",))
    optimised = model.lm_head.weight
    groups_of(pruner)[0].prune([0, 3, 5, 6])
    assert model.lm_head.weight is model.model.embed_tokens.weight is not optimised
    assert model.lm_head.weight.shape == (40, 28)


def test_an_interrupted_step_is_finished_first(monkeypatch: pytest.MonkeyPatch):
    model, other = fresh(llama), fresh(llama)
    pruner, _ = pruner_of(model, BOTH)
    with monkeypatch.context() as patch:
        failing(patch, KeyboardInterrupt(), once=True)
        with pytest.raises(KeyboardInterrupt):
            pruner.step()
    whole, _ = pruner_of(other, BOTH)
    whole.step()
    assert_equal(model, other)
    assert (model.config.hidden_size, model.config.intermediate_size) == (16, 32)
    assert pruner.pruning_history() == whole.pruning_history()


def test_a_copy_that_fails_leaves_the_config_and_is_made_later(monkeypatch: pytest.MonkeyPatch):
    model, other = fresh(llama), fresh(llama)
    pruner, hook = pruner_of(model, BOTH)
    with monkeypatch.context() as patch:
        failing(patch, MemoryError("full"), once=False)
        with (
            pytest.raises(MemoryError, match="full"),
            pytest.warns(UserWarning, match=r"interrupted \(full\): .* weights are not cut yet"),
        ):
            pruner.step()
    assert (model.config.hidden_size, model.config.intermediate_size) == (32, 64)
    hook.sync()
    whole, _ = pruner_of(other, BOTH)
    whole.step()
    assert_equal(model, other)
    assert (model.config.hidden_size, model.config.intermediate_size) == (16, 32)


def test_an_importance_that_raises_cuts_nothing():
    model = fresh(llama)
    before = shapes(model)
    asked = []

    def importance(group: Any) -> torch.Tensor:
        asked.append(group)
        if len(asked) == 3:
            raise ZeroDivisionError
        return torch.arange(float(len(group[0].idxs)))

    pruner, _ = pruner_of(model, BOTH, importance=importance)
    with pytest.raises(ZeroDivisionError):
        pruner.step()
    assert shapes(model) == before
    assert pruner.pruning_history() == []
    assert model.config.hidden_size == 32


def test_a_pruner_with_a_way_of_its_own_sees_cut_weights():
    seen = []

    class Own(tp.pruner.BasePruner):  # type: ignore[misc, name-defined]
        def _prune(self) -> Any:
            for group in super()._prune():
                yield group
                seen.append(tuple(self.model.model.layers[1].mlp.down_proj.weight.shape))

    pruner, _ = pruner_of(fresh(llama), BOTH, cls=Own)
    pruner.step()
    assert seen == [(32, 64), (32, 32), (16, 32)]


def test_a_step_of_the_users_own_sees_cut_weights():
    seen = []
    model = fresh(llama)
    pruner, hook = pruner_of(model, BOTH)

    def step() -> None:
        for group in tp.pruner.BasePruner.step(pruner, interactive=True):
            group.prune()
            seen.append(model.model.layers[0].mlp.down_proj.weight.shape[1])

    del pruner.step
    hook.detach(pruner)
    pruner.step = step
    hook.register(pruner)
    pruner.step()
    assert seen == [64, 32, 32]  # as soon as a config describes both layers
    assert model.config.intermediate_size == 32


def test_layers_of_the_users_own_class_are_cut_as_others() -> None:
    class Own(nn.Linear):
        """A layer of the same parameters."""

    model, other = fresh(llama), fresh(llama)
    layer = model.model.layers[1].mlp.up_proj
    layer.__class__ = Own
    for one in (model, other):
        pruner, _ = pruner_of(one, BOTH)
        pruner.step()
    assert (layer.out_features, layer.in_features) == tuple(layer.weight.shape) == (32, 16)
    assert_equal(model, other)


@pytest.mark.parametrize("dims", [d for n in (1, 2, 3) for d in combinations(range(3), n)])
def test_all_dimensions_in_one_copy(dims: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tensors, "PIECE", 200)
    tensor = torch.rand(7, 6, 5).to(torch.float64)
    kept = {0: torch.tensor([0, 2, 3, 6]), 1: torch.tensor([1, 5]), 2: torch.tensor([0, 1, 4])}
    expected = tensor
    for dim in dims:
        expected = expected.index_select(dim, kept[dim])
    result = cut_list.select(tensor, {dim: kept[dim] for dim in dims})
    assert torch.equal(result, expected)
    assert result.is_contiguous()
