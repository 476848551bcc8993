"""The twin test on modules written by hand: right groups found, wrong ones caught."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tp_hf_config.twin.layout import TensorDim, UnitLayout
from tp_hf_config.twin.twin_test import Links, TwinTest

HIDDEN, INNER, TOKENS = 12, 10, 5
RUN, HEADS = 4, 6
WRONG = 1e-4
"""A wrong group changes the output by far more than rounding."""


class Norm(nn.Module):
    """RMS norm, as language models have it."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * x * scale


class Ffn(nn.Module):
    """Norm, up, activation, down; the stream goes around it."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = torch.tanh):
        super().__init__()
        self.norm = Norm(HIDDEN)
        self.up = nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.activation(self.up(self.norm(x))))


class Stream(nn.Module):
    """Two FFNs on one residual stream, between an embedding and a head."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = torch.tanh, tail: bool = True):
        super().__init__()
        self.embed = nn.Embedding(7, HIDDEN)
        self.layers = nn.ModuleList(Ffn(activation) for _ in range(2))
        self.norm = Norm(HIDDEN) if tail else nn.Identity()
        self.head = nn.Linear(HIDDEN, 3) if tail else nn.Identity()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Gated(nn.Module):
    """A gate and an up projection in one weight: two blocks, or one beside the other."""

    def __init__(self, interleaved: bool):
        super().__init__()
        self.interleaved = interleaved
        self.gate_up = nn.Linear(HIDDEN, 2 * INNER)
        self.down = nn.Linear(INNER, 3)

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up(x)
        gate, up = (both[..., ::2], both[..., 1::2]) if self.interleaved else both.chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Attention(nn.Module):
    """Six heads, optionally each pair of them on one key and value head."""

    def __init__(self, kv_heads: int = HEADS):
        super().__init__()
        self.kv_heads = kv_heads
        self.q = nn.Linear(HIDDEN, HEADS * RUN)
        self.k = nn.Linear(HIDDEN, kv_heads * RUN)
        self.v = nn.Linear(HIDDEN, kv_heads * RUN)
        self.o = nn.Linear(HEADS * RUN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, RUN)).transpose(1, 2)
        k, v = (
            layer(x).unflatten(-1, (self.kv_heads, RUN)).transpose(1, 2)
            for layer in (self.k, self.v)
        )
        k, v = (one.repeat_interleave(HEADS // self.kv_heads, 1) for one in (k, v))
        weights = (q @ k.transpose(-1, -2) / RUN**0.5).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


def ready(model: nn.Module) -> nn.Module:
    """In float64 and eval mode, no parameter trivial."""
    torch.manual_seed(3)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(0.3 * noise) if parameter.ndim == 1 else parameter.copy_(noise / 3)
    return model


def states() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {"x": torch.randn(2, TOKENS, HIDDEN, generator=generator, dtype=torch.float64)}


def ids() -> dict[str, Tensor]:
    return {"ids": torch.tensor([[0, 1, 2, 3, 4], [5, 6, 0, 2, 1]])}


def stream_dims() -> list[TensorDim]:
    """All that the stream's width sets."""
    return [
        TensorDim("embed.weight", 1),
        *(
            dim
            for i in range(2)
            for dim in (
                TensorDim(f"layers.{i}.norm.weight", 0),
                TensorDim(f"layers.{i}.up.weight", 1),
                TensorDim(f"layers.{i}.down.weight", 0),
                TensorDim(f"layers.{i}.down.bias", 0),
            )
        ),
        TensorDim("norm.weight", 0),
        TensorDim("head.weight", 1),
    ]


def ffn_dims(layer: int) -> list[TensorDim]:
    """All that one FFN's inner width sets."""
    name = f"layers.{layer}"
    return [
        TensorDim(f"{name}.up.weight", 0),
        TensorDim(f"{name}.up.bias", 0),
        TensorDim(f"{name}.down.weight", 1),
    ]


def head_dims(layout: UnitLayout, names: str = "qkvo") -> list[TensorDim]:
    dims = [
        TensorDim(f"{n}.{key}", 0, layout) for n in names if n != "o" for key in ("weight", "bias")
    ]
    return dims + [TensorDim("o.weight", 1, layout) for n in names if n == "o"]


def found(links: Links) -> set[frozenset[TensorDim]]:
    return {frozenset(group) for group in links.groups}


def mixed(size: int, seed: int = 5) -> list[int]:
    """An order in which no unit stays where it was."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    return [order[(order.index(unit) + 1) % size] for unit in range(size)]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Parameters are the same objects with the same values and no gradient, at the end too."""
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    yield
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    for name, (identity, value) in before.items():
        assert id(after[name]) == identity
        assert torch.equal(after[name], value), name
        assert after[name].requires_grad, name
        assert after[name].grad is None, name


# --- groups -------------------------------------------------------------------------------------


def test_the_residual_stream_is_one_group():
    model = ready(Stream())
    with untouched(model):
        links = TwinTest(model, ids(), HIDDEN).links(stream_dims())
    assert found(links) == {frozenset(stream_dims())}
    assert links.unequal == links.unobserved == ()


def test_the_ffns_of_two_layers_are_two_groups():
    model = ready(Stream())
    with untouched(model):
        links = TwinTest(model, ids(), INNER).links(ffn_dims(0) + ffn_dims(1))
    assert found(links) == {frozenset(ffn_dims(0)), frozenset(ffn_dims(1))}


def test_groups_keep_the_order_of_the_dimensions():
    dims = [*ffn_dims(1), *ffn_dims(0)]
    links = TwinTest(ready(Stream()), ids(), INNER).links(dims)
    assert links.groups == (tuple(ffn_dims(1)), tuple(ffn_dims(0)))


def test_one_width_for_the_stream_and_a_projection_that_does_not_share_its_units():
    """As in BERT: one field, two streams. Both are as wide and both are found apart."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
            self.c = nn.Linear(HIDDEN, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))

    first = [TensorDim("a.weight", 0), TensorDim("a.bias", 0), TensorDim("b.weight", 1)]
    second = [TensorDim("b.weight", 0), TensorDim("b.bias", 0), TensorDim("c.weight", 1)]
    model = ready(Two())
    with untouched(model):
        links = TwinTest(model, states(), HIDDEN).links(first + second)
    assert found(links) == {frozenset(first), frozenset(second)}


def test_the_last_projection_of_a_model_without_a_head_is_linked():
    """A loss that is linear in the output would not show it; the output is as wide as the field."""
    model = ready(Stream(tail=False))
    dims = [dim for dim in stream_dims() if not dim.name.startswith(("norm", "head"))]
    test = TwinTest(model, ids(), HIDDEN)
    assert found(test.links(dims)) == {frozenset(dims)}
    assert test.proves(dims, mixed(HIDDEN))


def test_units_that_are_not_interchangeable_are_unequal():
    """A fixed table along the stream: its channels are not alike."""

    class Fixed(Stream):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + self.embed(ids)[..., :1] * 0.5

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, 3)
            self.register_buffer("table", torch.linspace(0, 1, INNER))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x) + self.table))

    model = ready(Positions())
    dims = [TensorDim("a.weight", 0), TensorDim("a.bias", 0), TensorDim("b.weight", 1)]
    with untouched(model):
        test = TwinTest(model, states(), INNER)
        links = test.links(dims)
        assert links.groups == ()
        assert set(links.unequal) <= set(dims)
        assert links.unequal
        assert not test.proves(dims, mixed(INNER))
    model = ready(Fixed())
    test = TwinTest(model, ids(), HIDDEN)
    assert not test.proves(stream_dims(), mixed(HIDDEN))


def test_a_dimension_without_gradient_is_silent():
    """Softmax does not see a key's bias."""
    model = ready(Attention())
    layout = UnitLayout(run=RUN)
    links = TwinTest(model, states(), HEADS).links(head_dims(layout))
    assert links.unobserved == (TensorDim("k.bias", 0, layout),)
    rest = [dim for dim in head_dims(layout) if dim.name != "k.bias"]
    assert found(links) == {frozenset(rest)}


def test_an_unused_parameter_is_silent():
    model = Stream()
    model.spare = nn.Linear(HIDDEN, 2)
    dims = [*stream_dims(), TensorDim("spare.weight", 1)]
    links = TwinTest(ready(model), ids(), HIDDEN).links(dims)
    assert links.unobserved == (TensorDim("spare.weight", 1),)
    assert found(links) == {frozenset(stream_dims())}


def test_buffers_that_gradients_reach_are_in_the_groups_that_they_scale() -> None:
    """A norm with frozen statistics, as in detectors' backbones, in each of two branches."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)
            self.register_buffer("scale", torch.rand(INNER, dtype=torch.float64) + 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x) * self.scale))

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(Branch() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.branches[0](x) + self.branches[1](x)

    model = ready(Branches())
    names = (("a.weight", 0), ("a.bias", 0), ("b.weight", 1), ("scale", 0))
    branches = [{TensorDim(f"branches.{i}.{name}", dim) for name, dim in names} for i in range(2)]
    dims = [dim for branch in branches for dim in branch]
    scales = {dim for dim in dims if dim.name.endswith("scale")}
    followed = {dim.name for dim in scales}
    with untouched(model):
        links = TwinTest(model, states(), INNER, followed=followed).links(dims)
        assert found(links) == {frozenset(branch) for branch in branches}
        assert not links.unobserved
        links = TwinTest(model, states(), INNER).links(dims)
        assert set(links.unobserved) == scales


def test_what_rounding_leaves_of_a_gradient_is_silent():
    """Another for each unit, and less than the last digit of the largest."""

    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, 3)

        def forward(self, x: Tensor) -> Tensor:
            left = 1e-12 * (self.a.bias * torch.linspace(1, 2, INNER)).sum()
            return 1e6 * self.b(torch.tanh(x @ self.a.weight.T)) + left

    dims = [TensorDim("a.weight", 0), TensorDim("a.bias", 0), TensorDim("b.weight", 1)]
    test = TwinTest(ready(Rounded()), states(), INNER)
    assert test.links(dims) == Links(((dims[0], dims[2]),), (), (dims[1],))


@pytest.mark.parametrize("dead", [(0, 1), (0,), (1,), (0, 1, 2, 3)])
def test_dead_units_hide_nothing(dead: tuple[int, ...]):
    """The first units of a ReLU never fire for these inputs: other pairs show what is linked."""
    model = ready(Stream(torch.relu))
    with torch.no_grad():
        for unit in dead:
            model.get_parameter("layers.0.up.bias")[unit] = -100.0
    with untouched(model):
        test = TwinTest(model, ids(), INNER)
        links = test.links(ffn_dims(0) + ffn_dims(1))
    assert found(links) == {frozenset(ffn_dims(0)), frozenset(ffn_dims(1))}
    assert test.proves(ffn_dims(0), mixed(INNER))


def test_a_layer_of_dead_units_is_not_called_linked():
    model = ready(Stream(torch.relu))
    with torch.no_grad():
        model.get_parameter("layers.0.up.bias").fill_(-100.0)
    links = TwinTest(model, ids(), INNER).links(ffn_dims(0) + ffn_dims(1))
    assert frozenset(ffn_dims(1)) in found(links)
    assert not any(set(group) >= set(ffn_dims(0)) for group in links.groups)
    assert set(links.unobserved) == set(ffn_dims(0))


# --- layouts ------------------------------------------------------------------------------------

BLOCKS, BESIDE = UnitLayout(parts=2), UnitLayout(run=2)


@pytest.mark.parametrize("interleaved", [False, True])
def test_fused_gate_and_up_have_one_layout(interleaved: bool):
    model = ready(Gated(interleaved))
    right, wrong = (BESIDE, BLOCKS) if interleaved else (BLOCKS, BESIDE)
    test = TwinTest(model, states(), INNER)

    def dims(layout: UnitLayout) -> list[TensorDim]:
        return [
            TensorDim("gate_up.weight", 0, layout),
            TensorDim("gate_up.bias", 0, layout),
            TensorDim("down.weight", 1),
        ]

    with untouched(model):
        assert found(test.links(dims(right))) == {frozenset(dims(right))}
        assert test.proves(dims(right), mixed(INNER))
        links = test.links(dims(wrong))
        assert links.unequal
        assert links.groups == ()
        assert test.permutation_error(dims(wrong), mixed(INNER)) > WRONG


def test_heads_are_runs():
    model = ready(Attention())
    test = TwinTest(model, states(), HEADS)
    right = head_dims(UnitLayout(run=RUN))
    with untouched(model):
        assert test.links(right).unequal == ()
        assert test.proves(right, mixed(HEADS))
        spread = head_dims(UnitLayout(parts=RUN))  # one channel of every head
        assert test.permutation_error(spread, mixed(HEADS)) > WRONG


def test_head_dims_stand_once_in_every_head():
    """The q/k dims of all heads move together; so do the v/o dims, apart from them."""
    model = ready(Attention())
    test = TwinTest(model, states(), RUN)
    pairs = [head_dims(UnitLayout(parts=HEADS), names) for names in ("qk", "vo")]
    links = test.links([dim for pair in pairs for dim in pair])
    unseen = TensorDim("k.bias", 0, UnitLayout(parts=HEADS))
    assert found(links) == {frozenset(set(pair) - {unseen}) for pair in pairs}
    assert all(test.proves(pair, mixed(RUN)) for pair in pairs)


def test_queries_may_only_change_places_inside_their_key_value_head():
    """Classes: query heads 2i and 2i+1 read key/value head i."""
    model = ready(Attention(kv_heads=HEADS // 2))
    test = TwinTest(model, states(), HEADS)
    queries = head_dims(UnitLayout(run=RUN), "qo")
    assert test.proves(queries, [1, 0, 3, 2, 5, 4])
    assert test.permutation_error(queries, [2, 1, 0, 3, 4, 5]) > WRONG
    wide = UnitLayout(run=2 * RUN)
    assert wide == UnitLayout(run=2 * RUN)
    whole = [*head_dims(wide, "qo"), *head_dims(UnitLayout(run=RUN), "kv")]
    assert TwinTest(model, states(), HEADS // 2).proves(whole, [2, 0, 1])


def test_units_in_the_middle_of_a_dimension():
    """An offset: what stands before the units is not theirs."""

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Linear(HIDDEN, 3 + INNER)
            self.down = nn.Linear(INNER, 3)

        def forward(self, x: Tensor) -> Tensor:
            other, inner = self.both(x).split([3, INNER], -1)
            return other + self.down(torch.tanh(inner))

    def dims(offset: int) -> list[TensorDim]:
        layout = UnitLayout(offset=offset)
        return [
            TensorDim("both.weight", 0, layout),
            TensorDim("both.bias", 0, layout),
            TensorDim("down.weight", 1),
        ]

    model = ready(Joined())
    test = TwinTest(model, states(), INNER)
    with untouched(model):
        assert found(test.links(dims(3))) == {frozenset(dims(3))}
        assert test.proves(dims(3), mixed(INNER))
        assert test.links(dims(0)).unequal
        assert test.permutation_error(dims(0), mixed(INNER)) > WRONG


# --- the proof ----------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", range(len(stream_dims())))
def test_the_proof_notices_each_dimension_that_is_missing(missing: int):
    """A norm, a bias, a projection: any of them."""
    model = ready(Stream())
    dims = stream_dims()
    del dims[missing]
    test = TwinTest(model, ids(), HIDDEN)
    with untouched(model):
        assert test.proves(stream_dims(), mixed(HIDDEN))
        assert not test.proves(dims, mixed(HIDDEN))
        assert test.permutation_error(dims, mixed(HIDDEN)) > WRONG


@pytest.mark.parametrize("missing", range(3))
def test_the_proof_notices_a_missing_part_of_an_ffn(missing: int):
    dims = ffn_dims(0)
    del dims[missing]
    test = TwinTest(ready(Stream()), ids(), INNER)
    assert test.permutation_error(dims, mixed(INNER)) > WRONG


def test_the_proof_notices_two_layers_mixed_up():
    test = TwinTest(ready(Stream()), ids(), INNER)
    crossed = [*ffn_dims(0)[:2], ffn_dims(1)[2]]
    assert test.permutation_error(crossed, mixed(INNER)) > WRONG
    assert not test.proves(crossed, mixed(INNER))
    # both layers in one group: a right permutation, if more than has to move together
    assert test.proves(ffn_dims(0) + ffn_dims(1), mixed(INNER))
    swapped = TwinTest(ready(Stream()), ids(), INNER).links([ffn_dims(0)[0], ffn_dims(1)[2]])
    assert swapped.unequal or len(swapped.groups) == 2


def test_the_proof_notices_a_dimension_too_many():
    test = TwinTest(ready(Stream()), ids(), HIDDEN)
    assert test.proves(stream_dims(), mixed(HIDDEN))
    model = ready(Attention())
    test = TwinTest(model, states(), HEADS)
    dims = head_dims(UnitLayout(run=RUN))
    assert test.proves(dims, mixed(HEADS))
    assert not test.proves([*dims, TensorDim("q.weight", 1, UnitLayout(run=2))], mixed(HEADS))


def test_what_one_test_proved_no_other_test_tries_again(monkeypatch: pytest.MonkeyPatch):
    """Fields share groups: the same permutation of the same tensor dims is tried once."""
    proofs: dict[Any, bool] = {}
    tests = [TwinTest(ready(Stream()), ids(), HIDDEN, proofs=proofs) for _ in range(2)]
    order = mixed(HIDDEN)
    assert tests[0].proves(stream_dims(), order)
    monkeypatch.setattr(TwinTest, "permutation_error", lambda *_: 1.0)
    assert tests[1].proves(stream_dims()[::-1], order)  # not tried: the order of dims is nothing
    assert not tests[1].proves(stream_dims()[1:], order)
    assert not tests[1].proves(stream_dims(), order[::-1])
    alone = TwinTest(ready(Stream()), ids(), HIDDEN)
    assert not alone.proves(stream_dims(), order)


class Masked(Stream):
    """Scores of which some are masked, as those of Grounding DINO for words that are not there."""

    def forward(self, ids: Tensor) -> Tensor:
        scores = super().forward(ids)
        return scores.masked_fill(torch.arange(scores.shape[-1]) == 0, -torch.inf)


def test_masked_scores_hide_no_wrong_permutation():
    test = TwinTest(ready(Masked()), ids(), HIDDEN)
    assert test.proves(stream_dims(), mixed(HIDDEN))
    assert not test.proves(stream_dims()[1:], mixed(HIDDEN))


def test_numbers_that_become_undefined_are_a_change():
    test = TwinTest(ready(Stream()), ids(), HIDDEN)
    old = torch.tensor([1.0, torch.nan, 2.0])
    assert test._change(old, old.clone(), range(HIDDEN), {}) == 0.0
    assert test._change(old, torch.tensor([1.0, torch.nan, 3.0]), range(HIDDEN), {}) == 0.5
    assert test._change(old, torch.tensor([torch.nan, 1.0, 2.0]), range(HIDDEN), {}) == torch.inf


def test_nothing_is_proved_where_no_output_depends_on_parameters():
    model = ready(Stream())
    with torch.no_grad():
        test = TwinTest(model, ids(), HIDDEN)
    assert not test.base
    assert not test.proves(stream_dims(), mixed(HIDDEN))


def test_nothing_changes_in_the_same_order():
    test = TwinTest(ready(Stream()), ids(), INNER)
    assert test.permutation_error(ffn_dims(0), range(INNER)) == 0.0
    assert test.permutation_error([ffn_dims(0)[0]], range(INNER)) == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_any_permutation_of_a_right_group_is_neutral(seed: int):
    test = TwinTest(ready(Stream()), ids(), HIDDEN)
    assert test.permutation_error(stream_dims(), mixed(HIDDEN, seed)) < 1e-12


def test_norms_that_compute_in_float32_do_not_hide_a_small_difference():
    """As Llama's do: only in float64 is a right group told from an almost right one."""

    class Lower(Norm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(torch.float32)).to(x.dtype)

    model = Stream()
    model.norm = Lower(HIDDEN)
    assert (
        TwinTest(ready(model), ids(), HIDDEN).permutation_error(stream_dims(), mixed(HIDDEN))
        < 1e-12
    )


def test_random_numbers_in_the_forward_pass_are_always_the_same():
    class Noisy(Stream):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * (1 + torch.rand(1, dtype=torch.float64))

    test = TwinTest(ready(Noisy()), ids(), HIDDEN)
    assert test.proves(stream_dims(), mixed(HIDDEN))


def test_every_tensor_of_the_output_counts():
    class Many(Stream):
        def forward(self, ids: Tensor) -> Any:
            x = self.embed(ids)
            return {"one": (super().forward(ids),), "two": [x.cumsum(-1)[..., :5]], "ids": ids}

    test = TwinTest(ready(Many()), ids(), HIDDEN)
    assert len(test.base) == 2
    assert not test.proves(stream_dims(), mixed(HIDDEN))


# --- nothing is left changed --------------------------------------------------------------------


class Brittle(Stream):
    """Fails at the call that it is told to."""

    fails_in = 10**9

    def forward(self, ids: Tensor) -> Tensor:
        self.fails_in -= 1
        if self.fails_in < 0:
            raise RuntimeError("broken forward pass")
        return super().forward(ids)


@pytest.mark.parametrize("calls", range(3))  # the twins, then one disturbance per group
def test_parameters_come_back_when_a_forward_pass_raises(calls: int):
    model = ready(Brittle())
    test = TwinTest(model, ids(), INNER)
    model.fails_in = calls
    with untouched(model), pytest.raises(RuntimeError, match="broken"):
        test.links(ffn_dims(0) + ffn_dims(1))
    model.fails_in = 0
    with untouched(model), pytest.raises(RuntimeError, match="broken"):
        test.permutation_error(ffn_dims(0), mixed(INNER))


def test_parameters_come_back_when_a_dimension_is_nonsense():
    model = ready(Stream())
    test = TwinTest(model, ids(), HIDDEN)
    nonsense = [*stream_dims(), TensorDim("head.weight", 0)]  # three rows, not twelve
    with untouched(model), pytest.raises((IndexError, RuntimeError)):
        test.permutation_error(nonsense, mixed(HIDDEN))
    with untouched(model), pytest.raises(KeyError):
        test.links([*stream_dims(), TensorDim("no.such.weight", 0)])


def test_the_model_works_as_before():
    model = ready(Stream())
    twin = copy.deepcopy(model)
    test = TwinTest(model, ids(), HIDDEN)
    test.links(stream_dims())
    test.proves(stream_dims(), mixed(HIDDEN))
    assert torch.equal(model(**ids()), twin(**ids()))
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


# --- layouts, by property -----------------------------------------------------------------------


@st.composite
def layouts(draw: st.DrawFn) -> tuple[UnitLayout, int]:
    """A layout and a number of units that goes into its blocks."""
    blocks = draw(st.integers(1, 4))
    layout = UnitLayout(
        draw(st.integers(1, 4)), draw(st.integers(1, 4)), blocks, draw(st.integers(0, 5))
    )
    return layout, blocks * draw(st.integers(1, 5))


@given(layouts())
@settings(max_examples=150, deadline=None)
def test_positions_are_a_partition(case: tuple[UnitLayout, int]):
    layout, units = case
    every = [layout.positions(unit, units) for unit in range(units)]
    size = units * layout.parts * layout.run
    flat = sorted(position for row in every for position in row)
    assert flat == list(range(layout.offset, layout.offset + size))
    assert {len(row) for row in every} == {layout.parts * layout.run}
    assert layout.table(units).tolist() == every


@given(layouts())
@settings(max_examples=150, deadline=None)
def test_positions_are_what_a_reshape_says(case: tuple[UnitLayout, int]):
    layout, units = case
    shape = (layout.blocks, layout.parts, units // layout.blocks, layout.run)
    grid = torch.arange(units * layout.parts * layout.run).view(shape) + layout.offset
    expected = grid.transpose(1, 2).reshape(units, -1)
    assert torch.equal(layout.table(units), expected)


@given(layouts(), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_grouped_units_hold_their_neighbours(case: tuple[UnitLayout, int], size: int):
    layout, units = case
    wide = replace(layout, run=layout.run * size)
    for unit in range(units):
        parts = [layout.positions(unit * size + i, units * size) for i in range(size)]
        together = sorted(position for row in parts for position in row)
        assert sorted(wide.positions(unit, units)) == together


def test_layouts_by_example():
    assert [UnitLayout().positions(unit, 3) for unit in range(3)] == [[0], [1], [2]]
    assert UnitLayout(parts=2).positions(1, 3) == [1, 4]  # gate, then up
    assert UnitLayout(run=2).positions(1, 3) == [2, 3]  # gate and up beside each other; a head
    assert UnitLayout(parts=3, blocks=2).positions(2, 4) == [
        6,
        8,
        10,
    ]  # q, k, v of each of two heads
    assert UnitLayout(offset=5).positions(1, 3) == [6]


class Swamped(nn.Module):
    """Beside numbers of 1e12, what the units of ``w`` add is less than what counts as a change."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, dtype=torch.float64))
        self.large = nn.Parameter(torch.full((3,), 1e12, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.large * x + (self.w * torch.arange(1.0, 5.0)).sum()


def test_units_are_told_apart_where_the_outputs_hardly_show_it() -> None:
    torch.manual_seed(0)
    test = TwinTest(Swamped(), {"x": torch.randn(2, 3, dtype=torch.float64)}, 4)
    assert test.proves([TensorDim("w", 0)], [3, 1, 2, 0])
    assert not test.alike([TensorDim("w", 0)], channel_groups=1)


def test_an_output_may_hold_the_width_several_times() -> None:
    """Tokens side by side: their channels are alike only where the axis is known to hold them."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(3, HIDDEN)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.up(x).flatten(1)
            return out

    model = Beside().double()
    inputs = {"x": torch.randn(2, 4, 3, dtype=torch.float64)}
    dims = [TensorDim("up.weight", 0), TensorDim("up.bias", 0)]
    plain = TwinTest(model, inputs, HIDDEN)
    assert plain.links(dims).unequal
    assert plain.multiples() == {4}
    assert not TwinTest(model, inputs, HIDDEN, (1, 4)).links(dims).unequal


def test_a_map_of_features_may_hold_the_width_several_times() -> None:
    """Its channels stand before height and width, as often as a dimension of the width says."""

    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(2, HIDDEN, 1), nn.Conv2d(HIDDEN, 2 * HIDDEN, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.second(torch.tanh(self.first(x)))
            return out

    model = Maps().double()
    inputs = {"x": torch.randn(2, 2, 5, 5, dtype=torch.float64)}
    twice = UnitLayout(parts=2)
    dims = [TensorDim("second.weight", 0, twice), TensorDim("second.bias", 0, twice)]
    plain = TwinTest(model, inputs, HIDDEN)
    assert plain.links(dims).unequal
    assert plain.multiples() == set()
    assert plain.multiples(per_unit={1, 2}) == {2}
    assert found(TwinTest(model, inputs, HIDDEN, (1, 2)).links(dims)) == {frozenset(dims)}
