"""Layers that pass on what they are given, and what they hand to each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tp_hf_config.forward.observed_pass import handed_on, hidden_in, hidden_out, without_layers


class TwoStreams(nn.Module):
    """A layer of words and entities, as LUKE's: both go on; the scores do not."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.entities = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, words: Tensor, mask: Any = None, *, entities: Tensor) -> tuple[Tensor, ...]:
        scores = entities.softmax(-1)
        return self.words(words), self.entities(entities + words.mean()), scores


class Streams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoStreams() for _ in range(3))

    def forward(self, words: Tensor, entities: Tensor) -> tuple[Tensor, ...]:
        for layer in self.layers:
            words, entities, scores = layer(words, None, entities=entities)
        return words, entities, scores


def test_all_states_of_a_layer_pass_on() -> None:
    model, given = Streams(), (torch.rand(2, 4), torch.rand(2, 4))
    with handed_on(list(model.layers)) as handed:
        model(*given)
    assert handed == {0: 0, 1: "entities"}
    with without_layers([model.layers[1]], handed) as impossible:
        passing = model(*given)
    del model.layers[1]
    assert impossible == []
    assert all(map(torch.equal, passing, model(*given)))


def test_without_knowing_what_is_handed_on_only_the_first_states_pass() -> None:
    model, given = Streams(), (torch.rand(2, 4), torch.rand(2, 4))
    with without_layers([model.layers[2]]):
        words, entities, _ = model(*given)
    before = model.layers[0](given[0], entities=given[1])
    before = model.layers[1](before[0], entities=before[1])
    assert torch.equal(words, before[0])
    assert not torch.equal(entities, before[1])


def test_what_goes_in_is_the_first_floating_point_tensor() -> None:
    states, numbers = torch.rand(2, 3), torch.arange(3)
    assert hidden_in((numbers, states), {}) is states
    assert hidden_in((), {"mask": None, "hidden_states": states}) is states
    assert hidden_in((numbers,), {}) is None
    assert hidden_out((states, numbers)) is states
    assert hidden_out({"a": states}) is None
