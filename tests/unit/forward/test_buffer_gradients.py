"""Gradients of buffers: which a pass computes, and that nothing stays switched on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tp_hf_config.forward.observed_pass import followed_buffers, following
from tp_hf_config.forward.run_recipe import PLAIN

INPUTS = {"x": torch.ones(2, 3, dtype=torch.float64)}


class FrozenNorm(nn.Module):
    """A norm of buffers alone, as DETR's backbone has it."""

    def __init__(self, size: int):
        super().__init__()
        for name in ("weight", "bias", "mean", "scale"):
            self.register_buffer(name, torch.rand(size) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.weight / self.scale + self.bias


class Counting(FrozenNorm):
    """One that counts its calls in place."""

    def __init__(self, size: int):
        super().__init__(size)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1.0)
        return super().forward(x)


class Table(FrozenNorm):
    """One with a table beside it, as a codebook has."""

    def __init__(self, size: int):
        super().__init__(size)
        self.register_buffer("table", torch.rand(size, size))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.table


def model_with(norm: nn.Module) -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(3, 4), norm

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.layer(x))

    return Model().double().eval()


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (FrozenNorm(4), {"norm.weight", "norm.bias", "norm.mean", "norm.scale"}),
        (nn.BatchNorm1d(4), set()),
        (nn.LayerNorm(4), set()),
        (Counting(4), set()),
        (Table(4), set()),
    ],
    ids=["buffers alone", "torch's own", "none", "written to", "a table"],
)
def test_buffers_whose_gradients_a_pass_computes(norm: nn.Module, expected: set[str]) -> None:
    model = model_with(norm)
    assert followed_buffers(model, INPUTS, (), PLAIN) == expected
    assert not any(buffer.requires_grad for buffer in model.buffers())


def test_what_was_followed_before_stays_followed() -> None:
    one, two = torch.ones(2, requires_grad=True), torch.ones(2)
    with following([one, two]):
        assert two.requires_grad
    assert one.requires_grad
    assert not two.requires_grad
