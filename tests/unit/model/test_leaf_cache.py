"""Layers that are built again and again are copies of the first one like each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers as hf
from torch import nn

from tp_hf_config.model import leaf_cache
from tp_hf_config.model.build import Builder, Refusal, without_data
from tp_hf_config.model.config_json import config_json
from tp_hf_config.model.leaf_cache import copied_leaves
from tp_hf_config.model.shapes import shapes

META = torch.device("meta")
LAYERS: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(3, 4, bias=False),
    lambda: nn.Conv1d(4, 8, 3, groups=2, padding="same"),
    lambda: nn.Conv2d(4, 8, (3, 1), stride=2),
    lambda: nn.ConvTranspose2d(4, 8, 3),
    lambda: nn.BatchNorm2d(4, affine=False),
    lambda: nn.LayerNorm((4, 2), eps=1e-3),
    lambda: nn.GroupNorm(2, 4),
    lambda: nn.Embedding(4, 3, padding_idx=1),
]


@pytest.fixture(autouse=True)
def nothing_made(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(leaf_cache, "_leaves", {})
    with META:
        yield


def contents(layer: nn.Module) -> dict[str, object]:
    tensors = {**layer._parameters, **layer._buffers}
    known = {key: value for key, value in vars(layer).items() if key[0] != "_" or "padding" in key}
    return known | {name: None if t is None else (t.shape, t.dtype) for name, t in tensors.items()}


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer()).__name__)
def test_a_copy_is_as_the_constructor_makes_it(layer: Callable[[], nn.Module]) -> None:
    made = layer()
    with copied_leaves():
        first, second = layer(), layer()
    assert contents(first) == contents(second) == contents(made)
    assert len(leaf_cache._leaves) == 1
    assert not {*map(id, first.parameters())} & {*map(id, second.parameters())}
    assert not {*map(id, first.buffers())} & {*map(id, second.buffers())}
    second.register_buffer("own", torch.empty(1))
    second.register_forward_hook(lambda *_: None)
    assert "own" not in first._buffers
    assert not first._forward_hooks


def test_other_arguments_make_other_layers() -> None:
    with copied_leaves():
        sizes = [tuple(nn.Linear(3, n).weight.shape) for n in (4, 5, 4)]
        biases = [nn.Linear(3, 4, bias=bias).bias is not None for bias in (True, False)]
        probabilities = [nn.LayerNorm(4, eps=eps).eps for eps in (1, 1.0, True)]
    assert sizes == [(4, 3), (5, 3), (4, 3)]
    assert biases == [True, False]
    assert [*map(type, probabilities)] == [int, float, bool]


def test_the_default_dtype_counts() -> None:
    with copied_leaves():
        before = nn.Linear(3, 4)
        torch.set_default_dtype(torch.bfloat16)
        try:
            after = nn.Linear(3, 4)
        finally:
            torch.set_default_dtype(torch.float32)
    assert (before.weight.dtype, after.weight.dtype) == (torch.float32, torch.bfloat16)


class Scaled(nn.Linear):
    """A layer that knows something before torch's constructor runs, and uses it there."""

    def __init__(self, width: int, scale: float):
        self.scale = scale
        super().__init__(width, width)

    def reset_parameters(self) -> None:
        self.reset_with = self.scale


def test_a_layer_that_set_something_first_is_built() -> None:
    with copied_leaves():
        assert [Scaled(4, scale).reset_with for scale in (1.0, 2.0)] == [1.0, 2.0]
    assert not leaf_cache._leaves


def test_other_threads_build_their_own() -> None:
    built: list[nn.Linear] = []
    with copied_leaves():
        thread = threading.Thread(target=lambda: built.append(nn.Linear(3, 4, device="cpu")))
        thread.start()
        thread.join()
    assert built[0].weight.device == torch.device("cpu")
    assert not leaf_cache._leaves


def test_the_constructors_are_as_they_were() -> None:
    own = nn.Linear.__init__, nn.BatchNorm1d.__init__
    with copied_leaves():
        assert nn.Linear.__init__ is not own[0]
    with pytest.raises(TypeError), copied_leaves():
        nn.Linear()  # type: ignore[call-arg]
    assert (nn.Linear.__init__, nn.BatchNorm1d.__init__) == own


def test_a_build_has_the_shapes_and_ties_of_the_class() -> None:
    config = hf.SegformerConfig(depths=[1, 1, 1, 1], num_labels=3)
    model = without_data(hf.SegformerForImageClassification, config)
    assert not isinstance(model, Refusal)
    for _ in range(2):
        built = Builder(model).build(config_json(config))
        assert not isinstance(built, Refusal)
        assert list(shapes(built).items()) == list(shapes(model).items())
        assert all(one.is_meta for one in built.parameters())
        assert not any(module.training for module in built.modules())
    assert leaf_cache._leaves
