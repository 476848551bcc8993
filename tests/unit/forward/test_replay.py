"""Parts of a model that an experiment does not change are replayed, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

from tp_hf_config.fieldmap.learn_field_map import map_of
from tp_hf_config.forward.observed_pass import PassResult
from tp_hf_config.forward.replay import Replay
from tp_hf_config.forward.run_recipe import RunRecipe
from tp_hf_config.model.surroundings import one_thread, same_random_state
from tp_hf_config.twin.find_groups import find_groups
from tp_hf_config.twin.tiny.tiny_model import TinyModel, tiny_model
from tp_hf_config.twin.twin_test import TwinTest


class Part(nn.Linear):
    """A layer that counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Random(Part):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn(4)


class Writing(Part):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.add_(1))


class Model(nn.Module):
    def __init__(self, kind: type[Part] = Part):
        super().__init__()
        self.layers = nn.ModuleList([kind(4, 4), Part(4, 4)])
        self.double().requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for layer in self.layers:
            x = layer(x)
        return x

    def calls(self) -> list[int]:
        return [layer.calls for layer in self.layers]  # type: ignore[misc]


def passes(model: Model, changed: Tensor, *inputs: Tensor) -> list[Tensor]:
    replay, outputs = Replay(model), []
    for x in inputs:
        torch.manual_seed(0)
        with replay.without([changed]):
            outputs.append(model(x))
    assert all("forward" not in vars(layer) for layer in model.layers)
    return outputs


X = torch.arange(8, dtype=torch.float64).view(2, 4)


def test_what_is_in_front_of_a_changed_parameter_runs_once() -> None:
    model = Model()
    first, second = passes(model, model.layers[1].weight, X, X)
    assert model.calls() == [1, 2]
    assert torch.equal(first, second)
    assert torch.autograd.grad(second.sum(), model.layers[1].weight)[0].any()


def test_what_is_behind_it_runs_every_time() -> None:
    model = Model()
    passes(model, model.layers[0].weight, X, X)
    assert model.calls() == [2, 2]


def test_other_inputs_are_run() -> None:
    model = Model()
    outputs = passes(model, model.layers[1].weight, X, X + 1, X)
    assert model.calls() == [2, 3]
    assert [torch.equal(one, model(x)) for one, x in zip(outputs, (X, X + 1, X), strict=True)] == [
        True
    ] * 3


@pytest.mark.parametrize("kind", [Random, Writing])
def test_parts_that_do_more_than_compute_run_every_time(kind: type[Part]) -> None:
    model = Model(kind)
    first, second = passes(model, model.layers[1].weight, X, X)
    assert model.calls() == [2, 2]
    assert torch.equal(first, second)


class Chunk(nn.Module):
    """A part with a layer inside, which returns every other channel of what goes in, too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Part(4, 4)

    def forward(self, x: Tensor, options: Any = None) -> tuple[Tensor, Tensor]:
        return self.inner(x), x[:, ::2]


class Chunked(nn.Module):
    """Hands its part a view of its inputs, and what is no plain value if there is any."""

    def __init__(self, options: Any = None):
        super().__init__()
        self.chunk, self.last, self.options = Chunk(), Part(4, 4), options
        self.double().requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        hidden, half = self.chunk(x, self.options)
        return self.last(hidden) + half.sum()


@pytest.mark.parametrize("options", [None, object()], ids=["a view", "an object"])
def test_inside_a_part_that_has_to_run_others_are_replayed(options: Any) -> None:
    model = Chunked(options)
    replay = Replay(model)
    outputs = []
    for _ in range(4):
        with replay.without([model.last.weight]):
            outputs.append(model(X))
    assert model.chunk.inner.calls == 2  # once as a part of the chunk, once by itself
    assert model.last.calls == 4
    assert all(output.equal(outputs[0]) for output in outputs)


class Collecting(nn.Module):
    """Returns what a hook on the inside of its first part collects, as Transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(Part(4, 4), Part(4, 4))
        self.last = Part(4, 4)
        self.double()

    def forward(self, x: Tensor) -> Any:
        collected: list[Tensor] = []
        handle = self.front[0].register_forward_hook(lambda *given: collected.append(given[-1]))
        result = self.last(self.front(x))
        handle.remove()
        return [result, *collected]


def test_a_model_whose_outputs_are_collected_inside_is_run_whole() -> None:
    model = Collecting()
    test = TwinTest(model, {"x": X}, 4, replay=Replay(model))
    for _ in range(3):
        assert len(test.outputs(["last.weight"])) == 2
    assert model.last.calls == 5  # the second pass twice: its front was replayed, then it is whole


class Hooked(nn.Module):
    """Collects by a hook that stays, and needs what it collects."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(Part(4, 4), Part(4, 4))
        self.last = Part(4, 4)
        self.collected: list[Tensor] = []
        self.front[0].register_forward_hook(lambda *given: self.collected.append(given[-1]))
        self.double()

    def forward(self, x: Tensor) -> Any:
        self.collected.clear()
        x = self.front(x)
        return self.last(x) + self.collected[0]


class Choosing(nn.Module):
    """Sorts its outputs by scores that nothing else is computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.scores, self.last = Part(4, 4), Part(4, 4), Part(4, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        return self.last(x).gather(-1, self.scores(x).argsort(-1))


def test_parts_that_compute_a_watched_result_are_run_and_those_before_it_replayed() -> None:
    model, watched = Choosing(), (PassResult("scores", "linear", 0),)
    whole = TwinTest(model, {"x": X}, 4, watched=watched).outputs()
    test = TwinTest(model, {"x": X}, 4, watched=watched, replay=Replay(model, watched))
    passes = [test.outputs(["last.weight"]) for _ in range(3)]
    assert all(all(map(torch.equal, one, whole)) for one in passes)
    assert [len(one) for one in passes] == [2, 2, 2]
    assert [part.calls for part in (model.front, model.scores, model.last)] == [4, 6, 6]


class InPlace(nn.Module):
    """Scores pass through an identity, and are then changed in place, as in timm's SE blocks."""

    def __init__(self, between: nn.Module):
        super().__init__()
        self.scores, self.between, self.out = nn.Linear(4, 4), between, nn.Linear(4, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x)
        self.between(scores).relu_()
        return self.out(scores)


@pytest.mark.parametrize("between", [nn.Identity(), nn.Flatten(), nn.Dropout(0.5).eval()])
def test_what_is_passed_on_may_be_changed_in_place(between: nn.Module) -> None:
    model, x = InPlace(between), -torch.rand(2, 4, dtype=torch.float64)
    replay = Replay(model)
    with torch.no_grad():
        expected = model(x)
        for _ in range(3):
            (output,) = replay.outputs([model.out.weight], {"x": x}, RunRecipe()) or ()
            assert torch.equal(output, expected)


def test_what_a_hook_inside_watches_is_run_but_the_watched_part_is_replayed() -> None:
    model = Hooked()
    test = TwinTest(model, {"x": X}, 4, replay=Replay(model))
    outputs = [test.outputs(["last.weight"]) for _ in range(3)]
    assert all(torch.equal(one, outputs[0][0]) for (one,) in outputs)
    assert [part.calls for part in model.front] == [2, 2]  # at first, and when it is recorded
    assert model.last.calls == 4


@pytest.mark.parametrize("name", ["bart", "swin"])
def test_the_same_is_found_as_by_whole_passes(name: str) -> None:
    with one_thread(), same_random_state():
        learned = map_of(zoo.build(name))
        found = []
        for whole in (False, True):
            tiny = tiny_model(learned)
            assert isinstance(tiny, TinyModel)
            if whole:
                vars(tiny)["_replay"] = None
            found.append(find_groups(tiny))
    assert found[0] == found[1]
    assert any(finding.reason is None for finding in found[0])
