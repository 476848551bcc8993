"""What the library says when it raises or warns: found in its source, not by running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import small

from tp_hf_config import errors

PACKAGE = small.ROOT / "tp_hf_config"
OWN = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and value.__module__ == errors.__name__
}
RAISED = OWN | {"UsageError", "BadParameter", "ValueError", "TypeError", "Unknown"}
REASONS = {
    "Refusal",
    "Unsolved",
    "Cause",
    "Config",
    "_unreadable",
    "_no_width",
}  # said by another module than makes them
REASONING = (
    "cli/values.py",
    "checkpoint/*.py",
    "planning/preflight.py",
    "planning/plan.py",
)
"""Modules whose reasons reach the user as they are: in reports, warnings and notes."""
NO_REASONS = {"a head ratio of", "what it computes depends on the values of tensors"}
"""What ``planning/plan.py`` says beside its reasons: of a target, and why FLOPs are not counted."""
_LEAST = 12  # letters: a shorter piece says nothing by itself
_EDGES = " .,:;?()="
_DEPTH = 4  # a reason comes through so many functions before it is raised

_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Message:
    """A text that an exception may carry: its longest literal piece, and where it is made."""

    fragment: str
    where: str


def messages() -> list[Message]:
    """Every message of every exception and warning that is made anywhere in the package."""
    return [message for path in sorted(PACKAGE.rglob("*.py")) for message in _Module(path).found()]


class _Module:
    def __init__(self, path: Path):
        self.path = path
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self.reasons = any(path.relative_to(PACKAGE).match(pattern) for pattern in REASONING)
        self.functions = {n.name: n for n in ast.walk(self.tree) if isinstance(n, _Function)}

    def found(self) -> Iterator[Message]:
        """The messages of this module."""
        seen: set[ast.AST] = set()
        for scope in (*self.functions.values(), self.tree):
            for node in ast.walk(scope):
                if node not in seen:
                    seen.add(node)
                    for value in (*self._said(node), *self._reasons(node)):
                        texts = set(self._texts(value, scope, _DEPTH)) - NO_REASONS
                        for text in sorted(texts):
                            yield Message(text, f"{self.path.relative_to(PACKAGE)}:{value.lineno}")

    def _said(self, node: ast.AST) -> list[ast.expr]:
        """The expressions that make a message: of an exception, a warning, or a helper's own."""
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            return node.exc.args if _name(node.exc.func) in self.functions else []
        if isinstance(node, ast.Call) and _name(node.func) in RAISED | {"warn"}:
            return node.args[:1]
        return []

    def _reasons(self, node: ast.AST) -> list[ast.expr]:
        """The expressions that make a reason: an argument of one, or what a finder of one gives."""
        if not self.reasons:
            return []
        if isinstance(node, ast.Call) and _name(node.func) in REASONS:
            return node.args
        if isinstance(node, _Function) and _gives_reasons(node):
            given = (n for n in ast.walk(node) if isinstance(n, ast.Return | ast.Yield))
            return [one.value for one in given if one.value is not None]
        return []

    def _texts(self, value: ast.AST, scope: ast.AST, depth: int) -> Iterator[str]:
        """The texts that an expression may stand for, each by its longest piece."""
        if isinstance(value, ast.Constant | ast.JoinedStr):
            text = _longest(value)
            if _tells(text):
                yield text
                return
        if depth == 0 or (isinstance(value, ast.Call) and _name(value.func) == "removeprefix"):
            return  # what is taken off is not said
        if isinstance(value, ast.Name):
            for given in _assigned(value.id, scope):
                yield from self._texts(given, scope, depth - 1)
        elif isinstance(value, ast.Call) and _name(value.func) in self.functions:
            function = self.functions[_name(value.func)]
            for node in ast.walk(function):
                if isinstance(node, ast.Return) and node.value is not None:
                    yield from self._texts(node.value, function, depth - 1)
        else:
            for child in ast.iter_child_nodes(value):
                yield from self._texts(child, scope, depth)


def _gives_reasons(function: _Function) -> bool:
    """Whether a text that it gives says why there is nothing else, or is one of several faults."""
    if function.name == "lines":  # of a report
        return False
    gives = "" if function.returns is None else ast.unparse(function.returns)
    return gives.startswith(("str | None", "Iterator[str]")) or gives.endswith("| str")


def _tells(text: str) -> bool:
    return not text.isidentifier() and sum(map(str.isalpha, text)) >= _LEAST


def _name(node: ast.AST) -> str:
    return getattr(node, "id", getattr(node, "attr", ""))


def _assigned(name: str, scope: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign):
            targets = (part for target in node.targets for part in ast.walk(target))
            if name in map(_name, targets):
                yield node.value
        elif isinstance(node, ast.AugAssign | ast.NamedExpr) and _name(node.target) == name:
            yield node.value


def _longest(value: ast.Constant | ast.JoinedStr) -> str:
    parts = value.values if isinstance(value, ast.JoinedStr) else [value]
    texts = [p.value for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str)]
    return max((" ".join(text.split()).strip(_EDGES) for text in texts), key=len, default="")


def literals() -> set[str]:
    """The longest piece of every text in the package that is long enough to tell."""
    found = {
        _longest(node)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant | ast.JoinedStr)
    }
    return {text for text in found if _tells(text)}
