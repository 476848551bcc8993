"""Memory that glibc keeps and objects that the garbage collector skips while experiments run."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from tp_hf_config.model import surroundings
from tp_hf_config.model.surroundings import memory_kept, old_objects_aside

PAGES_OF_THREE_TENSORS = """
import ctypes
import resource
import torch
from tp_hf_config.model.surroundings import memory_kept

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages, which would be few

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(2**24)  # freed at once
    return round((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / PAGES)

PAGES = 2**26 // resource.getpagesize()
print(new_pages())
with memory_kept():
    with memory_kept():
        print(new_pages())
    print(new_pages())
print(new_pages())
"""


@pytest.mark.skipif(surroundings._glibc() is None, reason="another C library")
def test_freed_memory_is_used_again_and_given_back_at_the_end() -> None:
    command = [sys.executable, "-c", PAGES_OF_THREE_TENSORS]  # what was freed before would matter
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["3", "1", "0", "3"]


@pytest.mark.parametrize("variable", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_user_has_set_stays(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(surroundings, "_glibc", lambda: pytest.fail("it was changed"))
    with memory_kept():
        pass


@pytest.fixture
def _nothing_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a user's process; that of the tests freezes what their imports left."""
    gc.unfreeze()
    monkeypatch.setattr(surroundings, "_frozen_by_others", False)


@pytest.mark.usefixtures("_nothing_frozen")
def test_old_objects_are_collected_again_afterwards() -> None:
    old: list[object] = []
    with old_objects_aside():
        with old_objects_aside():
            assert gc.get_freeze_count() > 0
        new: list[object] = []
        assert not any(one is old for one in gc.get_objects())
        assert any(one is new for one in gc.get_objects())
    assert gc.get_freeze_count() == 0
    assert any(one is old for one in gc.get_objects())


@pytest.mark.usefixtures("_nothing_frozen")
def test_objects_that_others_froze_stay_frozen() -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    new: list[object] = []
    with old_objects_aside():
        assert any(one is new for one in gc.get_objects())
    assert gc.get_freeze_count() >= frozen - 10  # a few have died meanwhile
