"""Models that are going to be reloaded in a fresh process, and what that process has to find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def assert_reloaded(result: dict[str, Any]) -> None:
    """A fresh process got the same model: weights, outputs, generated tokens and config."""
    assert "error" not in result, result["error"]
    assert result["loading"] == {}, "keys that are missing, left over or of another shape"
    assert result["outputs"]
    assert result["different"] == []
    assert result["same_tokens"]
    assert result["same_config"]


def save_first(session: Any, test: Any, save: Callable[[Any], None]) -> dict[str, Exception]:
    """Save the models of all cases that a test is going to ask about, before the first is.

    Returns:
        Why a case could not be saved; it fails in its own test, not in that of another.
    """
    failures: dict[str, Exception] = {}
    for item in session.items:
        if getattr(item, "function", None) is test:
            case = item.callspec.params["case"]
            try:
                save(case)
            except Exception as error:
                failures[str(case)] = error
    return failures
