"""An optimizer follows what is pruned: exactly the positions that the weights keep."""

from __future__ import annotations

from typing import Any

import pytest
import small
import torch
import torch_pruning as tp
import transformers as hf
from tiny_training import MODELS, gradients, pruner_of
from torch import nn

from tp_hf_config import HFConfigSyncHook, TrainingError, optimizer_follows

pytestmark = pytest.mark.usefixtures("one_thread")


def numbered(model: Any) -> dict[str, torch.Tensor]:
    """Give every weight a value of its own, so that what is left of it says what was kept."""
    start, names = 0, {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            count = parameter.numel()
            parameter.copy_(torch.arange(start, start + count).view(parameter.shape) / 1e5)
            names[name], start = parameter, start + count
    return names


def kept_of(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Where in a numbered tensor the values of a smaller one stand, flat."""
    assert len(old.unique()) == old.numel()
    return torch.searchsorted(old.flatten(), new.flatten())


ADAMW = (
    lambda parameters: torch.optim.AdamW(parameters, amsgrad=True),
    {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
)
SGD = lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9), {"momentum_buffer"}


class TestOptimizer:
    @pytest.mark.parametrize(
        ("name", "optimizer", "cut"),
        [
            ("llama", ADAMW, 21),
            ("llama-tied", SGD, 20),
            ("llama-tied", ADAMW, 20),
            ("bert", ADAMW, 41),
            ("bert", SGD, 41),
        ],
    )
    def test_state_is_that_of_the_kept_positions(self, name: str, optimizer: Any, cut: int):
        model, (make, keys) = MODELS[name]().double(), optimizer
        optimizer = make(model.parameters())
        gradients(model)
        optimizer.step()
        old = numbered(model)
        states = {n: dict(optimizer.state[p]) for n, p in old.items() if p in optimizer.state}
        importance = tp.importance.GroupTaylorImportance()
        pruner = pruner_of(model, importance=importance, iterative_steps=2)
        with optimizer_follows(model, optimizer):
            pruner.step()
            pruner.step()  # cuts again what is cut already
        new = dict(model.named_parameters())
        listed = [p for group in optimizer.param_groups for p in group["params"]]
        assert listed == list(new.values())
        assert set(optimizer.state) == {new[n] for n in states}
        assert sum(new[n].shape != old[n].shape for n in new) == cut
        for n, before in states.items():
            where = kept_of(old[n].detach(), new[n].detach())
            for key, value in optimizer.state[new[n]].items():
                if key in keys:
                    assert torch.equal(value, before[key].flatten()[where].view(new[n].shape)), n
                else:
                    assert key == "step"
                    assert value is before[key]

    def test_groups_keep_their_settings_order_and_schedule(self):
        model = small.llama()
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim == 1]
        optimizer = torch.optim.AdamW(
            [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}],
            lr=0.5,
        )
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        gradients(model)
        optimizer.step()
        groups = list(optimizer.param_groups)
        pruner = pruner_of(model)
        with optimizer_follows(model, optimizer):
            pruner.step()
        schedule.step()
        assert all(a is b for a, b in zip(optimizer.param_groups, groups, strict=True))
        one_dimensional, others_now = ([*group["params"]] for group in groups)
        assert one_dimensional == [p for p in model.parameters() if p.ndim == 1]
        assert others_now == [p for p in model.parameters() if p.ndim > 1]
        assert [(g["weight_decay"], g["lr"]) for g in groups] == [(0.0, 0.25), (0.1, 0.25)]

    def test_gradients_and_frozen_weights_stay(self):
        model = small.llama()
        model.lm_head.requires_grad_(False)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        gradients(model)
        pruner = pruner_of(model)
        with optimizer_follows(model, optimizer):
            pruner.step()
        assert not model.lm_head.weight.requires_grad
        assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters())) - 1
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        assert all(p.grad.shape == p.shape for p in optimizer.param_groups[0]["params"])
        optimizer.step()
        same = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
        assert same == ["lm_head.weight"]

    def test_removed_weights_without_gradient_change_nothing(self):
        """Pruning what does nothing, then training, is training, then pruning it."""
        weights = []
        for first in ("prune", "train"):
            model = small.llama().double()
            with torch.no_grad():  # these channels put out zero, so no gradient reaches them
                for layer in model.model.layers:
                    for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                        linear.weight[::4] = 0
                    layer.mlp.down_proj.weight[:, ::4] = 0
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
            pruner = tp.pruner.MetaPruner(
                model,
                example_inputs=None,
                importance=tp.importance.GroupMagnitudeImportance(),
                pruning_ratio=0.25,
                hooks=[HFConfigSyncHook(prune=("intermediate_size",))],
            )

            def train(model: Any = model, optimizer: Any = optimizer) -> None:
                for _ in range(2):
                    optimizer.zero_grad()
                    gradients(model)
                    optimizer.step()

            train()
            if first == "train":
                train()
            with optimizer_follows(model, optimizer):
                pruner.step()
            if first == "prune":
                train()
            assert model.config.intermediate_size == 48
            weights.append(model.state_dict())
        for name, value in weights[0].items():
            torch.testing.assert_close(value, weights[1][name], rtol=0, atol=1e-12)

    def test_a_step_that_raises_leaves_an_optimizer_of_the_weights(self):
        model = small.llama()
        optimizer = torch.optim.AdamW(model.parameters())
        gradients(model)
        optimizer.step()
        pruner = pruner_of(model)

        def prune_and_raise() -> None:
            with optimizer_follows(model, optimizer):
                pruner.step()
                raise RuntimeError("mine")

        with pytest.raises(RuntimeError, match=r"^mine$"):
            prune_and_raise()
        assert optimizer.param_groups[0]["params"] == list(model.parameters())
        assert set(optimizer.state) == set(model.parameters())

    def refused(self, model: Any, optimizer: Any) -> str:
        before = small.state_of(model)
        with pytest.raises(TrainingError) as raised, optimizer_follows(model, optimizer):
            raise AssertionError("pruned")
        small.assert_same(before, small.state_of(model))
        return str(raised.value)

    def test_an_optimizer_from_before_an_earlier_pruning_is_refused(self):
        model = small.llama()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        gradients(model)
        pruner_of(model).step()
        assert self.refused(model, optimizer) == (
            "SGD has a parameter of shape [40, 32] that is not one of LlamaForCausalLM's. The "
            "optimizer may have been made before an earlier pruning step. Make it from "
            "model.parameters(), and prune inside optimizer_follows."
        )

    def test_state_of_another_shape_is_refused(self):
        model = small.llama()
        optimizer = hf.optimization.Adafactor(
            model.parameters(), lr=0.1, relative_step=False, scale_parameter=False
        )
        gradients(model)
        optimizer.step()
        assert self.refused(model, optimizer) == (
            "Adafactor keeps 'exp_avg_sq_row' of model.embed_tokens.weight, a tensor of shape "
            "[40], but the parameter has shape [40, 32]. Only state of the parameter's shape can "
            "be pruned with it. Use an optimizer with this kind of state (AdamW, SGD, Lion)."
        )

    def test_hooks_on_a_gradient_are_refused(self):
        model = small.llama()
        model.lm_head.weight.register_post_accumulate_grad_hook(lambda p: None)
        message = self.refused(model, torch.optim.SGD(model.parameters(), 0.1))
        assert message.startswith(
            "lm_head.weight has gradient hooks, which the pruned Parameter would not have"
        )

    def test_parameters_replaced_by_others_are_named(self):
        model = small.llama()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        message = (
            "^1 of the optimizer's parameters, the first of shape .40, 32., were replaced, but"
        )
        with pytest.raises(TrainingError, match=message), optimizer_follows(model, optimizer):
            model.lm_head.weight = nn.Parameter(torch.zeros(40, 32))
