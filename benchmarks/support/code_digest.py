"""Tell one state of the code from another, so that a row says which one it was measured with."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_digest(package: Path, programs: Iterable[Path]) -> str:
    """A digest of the modules of a package that some programs import, or these modules in turn.

    Comments, docstrings and layout do not count, nor what the package's root has for users only. It
    is the same with the same version of Python.
    """
    digest = hashlib.sha256()
    for path, tree in sorted(imported(package, programs).items()):
        name = path.relative_to(package).as_posix()
        digest.update(f"{name}\0{ast.unparse(_undocumented(tree))}\0".encode())
    return digest.hexdigest()[:12]


def imported(package: Path, programs: Iterable[Path]) -> dict[Path, ast.Module]:
    """The files of a package that some programs import, or these in turn, as syntax trees."""
    trees: dict[Path, ast.Module] = {}
    waiting = [path for program in programs for path in _imports(_tree(program), program, package)]
    while waiting:
        path = waiting.pop()
        if path not in trees:
            trees[path] = _tree(path)
            waiting.extend(_imports(trees[path], path, package))
    return trees


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(tree: ast.Module, path: Path, package: Path) -> Iterator[Path]:
    """The package's files that a module imports anywhere in it, without the package's root."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        parts = (node.module or "").split(".") if node.module else []
        if not node.level and parts[:1] != [package.name]:
            continue
        folder = path.parents[node.level - 1] if node.level else package.parent
        for place in (folder.joinpath(*parts, alias.name) for alias in node.names):
            found = next((each for each in (place, place.parent) if _file(each) is not None), None)
            if found is not None and found != package:
                yield _file(found) or found


def _file(place: Path) -> Path | None:
    """The file of a module or package, by its path without a suffix."""
    files = (place.with_suffix(".py"), place / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def _undocumented(tree: ast.Module) -> ast.Module:
    """The same code without docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree
