"""Memory that glibc keeps while experiments run."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tp_hf_config.model import surroundings
from tp_hf_config.model.surroundings import memory_kept

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
