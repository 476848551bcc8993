"""The tensors of an output, and scores of what is masked."""

from __future__ import annotations

import torch

from tp_hf_config.forward.output_tensors import (
    largest_by_name,
    largest_in,
    tensors_in,
    unmasked,
)


def test_every_tensor_is_yielded_however_it_is_nested() -> None:
    a, b, c = (torch.rand(1) for _ in range(3))
    assert [id(tensor) for tensor in tensors_in({"a": (a, [b, None]), "c": c, "n": 3})] == [
        *map(id, (a, b, c))
    ]


def test_masked_scores_are_zero() -> None:
    scores = torch.tensor([1.5, -torch.inf, -3.0, torch.inf, torch.finfo(torch.float32).min])
    assert unmasked(scores).tolist() == [1.5, 0.0, -3.0, 0.0, 0.0]
    undefined = unmasked(torch.tensor([2.0, torch.nan, -torch.inf])).tolist()
    assert (undefined[0], undefined[2]) == (2.0, 0.0)
    assert undefined[1] != undefined[1]


def test_masked_scores_have_no_gradient_and_the_others_theirs() -> None:
    scores = torch.tensor([2.0, -torch.inf, -5.0], requires_grad=True)
    unmasked(scores).sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [1.0, 0.0, 1.0]


def test_the_largest_absolute_value() -> None:
    assert largest_in(torch.tensor([[1.0, -3.0], [2.0, 0.0]])) == 3.0
    assert largest_in(torch.tensor([3 + 4j, 1.0])) == 5.0
    assert largest_in(torch.empty(0, 2)) == 0.0
    undefined = largest_in(torch.tensor([1.0, torch.nan]))
    assert undefined != undefined
    assert largest_by_name({"a": torch.tensor([-2.0]), "b": None}) == {"a": 2.0, "b": 0.0}
