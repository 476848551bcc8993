"""What every written report begins with: which layout it has, and the versions it was made by."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

SCHEMA_VERSION = 1


def dated(data: dict[str, Any]) -> dict[str, Any]:
    """A report's JSON with its schema version, and the versions that it was made by."""
    return {"schema_version": SCHEMA_VERSION, "versions": versions(), **data}


def versions() -> dict[str, str]:
    """Installed versions of this library and of what it stands on."""
    found: dict[str, str] = {}
    for package in ("tp-hf-config", "torch", "transformers", "torch-pruning"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
