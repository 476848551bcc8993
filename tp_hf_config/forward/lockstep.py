"""Forward passes in lockstep: weights that are read from files are read once for many passes.

Every pass has a thread of its own, and one of them runs at a time.  Where a layer is entered, a
pass waits for the others; then one after the other runs through the layer, whose weights stay in
memory meanwhile.  Nothing has to be known of the model but its lists of layers: passes that go
another way are never waited for in vain, they only share fewer reads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor, nn, overrides
from torch.utils import _python_dispatch
from torch.utils._pytree import tree_leaves

from ..model.lazy_tensor import holding

_THREADS = 1024  # of all passes together: each has as many as torch computes with
_STACK = 1 << 23  # bytes, as Linux gives the first thread: macOS gives others far less
_LISTS = (nn.ModuleList, nn.Sequential)
_functions: Any = overrides
_operations: Any = _python_dispatch


class Lockstep:
    """Runs forward passes together.

    Args:
        model: the model.
        memory: how many bytes passes that wait may hold, and weights that stay in memory: a fifth,
            and the rest.
        used: lazy tensors that passes use beside the model's parameters.
        stage_done: called whenever all passes have run through a layer.
        about_to_wait: called by each pass, in its own thread, before it waits.
        advance: called whenever one pass has run through one layer.

    Attributes:
        steps: how often ``advance`` will be called for each pass, where every layer runs once.
        in_order: False if a pass used something (:meth:`note_use`), or drew random numbers, after
            a later pass did: sums were made in another order than by one pass after the other.
    """

    def __init__(
        self,
        model: nn.Module,
        memory: int,
        used: Iterable[Tensor] = (),
        *,
        stage_done: Callable[[], None] = lambda: None,
        about_to_wait: Callable[[], None] = lambda: None,
        advance: Callable[[], object] = lambda: None,
    ):
        self._tensors = [*model.parameters(), *used]
        self._for_passes = memory // 5
        self._for_weights = memory - self._for_passes
        self._stages = list(dict.fromkeys(stages_of(model, self._for_weights)))
        self._last = _last_in_lists(model).intersection(self._stages)
        self._stage_done, self._about_to_wait = stage_done, about_to_wait
        self._advance = advance
        self._running: _Pass | None = None
        self._latest: dict[Hashable, int] = {}
        self.steps = len(self._stages) + len(self._last) + 1
        self.in_order = True

    def run(self, passes: Sequence[Callable[[], Any]], after: Callable[[int, Any], None]) -> None:
        """Run passes, in groups of as many as may wait at a time.

        Whatever a pass raises is raised here, and no pass goes on.

        Args:
            passes: run the model once each.
            after: gets the number and the result of each pass, in the order of ``passes``.
        """
        with holding(self._tensors, self._for_weights) as held, self._hooks():
            waiting = [_Pass(number, work) for number, work in enumerate(passes)]
            results = _InOrder(after)
            while waiting:
                group: list[_Pass] = []
                try:
                    self._start(waiting, group, results)
                    self._end_stage(held.forget)
                    while group := [each for each in group if not each.done]:
                        self._run_first(group, results)
                        self._end_stage(held.forget)
                finally:
                    for each in group:
                        each.stop()
                    self._running = None

    def note_use(self, what: Hashable) -> None:
        """Note that the pass that runs uses something."""
        if self._running is not None:
            number = self._running.number
            self.in_order &= self._latest.get(what, 0) <= number
            self._latest[what] = number

    def _start(self, waiting: list[_Pass], group: list[_Pass], results: _InOrder) -> None:
        """Run passes up to their first layer, until those that wait hold enough."""
        room, most = self._for_passes, max(1, _THREADS // torch.get_num_threads())
        while waiting and len(group) < most and (not group or room >= group[-1].holds):
            group.append(waiting.pop(0))
            self._go_on(group[-1], results)
            room -= group[-1].holds

    def _run_first(self, group: Sequence[_Pass], results: _InOrder) -> None:
        """Run those passes through a layer that wait at the first of all."""
        place = min(each.place for each in group)
        for each in group:
            if each.place == place:
                self._go_on(each, results)

    def _go_on(self, each: _Pass, results: _InOrder) -> None:
        self._running = each
        random = torch.get_rng_state()
        each.go_on()
        if not torch.equal(random, torch.get_rng_state()):
            self.note_use(None)
        self._advance()
        if each.done:
            results.add(each.number, each.result)
            each.result = None

    def _end_stage(self, forget: Callable[[], None]) -> None:
        forget()
        self._stage_done()

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        """Let passes wait where layers are entered, and where a list's last one is left."""
        with ExitStack() as stack:
            for number, stage in enumerate(self._stages):
                before, after = (self._waiting_at(2 * number + side) for side in (0, 1))
                handles = [stage.register_forward_pre_hook(before, prepend=True, with_kwargs=True)]
                if stage in self._last:
                    handles.append(stage.register_forward_hook(after))
                for handle in handles:
                    stack.callback(handle.remove)
            yield

    def _waiting_at(self, place: int) -> Callable[..., None]:
        def wait(layer: nn.Module, *values: Any) -> None:
            each = self._running
            if each is not None and each.waits_at(place):
                self._about_to_wait()
                each.wait(values)

        return wait


def stages_of(module: nn.Module, memory: int, listed: bool = False) -> list[nn.Module]:
    """Return the modules that stand in lists, such as decoder layers: the outermost that fit.

    Args:
        module: the model, or a part of it.
        memory: the bytes of parameters that fit into memory; of larger ones, those inside.
        listed: True if the module itself stands in a list.
    """
    if listed and sum(each.nbytes for each in module.parameters()) <= memory:
        return [module]
    in_list = isinstance(module, _LISTS)
    inside = [stage for child in module.children() for stage in stages_of(child, memory, in_list)]
    return inside or ([module] if listed else [])


def _last_in_lists(model: nn.Module) -> set[nn.Module]:
    """Return the last modules of all lists; one that is alone in its list may run again."""
    lists = [list(each.children()) for each in model.modules() if isinstance(each, _LISTS)]
    return {each[-1] for each in lists if len(each) > 1}


class _Stopped(BaseException):
    """Ends a pass that waits; no ``except Exception`` of a model takes it."""


class _Pass:
    """One forward pass, in a thread that runs only while :meth:`go_on` waits for it.

    Args:
        number: its place among all passes.
        work: runs the model.

    Attributes:
        number: as given.
        place: the number of the place that it waits at; -1: it has not begun.
        holds: the bytes of what is handed on there.
        done: True once it has ended.
        result: what ``work`` has returned.
    """

    def __init__(self, number: int, work: Callable[[], Any]):
        self.number, self.place, self.holds = number, -1, 0
        self.done, self.result = False, None
        self._work = work
        self._error: BaseException | None = None
        self._visited: set[int] = set()
        self._stopping = False
        self._turn, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._thread: threading.Thread | None = None

    def go_on(self) -> None:
        """Run it until it waits or ends; raise what it raises."""
        if self._thread is None:
            self._thread = _start_thread(copy_context().run, self._run, _TorchState())
        self._turn.release()
        self._paused.acquire()
        if self.done:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End it, if it has begun; if it runs, where it would wait next."""
        self._stopping = True
        self._turn.release()
        if self._thread is not None:
            self._thread.join()
        self._error = None  # its frames hold tensors

    def waits_at(self, place: int) -> bool:
        """True if the pass that calls this comes to a place for the first time.

        A layer that runs several times in a row is one stage.
        """
        here = self._thread is threading.current_thread() and place not in self._visited
        if here:
            self._visited.add(place)
            self.place = place
        return here

    def wait(self, given: Any) -> None:
        """Let the others run; ``given`` is what is handed on."""
        tensors = [value for value in tree_leaves(given) if isinstance(value, Tensor)]
        storages = [value.untyped_storage() for value in tensors]
        self.holds = sum({each.data_ptr(): each.nbytes() for each in storages}.values())
        self._paused.release()
        self._turn.acquire()
        if self._stopping:
            raise _Stopped

    def _run(self, state: _TorchState) -> None:
        self._turn.acquire()
        try:
            if not self._stopping:
                with state.entered():
                    self.result = self._work()
        except _Stopped:
            pass
        except BaseException as error:  # an interrupt too: it is raised where the others run
            self._error = error
        finally:
            self.done = True
            self._paused.release()


def _start_thread(target: Callable[..., Any], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, daemon=True)
    before = threading.stack_size(_STACK)
    try:
        thread.start()
    finally:
        threading.stack_size(before)
    return thread


class _TorchState:
    """What torch has switched on in the thread that makes this: a new thread has none of it."""

    def __init__(self) -> None:
        self._inference, self._gradients = (
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
        )
        self._autocast: dict[str, Any] = {
            "dtype": torch.get_autocast_dtype("cpu"),
            "enabled": torch.is_autocast_enabled("cpu"),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        self._modes: list[tuple[Any, Any]] = [
            *((_functions, mode) for mode in _functions._get_current_function_mode_stack()),
            *((_operations, mode) for mode in _operations._get_current_dispatch_mode_stack()),
        ]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Have the same switched on while the block runs."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._gradients))
            stack.enter_context(torch.autocast("cpu", **self._autocast))
            for kind, mode in self._modes:  # not entered anew: some would forget what they counted
                kind._push_mode(mode)
                stack.callback(kind._pop_mode)
            yield


class _InOrder:
    """Hands results on in the order of their numbers, whenever they come.

    Args:
        after: gets each number and result.
    """

    def __init__(self, after: Callable[[int, Any], None]):
        self._after, self._next = after, 0
        self._early: dict[int, Any] = {}

    def add(self, number: int, result: Any) -> None:
        """Hand a result on once those before it have been."""
        self._early[number] = result
        while self._next in self._early:
            self._after(self._next, self._early.pop(self._next))
            self._next += 1
