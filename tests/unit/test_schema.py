"""Every JSON that the library writes says which layout it has, and what it was made by."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import model_folders as folders
import pytest
import small
from shell import shell

from tp_hf_config import CheckReport, Prunable, RepairReport, RoundtripReport, Support, SyncReport
from tp_hf_config.pipeline.companions import Copied
from tp_hf_config.pipeline.job import Pruned
from tp_hf_config.pipeline.proofs import Proof
from tp_hf_config.planning.plan import Plan, Size
from tp_hf_config.planning.settings import PruneSettings

PACKAGES = ("tp-hf-config", "torch", "transformers", "torch-pruning")
SIZE = Size(1, 2, None, None)
PLAN = Plan("Model", PruneSettings(), (), {}, SIZE, SIZE, None)
REPORTS = {
    "check": CheckReport("folder", None, None),
    "repair": RepairReport("folder", after=CheckReport("folder", None, True)),
    "verify": RoundtripReport("folder", "Model", True),
    "plan": PLAN,
    "prunable": Prunable("Model", ()),
    "prune": Pruned("Model", Path("out"), PLAN, (), (2, 1), Proof(1, 1), Copied(())),
    "support": Support("Model"),
    "sync": SyncReport(1),
}


def check_dated(data: dict[str, Any]) -> None:
    assert list(data)[:2] == ["schema_version", "versions"]
    assert data["schema_version"] == 1
    assert tuple(data["versions"]) == PACKAGES


@pytest.mark.parametrize("name", REPORTS)
def test_reports(name: str) -> None:
    data = REPORTS[name].to_dict()
    check_dated(data)
    assert data["versions"] == {package: version(package) for package in PACKAGES}


@pytest.mark.parametrize("name", ["support.json", "engines.json"])
def test_the_tables_of_the_documentation(name: str) -> None:
    check_dated(json.loads((small.ROOT / "docs" / name).read_text(encoding="utf-8")))


def test_what_the_shell_prints(capsys: Any, tmp_path: Path) -> None:
    folder = folders.save("llama-gqa", tmp_path / "llama")
    for code, *typed in (
        (0, "check", folder),
        (0, "repair", folder, "--dry-run"),
        (0, "prunable", folder),
        (0, "plan", folder, "--pruning-ratio", "0.25"),
        (2, "plan", folder, "--pruning-ratio", "0.25", "--prune", "no"),
        (2, "plan", folder),
        (2, "verify", "nowhere"),
    ):
        found, out, _ = shell(capsys, *typed, "--json")
        assert found == code
        check_dated(json.loads(out))
