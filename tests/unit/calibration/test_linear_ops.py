"""Every linear operation on a parameter is seen, whatever layer or view it is in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

from tp_hf_config.calibration.linear_ops import Consumer, LinearOp, WatchedOps

Run = Callable[[Any, Tensor], Tensor]


class Holder(nn.Module):
    """Parameters for all kinds of operations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.square = nn.Parameter(torch.rand(5, 4))
        self.stack = nn.Parameter(torch.rand(3, 5, 4))
        self.image = nn.Parameter(torch.rand(5, 4, 3, 3))
        self.pixel = nn.Parameter(torch.rand(5, 4, 1, 1))
        self.sound = nn.Parameter(torch.rand(4, 5, 2))
        self.table = nn.Parameter(torch.rand(9, 4))


ROWS, IMAGE, SOUND = torch.rand(2, 7, 4), torch.rand(2, 4, 6, 6), torch.rand(2, 4, 8)
SEEN: dict[str, tuple[Run, Tensor, Consumer]] = {
    "linear": (lambda m, x: F.linear(x, m.square), ROWS, Consumer("square", 1)),
    "linear by name": (
        lambda m, x: F.linear(input=x, weight=m.square, bias=torch.zeros(5)),
        ROWS,
        Consumer("square", 1),
    ),
    "Conv1D": (
        lambda m, x: torch.addmm(torch.zeros(5), x.view(-1, 4), m.square.t()),
        ROWS,
        Consumer("square", 1),
    ),
    "product": (lambda m, x: x @ m.square.T, ROWS, Consumer("square", 1)),
    "matmul": (lambda m, x: torch.matmul(x, m.square.mT), ROWS, Consumer("square", 1)),
    "weight first": (lambda m, x: m.square @ x.mT, ROWS, Consumer("square", 1)),
    "expert": (lambda m, x: F.linear(x, m.stack[2]), ROWS, Consumer("stack", 2, 2)),
    "turned expert": (lambda m, x: x @ m.stack[1].T, ROWS, Consumer("stack", 2, 1)),
    "image": (lambda m, x: F.conv2d(x, m.image, padding=1), IMAGE, Consumer("image", 1)),
    "single pixels": (lambda m, x: F.conv2d(x, m.pixel), IMAGE, Consumer("pixel", 1)),
    "transposed": (lambda m, x: F.conv_transpose1d(x, m.sound), SOUND, Consumer("sound", 0)),
    "einsum": (lambda m, x: torch.einsum("btc,oc->bto", x, m.square), ROWS, Consumer("square", 1)),
}


@pytest.mark.parametrize("case", SEEN)
def test_an_operation_is_seen_and_can_read_something_else(case: str) -> None:
    run, inputs, consumer = SEEN[case]
    model, seen = Holder(), list[LinearOp]()

    def visit(op: LinearOp) -> Any:
        seen.append(op)
        halved = op.shaped(op.channels_last() / 2)
        torch.testing.assert_close(op.run(halved), op.run() / 2)
        return op.run(op.shaped(op.channels_last() * 0))

    with torch.no_grad():
        expected = run(model, inputs)
        with WatchedOps(model, visit):
            result = run(model, inputs)
    assert [op.consumer for op in seen] == [consumer]
    assert seen[0].channels_last().shape[1] == 4
    assert result.shape == expected.shape
    assert not result.any()


NOT_SEEN: dict[str, tuple[Run, Tensor]] = {
    "no parameter": (lambda m, x: F.linear(x, torch.ones(5, 4)), ROWS),
    "computed weight": (lambda m, x: F.linear(x, m.square * 2), ROWS),
    "part of a weight": (lambda m, x: F.linear(x[..., :2], m.square[:, :2]), ROWS),
    "channel groups": (
        lambda m, x: F.conv1d(x, m.sound.transpose(0, 1)[:4, :1].contiguous(), groups=4),
        SOUND,
    ),
    "elementwise": (lambda m, x: x * m.square[0], ROWS),
}


@pytest.mark.parametrize("case", NOT_SEEN)
def test_other_operations_are_left_alone(case: str) -> None:
    run, inputs = NOT_SEEN[case]
    model = Holder()

    def visit(op: LinearOp) -> Any:
        raise AssertionError(op.consumer)

    with torch.no_grad():
        expected = run(model, inputs)
        with WatchedOps(model, visit):
            assert torch.equal(run(model, inputs), expected)


def test_a_tied_head_is_told_while_no_input_was_looked_up_in_it() -> None:
    model, unread, looked_up = zoo.build("gemma2"), list[bool](), list[Any]()
    name, ids = "model.embed_tokens.weight", torch.tensor([[1, 2]])

    def visit(op: LinearOp) -> Any:
        if op.consumer.parameter == name:
            unread.append(op.is_unread)
        return op.run()

    def embedded(table: str, values: Tensor) -> Tensor:
        looked_up.append((table, values))
        return torch.zeros_like(values)

    with torch.no_grad(), WatchedOps(model, visit, embedded=embedded):
        model(inputs_embeds=torch.ones(1, 2, model.config.hidden_size))
        result = model(input_ids=ids)
    assert unread == [True, False]
    ((table, values),) = looked_up
    assert table == name
    assert torch.equal(values, model.get_input_embeddings().weight[ids])
    assert not result.logits.any()


def seen_by(model: nn.Module, run: Callable[[], Any]) -> list[Consumer]:
    """The weights that are used."""
    seen: list[Consumer] = []

    def visit(op: LinearOp) -> Any:
        seen.append(op.consumer)
        return op.run()

    with torch.no_grad(), WatchedOps(model, visit):
        run()
    return seen


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_parameters_on_one_storage_are_told_apart(dim: int) -> None:
    """Blocks of it along any dimension, also if one lies between numbers of the other."""
    model = nn.Module()
    size = [3, 6, 4]
    size[dim] *= 2
    first, second = torch.rand(size).chunk(2, dim)
    model.first, model.second = nn.Parameter(first), nn.Parameter(second)
    assert model.first.untyped_storage().data_ptr() == model.second.untyped_storage().data_ptr()

    def run() -> None:
        for name in ("second", "first"):
            weight = getattr(model, name)
            F.linear(ROWS, weight[1])
            F.linear(ROWS[:, :, :3], weight[2, :5, :3])  # not all that there is along the axis
            F.linear(ROWS, weight[2, 1:])

    assert seen_by(model, run) == [
        Consumer(name, 2, part) for name in ("second", "first") for part in (1, 2)
    ]


def test_weights_on_one_storage_with_a_table_are_told_apart() -> None:
    model = nn.Module()
    table, other = torch.rand(13, 4).split([9, 4])
    model.table, model.other = nn.Parameter(table), nn.Parameter(other)

    def run() -> None:
        F.embedding(torch.tensor([1, 2]), model.table)
        F.linear(ROWS, model.other)
        F.linear(ROWS, model.table)

    assert seen_by(model, run) == [Consumer("other", 1), Consumer("table", 1)]
