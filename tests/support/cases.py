"""Cases of the matrix, of which ``make test`` runs some and ``make test-all`` all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


def some_in_make_test(cases: Iterable[T], in_make_test: Callable[[T], bool]) -> list[Any]:
    """Parameters, named as the cases are; ``make test`` leaves out those marked ``full``."""
    return [
        pytest.param(case, id=str(case), marks=() if in_make_test(case) else pytest.mark.full)
        for case in cases
    ]
