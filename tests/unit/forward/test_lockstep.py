"""Forward passes in lockstep: each weight is read once for all of them."""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tp_hf_config.forward.lockstep import Lockstep, stages_of
from tp_hf_config.model.lazy_tensor import LazyTensor

WIDTH, LAYERS, PASSES = 8, 4, 5
PLENTY = 1 << 20
ROW = 4 * WIDTH  # bytes


class Model(nn.Module):
    """A stem, layers in a list, and a head; each weight counts how often it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.stem = nn.Linear(WIDTH, WIDTH, bias=False)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 3, bias=False)
        generator = torch.Generator().manual_seed(0)
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                values = torch.randn(layer.weight.shape, generator=generator)
                lazy = LazyTensor(values.to("meta"), partial(self.read, name, values))
                layer.weight = nn.Parameter(lazy, requires_grad=False)

    def read(self, name: str, values: Tensor) -> Tensor:
        self.reads.append(name)
        return values.clone()

    def forward(self, x: Tensor, order: Sequence[int] = range(LAYERS)) -> Tensor:
        x = self.stem(x)
        for number in order:
            x = self.layers[number](x).tanh()
        result: Tensor = self.head(x) + self.head(x)
        return result


INPUTS = [torch.full((1, WIDTH), 0.1 * number) for number in range(PASSES)]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.fixture
def model() -> Model:
    return Model()


def run(
    model: Model, passes: Sequence[Callable[[], Any]], memory: int = PLENTY, **options: Any
) -> tuple[list[Tensor], Lockstep]:
    results: list[Tensor] = []
    lockstep = Lockstep(model, memory, **options)

    def after(number: int, result: Tensor) -> None:
        assert number == len(results)
        results.append(result)

    try:
        lockstep.run(passes, after)
    finally:
        assert not any(m._forward_pre_hooks for m in model.modules())
    return results, lockstep


def passes_of(model: Model, *orders: Sequence[int]) -> list[Callable[[], Any]]:
    """Passes through the layers in these orders; without orders, five in the usual one."""
    chosen = orders or (range(LAYERS),) * PASSES
    return [partial(model, x, order) for x, order in zip(INPUTS, chosen, strict=False)]


def assert_as_alone(model: Model, results: list[Tensor], *orders: Sequence[int]) -> None:
    alone = [each() for each in passes_of(model, *orders)]
    assert len(results) == len(alone)
    assert all(torch.equal(*pair) for pair in zip(results, alone, strict=True))


def test_each_weight_is_read_once_for_all(model: Model) -> None:
    ends: list[int] = []
    steps: list[None] = []
    results, lockstep = run(
        model,
        passes_of(model),
        stage_done=lambda: ends.append(len(model.reads)),
        advance=lambda: steps.append(None),
    )
    assert model.reads == ["stem", *(f"layers.{n}" for n in range(LAYERS)), "head"]
    assert ends == [1, 2, 3, 4, 5, 6]
    assert len(steps) == lockstep.steps * PASSES == 30
    assert lockstep.in_order
    assert_as_alone(model, results)


@pytest.mark.parametrize(("waiting", "groups"), [(3, 2), (4, 2), (5, 1)])
def test_as_many_go_together_as_memory_holds(model: Model, waiting: int, groups: int) -> None:
    """A fifth of it is for what they hold, a row each; the rest has room for all weights here."""
    results, _ = run(model, passes_of(model), 5 * waiting * ROW)
    assert {model.reads.count(f"layers.{n}") for n in range(LAYERS)} == {groups}
    assert_as_alone(model, results)


@pytest.mark.parametrize(
    ("rows", "read"),
    [
        (2, {"layers.3": PASSES, "head": 2 * PASSES}),
        (3, {"layers.3": PASSES, "head": 1}),  # the head's rows
        (WIDTH, {"layers.3": 1, "head": 1}),
    ],
)
def test_weights_are_held_as_far_as_memory_goes(
    model: Model, rows: int, read: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lockstep = Lockstep(model, PLENTY)
    monkeypatch.setattr(lockstep, "_for_weights", rows * ROW)
    lockstep.run(passes_of(model), lambda number, result: None)
    assert {name: model.reads.count(name) for name in read} == read


@pytest.mark.parametrize(
    ("orders", "reads"),
    [
        (
            [(0, 1, 2, 3), (0, 3), (3,), ()],
            7,
        ),  # those behind catch up, but for the head of the last
        ([(0, 1, 2, 3), (3, 2, 1, 0)], 10),  # in another order: less is shared
        ([(0, 0, 0, 1), (0, 0, 1)], 4),  # a layer several times in a row is one stage
    ],
)
def test_passes_that_go_other_ways(model: Model, orders: Any, reads: int) -> None:
    results, lockstep = run(model, passes_of(model, *orders))
    assert len(model.reads) == reads
    assert lockstep.in_order
    assert_as_alone(model, results, *orders)


class TestTheOrderOfUses:
    @pytest.mark.parametrize(
        ("orders", "in_order"),
        [
            ([(0, 1), (0, 1)], True),
            ([(0, 0, 1), (0, 0, 1)], True),
            ([(0, 1, 0), (0, 1)], False),  # the first pass comes back after the second
            ([(0, 1, 0)], True),
        ],
    )
    def test_a_layer_that_is_come_back_to(self, model: Model, orders: Any, in_order: bool) -> None:
        lockstep = Lockstep(model, PLENTY)
        for number, layer in enumerate(model.layers):
            layer.register_forward_hook(lambda *_, number=number: lockstep.note_use(number))
        lockstep.run(passes_of(model, *orders), lambda number, result: None)
        assert lockstep.in_order is in_order

    @pytest.mark.parametrize(("draws_at", "in_order"), [((0,), True), ((0, 2), False)])
    def test_random_numbers(self, model: Model, draws_at: Sequence[int], in_order: bool) -> None:
        for place in draws_at:
            model.layers[place].register_forward_hook(lambda *_: torch.rand(1) and None)
        _, lockstep = run(model, passes_of(model))
        assert lockstep.in_order is in_order


class Interrupted(BaseException):
    """As an interrupt, but nobody else raises it."""


class TestWhatFails:
    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Interrupted])
    @pytest.mark.parametrize("place", [0, 2])
    def test_an_error_in_a_pass_ends_all(
        self, model: Model, error: type[BaseException], place: int
    ) -> None:
        calls: list[int] = []
        ended: list[int] = []

        def fail(*_: Any) -> None:
            calls.append(place)
            if len(calls) == 3:
                raise error("here")

        def work(number: int) -> Tensor:
            try:
                result: Tensor = model(INPUTS[number])
                return result
            finally:
                ended.append(number)

        model.layers[place].register_forward_hook(fail)
        with pytest.raises(error, match="here"):
            run(model, [partial(work, number) for number in range(PASSES)])
        assert len(calls) == 3
        assert sorted(ended) == [0, 1, 2, 3, 4]

    def test_an_interrupt_from_outside(self, model: Model) -> None:
        """It comes to the main thread, while a pass runs in another one."""
        waited = threading.Event()

        def interrupt(*_: Any) -> None:
            _thread.interrupt_main()
            waited.wait(0.2)

        model.layers[1].register_forward_hook(interrupt)
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background
        try:
            with pytest.raises(KeyboardInterrupt):
                run(model, passes_of(model))
        finally:
            signal.signal(signal.SIGINT, handler)
        assert model.reads == ["stem", "layers.0", "layers.1"]

    @pytest.mark.parametrize("where", ["after", "stage_done", "about_to_wait", "advance"])
    def test_an_error_of_a_function_that_is_called(self, model: Model, where: str) -> None:
        def fail(*_: Any) -> None:
            raise ValueError("there")

        options: dict[str, Any] = {} if where == "after" else {where: fail}
        lockstep = Lockstep(model, PLENTY, **options)
        after = fail if where == "after" else lambda number, result: None
        with pytest.raises(ValueError, match="there"):
            lockstep.run(passes_of(model), after)
        assert not any(m._forward_pre_hooks for m in model.modules())


class Doubling(TorchFunctionMode):
    """Doubles what linear layers give."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return 2 * result if func is nn.functional.linear else result


@pytest.mark.parametrize(
    "switch",
    [
        torch.no_grad,
        torch.inference_mode,
        partial(torch.autocast, "cpu", dtype=torch.bfloat16),
        partial(torch.device, "cpu"),
        Doubling,
    ],
)
def test_what_torch_has_switched_on_is_so_in_every_pass(
    model: Model, switch: Callable[[], Any]
) -> None:
    x = INPUTS[1].clone().requires_grad_()
    work = partial(model, x)
    with switch():
        (result, other), _ = run(model, [work, work])
        alone = work()
    for each in (result, other):
        assert torch.equal(each, alone)
        assert each.dtype == alone.dtype
        assert each.requires_grad == alone.requires_grad
        assert each.is_inference() == alone.is_inference()


def test_stages_are_the_outermost_of_lists_that_fit() -> None:
    def layer() -> nn.Module:
        return nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(8, 8, False) for _ in range(3))})

    layers = nn.ModuleList([layer(), nn.Linear(8, 8, False)])
    model = nn.ModuleDict({"stem": nn.Linear(8, 8), "layers": layers})
    assert stages_of(model, PLENTY) == [*layers]
    first: Any = layers[0]
    assert stages_of(model, 8 * ROW) == [*first["experts"], layers[1]]
    assert stages_of(model, 0) == [*first["experts"], layers[1]]
    assert stages_of(nn.Linear(8, 8), PLENTY) == []
