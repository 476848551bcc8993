"""What a fresh process that reloads a model has to find."""

from __future__ import annotations

from typing import Any


def assert_reloaded(result: dict[str, Any]) -> None:
    """A fresh process got the same model: weights, outputs, generated tokens and config."""
    assert "error" not in result, result["error"]
    assert result["loading"] == {}, "keys that are missing, left over or of another shape"
    assert result["outputs"]
    assert result["different"] == []
    assert result["same_tokens"]
    assert result["same_config"]
