"""Import one module whenever another one is, without importing that."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(name: str, follower: str) -> None:
    """Import the module ``follower`` right after ``name``: now, if that is imported already."""
    if name in sys.modules:
        import_module(follower)
    elif not any(isinstance(f, _Watch) and f.names == (name, follower) for f in sys.meta_path):
        sys.meta_path.insert(0, _Watch(name, follower))


class _Watch(MetaPathFinder):
    """Finds nothing itself; lets the module that it waits for bring its follower along."""

    def __init__(self, name: str, follower: str):
        self.names = (name, follower)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that others find, its loader made to import the follower in the end."""
        if name != self.names[0]:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            import_module(self.names[1])

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
