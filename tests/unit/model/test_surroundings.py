"""Memory that glibc keeps while experiments run."""

from __future__ import annotations

import resource

import pytest
import torch

from tp_hf_config.model import surroundings
from tp_hf_config.model.surroundings import memory_kept

PAGES = 2**24 * 4 // resource.getpagesize()


def new_pages() -> int:
    """How many pages the system cleared for a tensor that is freed at once."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(surroundings._glibc() is None, reason="another C library")
def test_freed_memory_is_used_again_and_given_back_at_the_end() -> None:
    with memory_kept():
        with memory_kept():
            new_pages()
        assert new_pages() < PAGES // 10
    assert new_pages() > PAGES * 9 // 10


@pytest.mark.parametrize("variable", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_user_has_set_stays(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(surroundings, "_glibc", lambda: pytest.fail("it was changed"))
    with memory_kept():
        pass
