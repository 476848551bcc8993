"""Run experiments without side effects: one at a time, random state restored, nothing printed."""

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


_TORCH_SAYS = "out of memory", "tried to allocate", "alloc_failed"  # torch's errors, of any device
_noted = False


def is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(said in text for said in _TORCH_SAYS)
    )


def raise_shortage(error: Exception) -> None:
    """Raise an error again if it is about memory or time, and so not about the model."""
    if isinstance(error, TimeoutError) or is_out_of_memory(error):
        raise error


def note_shortage(error: Exception) -> None:
    """Note an error about memory before it becomes a refusal; raise those about time again."""
    global _noted
    if isinstance(error, (MemoryError, TimeoutError)):
        raise error
    # still a refusal: sizes that are tried may fit on no machine. On another machine they may fit,
    # so this process writes nothing more to the disk cache
    _noted = _noted or is_out_of_memory(error)


def shortage_noted() -> bool:
    return _noted


# held while a class is learned, built or tried out: threads share what is learned or replaced
ONE_AT_A_TIME = threading.RLock()
_UNKNOWN = 4 * 2**30  # bytes that count as free if the system does not report free memory


@contextmanager
def one_thread() -> Iterator[None]:
    """While open, this thread runs torch on one core: more do not speed up tiny tensors."""
    import torch  # the command line imports this module before it needs torch

    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    # set_num_threads also sets the number for new threads: restore that
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
    """Enable gradients in full precision, on the CPU, whatever the caller has set."""
    import torch

    # under no_grad, inference_mode or autocast all units would look alike
    uncast = torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), uncast[0], uncast[1], on_cpu():
        yield


def on_cpu() -> AbstractContextManager[Any]:
    """Put new tensors on the CPU if a default device is set, which torch consults at every call."""
    import torch

    return nullcontext() if torch.empty(0).device.type == "cpu" else torch.device("cpu")


@contextmanager
def same_random_state(seed: int | None = None) -> Iterator[None]:
    """Restore the state of the random generators in use; ``seed`` them while it is open."""
    generators = _generators_in_use()
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators if seed is not None else ():
            # torch.manual_seed also seeds unused devices, whose state cannot be restored
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
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


class _FromOtherThreads(logging.Filter):
    """Drops log lines below a level, but only from the thread that created it."""

    def __init__(self, level: int):
        super().__init__()
        self._level, self._thread = level, threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= self._level or threading.get_ident() != self._thread


@contextmanager
def no_log_lines(level: int) -> Iterator[None]:
    """While open, this thread's Transformers log shows only lines of at least ``level``."""
    logger: logging.Logger | None = logging.getLogger("transformers")
    handlers: list[logging.Handler] = []
    while logger is not None:
        handlers += logger.handlers
        logger = logger.parent if logger.propagate else None
    # setLevel would affect all threads, and clear the caches of a thousand loggers
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
    """:func:`no_log_lines`, and no progress bars in any thread: they have one switch."""
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
    """While open, this thread's calls of a library function call ``replacement``.

    Only for functions that are looked up in a module or class, and have no other switch.
    """
    with ONE_AT_A_TIME:
        own, original = vars(owner).get(name), getattr(owner, name)
        threads = {threading.get_ident()}
        by_thread = _class_by_thread if isinstance(original, type) else _by_thread
        setattr(owner, name, by_thread(original, replacement, threads))
        try:
            yield
        finally:
            threads.clear()  # a module imported meanwhile may hold the wrapper
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
    """While open, Transformers' classes compute what they would read from a cache.

    Some classes cache what they compute from sizes (positions of patches, sinusoids) for all their
    models, by requested dtype. Experiments would put float64 or meta tensors there, and a live
    model would read them. Transformers bypasses these caches while torch compiles
    (``pytorch_utils.compile_compatible_method_lru_cache``), so this pretends that torch compiles.
    There is no other way.
    """
    from transformers import pytorch_utils

    return replaced(pytorch_utils, "is_torchdynamo_compiling", lambda: True)


def free_memory(device: torch.device | None = None) -> int:
    """Free bytes on a device, or on this machine for devices that share its memory."""
    if device is not None:
        import torch

        asked: Any = getattr(getattr(torch, device.type, None), "mem_get_info", None)
        if asked is not None:
            return int(asked(device)[0])
    with suppress(OSError, StopIteration):
        with open("/proc/meminfo", encoding="ascii") as lines:
            # includes the page cache
            line = next(line for line in lines if line.startswith("MemAvailable"))
        return 1024 * int(line.split()[1])
    windows: Any = getattr(ctypes, "windll", None)
    status = (ctypes.c_uint64 * 8)(64)  # MEMORYSTATUSEX: its size, memory, free memory, ...
    if windows is not None and windows.kernel32.GlobalMemoryStatusEx(status):
        return status[2]
    with suppress(AttributeError, OSError, ValueError):
        # macOS reports only the total
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return _UNKNOWN
