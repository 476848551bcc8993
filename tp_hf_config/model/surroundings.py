"""Run experiments without a trace: one at a time, random numbers as before, nothing printed."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Iterator, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ONE_AT_A_TIME = threading.RLock()
"""Held by the thread that learns a class, experiments with it or builds it.

What was learned is kept for all threads, and :func:`replaced` functions are looked up by all.
"""
_UNKNOWN = 4 * 2**30
"""Bytes that count as free where the system does not say how many are."""


@contextmanager
def one_thread() -> Iterator[None]:
    """While open, torch computes on one core for this thread; tiny tensors gain nothing by more.

    Torch's setting is that of the thread that sets it, and that with which new threads begin. So
    another thread sets the second one as it was.
    """
    import torch  # the shell asks for the other one before it needs torch

    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    as_before = threading.Thread(target=torch.set_num_threads, args=(threads,))
    try:
        torch.set_num_threads(1)
        as_before.start()
        as_before.join()
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def plain_autograd() -> Iterator[None]:
    """While open, gradients are computed and nothing is cast, whatever the caller has switched.

    Experiments follow gradients in float64: ``no_grad``, ``inference_mode`` and ``autocast`` around
    a call of this library would make all units look alike. New tensors are on the CPU.
    """
    import torch

    uncast = torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), uncast[0], uncast[1], on_cpu():
        yield


def on_cpu() -> AbstractContextManager[Any]:
    """Return what puts new tensors on the CPU if the caller has set another default device.

    Else it does nothing: torch asks a device that is set at every call.
    """
    import torch

    return nullcontext() if torch.empty(0).device.type == "cpu" else torch.device("cpu")


@contextmanager
def same_random_state(seed: int | None = None) -> Iterator[None]:
    """Let torch's random numbers go on afterwards as if none had been drawn while this is open.

    ``seed``: of all generators, while this is open. ``torch.manual_seed`` would seed devices that
    are not in use too, whose state cannot be restored.
    """
    generators = _generators_in_use()
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators if seed is not None else ():
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _generators_in_use() -> list[Any]:
    import torch

    generators: list[Any] = [torch.default_generator]
    devices: tuple[Any, ...] = torch.cuda, torch.xpu
    for device in devices:
        if device.is_initialized():
            generators += device.default_generators
    if torch.backends.mps.is_available():
        generators.append(torch.mps._get_default_mps_generator())
    return generators


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Switch dropout and the like off, and restore each module's training mode afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


class _FromOtherThreads(logging.Filter):
    """Lets log lines of the thread that made it pass only from a level on; all those of others."""

    def __init__(self, level: int):
        super().__init__()
        self._level, self._thread = level, threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= self._level or threading.get_ident() != self._thread


@contextmanager
def no_log_lines(level: int) -> Iterator[None]:
    """While open, Transformers shows this thread's log lines only from ``level`` up.

    A level would hold for all threads, and it would empty the caches of a thousand loggers.
    """
    logger: logging.Logger | None = logging.getLogger("transformers")
    handlers: list[logging.Handler] = []
    while logger is not None:
        handlers += logger.handlers
        logger = logger.parent if logger.propagate else None
    own = _FromOtherThreads(level)
    for handler in handlers:
        handler.addFilter(own)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(own)


@contextmanager
def quiet_transformers(level: int = logging.ERROR) -> Iterator[None]:
    """While open, Transformers shows no progress bars, and only log lines from ``level`` up.

    Log lines of other threads appear as before. Of progress bars it has one switch for all threads.
    """
    from transformers.utils import logging as untyped

    bars: Any = untyped
    with no_log_lines(level):
        shown = bars.is_progress_bar_enabled()
        try:
            bars.disable_progress_bar()
            yield
        finally:
            if shown:
                bars.enable_progress_bar()


@contextmanager
def replaced(owner: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """While open, another library's function is ``replacement`` for calls from this thread.

    Calls from other threads go to the function that there was. This is for what torch and
    Transformers give no other way to: they look the function up in a module or class, which all
    threads share.
    """
    with ONE_AT_A_TIME:
        own, original = vars(owner).get(name), getattr(owner, name)
        threads = {threading.get_ident()}
        by_thread = _class_by_thread if isinstance(original, type) else _by_thread
        setattr(owner, name, by_thread(original, replacement, threads))
        try:
            yield
        finally:
            threads.clear()  # a module that was imported meanwhile may keep the function
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)


def _by_thread(original: Any, replacement: Callable[..., Any], threads: Set[int]) -> Any:
    @wraps(original)
    def by_thread(*args: Any, **kwargs: Any) -> Any:
        function = replacement if threading.get_ident() in threads else original
        return function(*args, **kwargs)

    return by_thread


def _class_by_thread(original: Any, replacement: Callable[..., Any], threads: Set[int]) -> Any:
    def __new__(cls: Any, *args: Any, **kwargs: Any) -> Any:
        own = threading.get_ident() in threads
        return replacement(*args, **kwargs) if own else original.__new__(cls)

    # a subclass: other threads may ask isinstance, or derive from it
    return type(original.__name__, (original,), {"__new__": __new__})


def without_caches() -> AbstractContextManager[None]:
    """While open, Transformers' classes compute what they would otherwise take from a cache.

    Some classes cache what they compute from sizes alone (positions of patches, sinusoids) for all
    their models, by the dtype that is asked for. In an experiment the result is float64 whatever
    was asked for; in a pass without data it may have no numbers. A live model with as many patches
    would read it. Transformers uses no cache while torch compiles
    (``pytorch_utils.compile_compatible_method_lru_cache``), so these passes tell it that torch
    does. There is no other way.
    """
    from transformers import pytorch_utils

    return replaced(pytorch_utils, "is_torchdynamo_compiling", lambda: True)


def free_memory(device: torch.device | None = None) -> int:
    """Return how many bytes are free on a device, or on this machine for devices that share them.

    Linux (where pages of files count as free) and Windows say it. macOS says only how much memory
    there is: half of it counts as free. Where nothing is said it is ``_UNKNOWN``.
    """
    if device is not None:
        import torch

        asked: Any = getattr(getattr(torch, device.type, None), "mem_get_info", None)
        if asked is not None:
            return int(asked(device)[0])
    with suppress(OSError, StopIteration):
        with open("/proc/meminfo", encoding="ascii") as lines:
            line = next(line for line in lines if line.startswith("MemAvailable"))
        return 1024 * int(line.split()[1])
    windows: Any = getattr(ctypes, "windll", None)
    status = (ctypes.c_uint64 * 8)(64)  # MEMORYSTATUSEX: its size, memory, free memory, ...
    if windows is not None and windows.kernel32.GlobalMemoryStatusEx(status):
        return status[2]
    with suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return _UNKNOWN
