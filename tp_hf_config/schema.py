"""Add the schema version and the package versions with which every written report begins."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

SCHEMA_VERSION = 1


def dated(data: dict[str, Any]) -> dict[str, Any]:
    """Return a report's JSON data with the schema version and the package versions in front."""
    return {"schema_version": SCHEMA_VERSION, "versions": versions(), **data}


def versions() -> dict[str, str]:
    """Return the installed versions of this library and its main dependencies, by package name."""
    installed: dict[str, str] = {}
    for package in ("tp-hf-config", "torch", "transformers", "torch-pruning"):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed"
    return installed
