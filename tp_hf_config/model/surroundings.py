"""Run experiments without a trace: one at a time, random numbers as before, nothing printed."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ONE_AT_A_TIME = threading.RLock()
"""Held by the thread that learns a class, experiments with it or builds it.

While it does, it replaces what all threads share: torch's default dtype, methods of config classes,
functions of torch and Transformers.
"""
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _MMAP_MAX = -3, -1, -4
"""The numbers of parameters in glibc's malloc.h."""
_LARGEST = 2**25
"""Bytes: the largest ``_MMAP_THRESHOLD`` that glibc chooses by itself; it trims at twice that."""
_MAPPED = 2**16
"""How many blocks glibc maps at most, if nothing is said."""
_UNKNOWN = 4 * 2**30
"""Bytes that count as free where the system does not say how many are."""
_keeps_memory = False
_frozen_by_others = False
"""True once other code froze objects: to count them takes the longer the more there are."""
_frozen_here = False


@contextmanager
def one_thread() -> Iterator[None]:
    """While open, torch uses one thread: on tiny tensors, several only wait for each other."""
    import torch  # the shell asks for the other one before it needs torch

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def memory_kept() -> Iterator[None]:
    """While open, glibc keeps memory that was freed, for the next pass of an experiment.

    It would give large blocks back to the system, and clearing their pages anew takes as long as
    what is computed in them (Aria). Other C libraries go on as they do, and so does glibc if the
    environment sets its parameters.
    """
    global _keeps_memory
    set_by_user = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    libc = None if set_by_user or _keeps_memory else _glibc()
    if libc is None:
        yield
        return
    _keeps_memory = True
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_MAX, _MAPPED)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)
        libc.malloc_trim(0)
        _keeps_memory = False


def _glibc() -> Any:
    """Return the C library if it is glibc, else None."""
    with suppress(OSError, AttributeError, TypeError):  # Windows, macOS, musl
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version, libc.mallopt, libc.malloc_trim  # noqa: B018
        return libc
    return None


@contextmanager
def old_objects_aside() -> Iterator[None]:
    """While open, the garbage collector skips objects that there were before.

    Hundreds of builds and passes trigger it, and it would look at all of them each time.
    """
    global _frozen_by_others, _frozen_here
    if not _frozen_here:
        _frozen_by_others = _frozen_by_others or gc.get_freeze_count() > 0
    if _frozen_here or _frozen_by_others:
        yield
        return
    gc.freeze()
    _frozen_here = True
    try:
        yield
    finally:
        gc.unfreeze()
        _frozen_here = False


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
    """Return torch's generators of the CPU and of devices in use."""
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


@contextmanager
def quiet_transformers(level: int = logging.ERROR) -> Iterator[None]:
    """While open, Transformers shows no progress bars, and only log lines from ``level`` up."""
    from transformers.utils import logging as untyped

    bars: Any = untyped
    logger = logging.getLogger("transformers")
    before, shown = logger.level, bars.is_progress_bar_enabled()
    try:
        logger.setLevel(level)
        bars.disable_progress_bar()
        yield
    finally:
        logger.setLevel(before)
        if shown:
            bars.enable_progress_bar()


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


def restore_attribute(target: Any, name: str, own: Any) -> None:
    """Give an object its own attribute back; without one (``None``), its class's applies again."""
    vars(target).pop(name, None)
    if own is not None:
        setattr(target, name, own)
