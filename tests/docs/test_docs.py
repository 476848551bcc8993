"""The documentation is true: its code runs, its output is what comes, no message is missing."""

from __future__ import annotations

import doctest
import inspect
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import doc_blocks
import messages
import model_folders
import pytest
import small
import torch
import zoo

import tp_hf_config
from tp_hf_config.cli.commands import app
from tp_hf_config.planning import settings

DOCS = small.ROOT / "docs"
ELSEWHERE = ("upstream.md", "quickstart.md")  # tested by test_upstream_doc.py, test_quickstart.py
PAGES = [
    path.relative_to(DOCS).as_posix()
    for path in sorted(DOCS.rglob("*.md"))
    if path.name not in ELSEWHERE
]
ERRORS = (DOCS / "errors.md").read_text(encoding="utf-8")
_ROW = re.compile(r"^\| `(.+?)` \|", re.MULTILINE)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages call ``my-llm`` and the like: tiny models."""
    root = tmp_path_factory.mktemp("models")
    model_folders.save("llama-gqa", root / "my-llm")
    model_folders.save("bert-cls", root / "my-encoder")
    model_folders.save("vit", root / "my-vit")
    zoo.build("mixtral").save_pretrained(root / "my-moe")
    model_folders.save_text(root / "text.txt")
    return root


@pytest.fixture
def workplace(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the models to work in; tiny tensors, so one thread; one process of torchrun's."""
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    place = tmp_path / "work"
    shutil.copytree(models, place)
    monkeypatch.chdir(place)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield place
    torch.set_num_threads(threads)


def assert_shown(shown: str, came: str, where: str) -> None:
    """A page shows what comes; ``...`` stands for anything."""
    checker = doctest.OutputChecker()
    assert checker.check_output(shown, came, doctest.ELLIPSIS), f"{where}: it is now\n{came}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_and_gives_what_it_shows(page: str, workplace: Path) -> None:
    found = doc_blocks.blocks((DOCS / page).read_text(encoding="utf-8"), page)
    names: dict[str, Any] = {"__name__": page}
    printed = ""
    for block in found:
        if block.reason is not None:
            continue
        if block.language == "python":
            printed = doc_blocks.run_python(block, names)
        elif block.language == "console":
            for command, shown in doc_blocks.commands(block):
                assert_shown(shown, doc_blocks.run_command(command), f"{block.where}: {command}")
        elif block.language == "text":  # what the Python above it prints
            assert_shown(block.code, printed, block.where)


def test_no_block_is_passed_over() -> None:
    texts = {page: (DOCS / page).read_text(encoding="utf-8") for page in PAGES}
    found = [block for page, text in texts.items() for block in doc_blocks.blocks(text, page)]
    assert {block.language for block in found} == {"python", "console", "text", "bash"}
    assert 2 * len(found) == sum(text.count("```") for text in texts.values())
    assert [block.where for block in found if block.reason is not None] == []


def test_every_target_has_a_row() -> None:
    """The page's table is the package's."""
    page = (DOCS / "targets.md").read_text(encoding="utf-8")
    for name, needs, otherwise, source in settings.rows():
        assert f"\n| `{name}` | {needs} | {otherwise} | {source} |\n" in page, name


class TestErrors:
    def test_every_exception_has_a_section(self) -> None:
        headings = re.findall(r"^## (\w+)", ERRORS, re.MULTILINE)
        assert set(headings) >= messages.OWN

    def test_every_row_is_a_message(self) -> None:
        said = messages.literals()
        dead = [row for row in _ROW.findall(ERRORS) if not any(text in row for text in said)]
        assert dead == []


def _module(name: str) -> ModuleType:
    return small.module_of(DOCS / f"{name}.py")


class TestReference:
    def test_every_public_name_is_there(self) -> None:
        page = (DOCS / "reference" / "python.md").read_text(encoding="utf-8")
        listed = re.findall(r"^::: tp_hf_config\.(\w+)$", page, re.MULTILINE)
        assert sorted(listed) == sorted(tp_hf_config.__all__)

    def test_every_public_name_and_method_has_a_docstring(self) -> None:
        for name in tp_hf_config.__all__:
            public = getattr(tp_hf_config, name)
            assert public.__doc__, name
            for member, value in vars(public).items() if inspect.isclass(public) else ():
                documented = inspect.isfunction(value) or isinstance(value, property)
                if documented and not member.startswith("_"):
                    assert inspect.getdoc(getattr(public, member)), f"{name}.{member}"

    def test_every_option_of_every_command_is_there(self) -> None:
        path = DOCS / "reference" / "command-line.md"
        hook = _module("command_line")
        page = hook.on_page_markdown(path.read_text(encoding="utf-8"))
        sections = dict(re.findall(r"^## (\S+)$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
        assert hook.MARK not in page
        for command in app.registered_commands:
            function: Any = command.callback
            options = [name for name in inspect.signature(function).parameters if name != "ctx"]
            for option in options:
                shown = "for" if option == "target" else option.replace("_", "-")
                assert f"`--{shown}" in sections[function.__name__] or (
                    f"`{option.upper()}" in sections[function.__name__]
                ), (function, option)
