"""The schema version and package versions at the start of every written report."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

SCHEMA_VERSION = 1


def dated(data: dict[str, Any]) -> dict[str, Any]:
    return {"schema_version": SCHEMA_VERSION, "versions": versions(), **data}


def versions() -> dict[str, str]:
    installed: dict[str, str] = {}
    for package in ("tp-hf-config", "torch", "transformers", "torch-pruning"):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed"
    return installed
